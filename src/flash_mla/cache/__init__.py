"""Pages, layers and the cache that Transformers sees."""

from .cache import MemoryReport, PagedLatentCache
from .layer import Latents, PagedLatentLayer

__all__ = ["Latents", "MemoryReport", "PagedLatentCache", "PagedLatentLayer"]
