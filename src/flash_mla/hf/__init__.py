"""Everything that knows Transformers: registration, the attention function, the mask and the table of models."""

from .paths import path_counts, reset_path_counts
from .prefill import prefill_progress
from .register import register, unregister

__all__ = ["path_counts", "prefill_progress", "register", "reset_path_counts", "unregister"]
