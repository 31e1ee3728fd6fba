"""Paged latent cache and absorbed MLA decode for Hugging Face Transformers; importing it registers "flash_mla"."""

from .contract import UnsupportedError
from .ops import SplitPlan, append, backend_counts, decode, plan_splits

__version__ = "0.1.0"

__all__ = ["SplitPlan", "UnsupportedError", "append", "backend_counts", "decode", "plan_splits"]
