"""Pages, layers and the cache that Transformers sees."""

from .cache import SPARSE_IS_LATENT, MemoryReport, PagedLatentCache
from .indexed import PagedIndexedLayer
from .layer import Latents, PagedLatentLayer
from .store import PrefixEntry, PrefixStore

__all__ = [
    "SPARSE_IS_LATENT",
    "Latents",
    "MemoryReport",
    "PagedIndexedLayer",
    "PagedLatentCache",
    "PagedLatentLayer",
    "PrefixEntry",
    "PrefixStore",
]
