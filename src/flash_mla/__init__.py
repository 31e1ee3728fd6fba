"""Paged latent cache and absorbed MLA decode for Hugging Face Transformers; importing it registers "flash_mla"."""

from .cache import MemoryReport, PagedLatentCache, PrefixEntry, PrefixStore
from .contract import UnsupportedError
from .hf import path_counts, prefill_progress, register, reset_path_counts, unregister
from .interface import flash_mla_with_kvcache, get_mla_metadata
from .ops import SplitPlan, append, backend_counts, decode, plan_splits
from .sparse_interface import flash_mla_sparse_fwd

__version__ = "0.1.0"

__all__ = [
    "MemoryReport",
    "PagedLatentCache",
    "PrefixEntry",
    "PrefixStore",
    "SplitPlan",
    "UnsupportedError",
    "append",
    "backend_counts",
    "decode",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "path_counts",
    "plan_splits",
    "prefill_progress",
    "register",
    "reset_path_counts",
    "unregister",
]

register()
