"""Everything that knows Transformers: registration, the attention function, the mask and the table of models."""

from .paths import path_counts, reset_path_counts
from .register import register, unregister

__all__ = ["path_counts", "register", "reset_path_counts", "unregister"]
