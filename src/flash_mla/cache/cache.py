"""PagedLatentCache: Transformers' Cache, with paged latent layers where the model has MLA and its own elsewhere."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
)

from ..codec import COLUMNS_PER_SCALE
from ..ops import BACKENDS
from .group import PagedGroup
from .indexed import PagedIndexedLayer
from .layer import PagedLatentLayer

__all__ = ["SPARSE_IS_LATENT", "MemoryReport", "PagedLatentCache"]

# Models with an indexer cache expanded keys and values before Transformers 5.18.
SPARSE_IS_LATENT = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2]) >= (5, 18)


@dataclass(frozen=True)
class MemoryReport:
    """What a cache holds. Bytes are summed over all paged layers; pages and tokens are counted once for all layers.

    Attributes:
        block_size: tokens per page.
        pages_total: pages of the pool (the one for padding not counted).
        pages_allocated: pages that hold tokens of at least one row; shared pages count once.
        tokens_used: real tokens over all rows.
        tokens_padded: positions of a padded cache of the same batch: rows x padded length.
        bytes_allocated: bytes of the pools.
        bytes_padded: bytes that a padded cache of latents would take, in the dtype of the model.
    """

    block_size: int
    pages_total: int
    pages_allocated: int
    tokens_used: int
    tokens_padded: int
    bytes_allocated: int
    bytes_padded: int

    def __str__(self) -> str:
        mib = 1 / 2**20
        return (
            f"{self.pages_allocated} of {self.pages_total} pages of {self.block_size} tokens in use, "
            f"{self.tokens_used} tokens; pools {self.bytes_allocated * mib:.2f} MiB, "
            f"a padded latent cache would take {self.bytes_padded * mib:.2f} MiB for {self.tokens_padded} positions"
        )


class PagedLatentCache(Cache):  # type: ignore[misc]
    """A cache of MLA latents in pages, for `model.generate(past_key_values=...)` or a loop of one's own.

    Args:
        config: the model's config (the object itself, `model.config`: the cache looks up which attention is in use).
        block_size: tokens per page, a multiple of 16.
        max_cache_len: positions per row (padding included) that are reserved at the first token, at fixed addresses,
            for compiled decoding; None grows by pages.
        prompt_repeats: consecutive rows that will be given the same prompt (what `generate` does for beams and
            `num_return_sequences`); they share its pages.
        backend: "cuda", "triton" or "torch" for every op of this cache, obeyed or refused; None chooses.
        dtype: "fp8" stores tokens as FP8 rows: 656 bytes each instead of 1,152 in DeepSeek's latent shape, latents
            within 2^-4 of themselves (`flash_mla.codec`). None stores them as the model computes.
    Raises: ValueError: a config without `kv_lora_rank`, or one that FP8 rows do not hold, or a bad option.

    Only real tokens are stored: padding takes no page. `get_seq_length()` is the padded length, as `generate` expects.
    """

    def __init__(
        self,
        config: Any,
        block_size: int = 64,
        max_cache_len: int | None = None,
        *,
        prompt_repeats: int = 1,
        backend: str | None = None,
        dtype: str | None = None,
    ) -> None:
        if not isinstance(block_size, int) or block_size < 16 or block_size % 16:
            raise ValueError(f"flash_mla.PagedLatentCache: block_size must be a multiple of 16, got {block_size!r}")
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise ValueError(f"flash_mla.PagedLatentCache: max_cache_len must be at least 1, got {max_cache_len!r}")
        if not isinstance(prompt_repeats, int) or prompt_repeats < 1:
            raise ValueError(f"flash_mla.PagedLatentCache: prompt_repeats must be at least 1, got {prompt_repeats!r}")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"flash_mla.PagedLatentCache: backend must be one of {[*BACKENDS]} or None, got {backend!r}"
            )
        if dtype not in (None, "fp8"):
            raise ValueError(
                f"flash_mla.PagedLatentCache: dtype must be 'fp8', or None for that of the model, got {dtype!r}"
            )
        text_config = config.get_text_config(decoder=True)
        own = StaticCache(text_config, max_cache_len) if max_cache_len is not None else DynamicCache(config=text_config)
        plain = DynamicLayer if max_cache_len is None else StaticLayer
        ranks = _latent_ranks(text_config, len(own.layers))
        if not any(ranks):
            raise ValueError(
                f"flash_mla.PagedLatentCache: config of model type {text_config.model_type!r} has no kv_lora_rank: "
                "not a model with Multi-head Latent Attention"
            )
        unfit = sorted({rank for rank in ranks if rank is not None and rank % COLUMNS_PER_SCALE})
        if dtype == "fp8" and unfit:
            raise ValueError(
                f"flash_mla.PagedLatentCache: dtype='fp8' needs a kv_lora_rank that {COLUMNS_PER_SCALE} divides, got "
                f"{', '.join(map(str, unfit))} in the config of model type {text_config.model_type!r}"
            )
        self.group = PagedGroup(
            text_config, block_size, max_cache_len, prompt_repeats, backend, ranks, is_fp8=dtype == "fp8"
        )
        # Sliding, linear and dummy layers stay Transformers' own.
        indexed = DynamicIndexedLayer if max_cache_len is None else StaticIndexedLayer
        layers: list[Any] = []
        for index, layer in enumerate(own.layers):
            if type(layer) is plain and ranks[index]:
                layers.append(PagedLatentLayer(self.group, index))
            elif type(layer) is indexed and ranks[index] and SPARSE_IS_LATENT:
                layers.append(PagedIndexedLayer(self.group, index, layer))
            else:
                layers.append(layer)
        super().__init__(layers=layers)

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.group.block_size

    @property
    def max_cache_len(self) -> int | None:
        """Positions per row that were reserved; None if the cache grows."""
        return self.group.max_cache_len

    @property
    def dtype(self) -> str | None:
        """ "fp8", or None: as the model computes."""
        return "fp8" if self.group.is_fp8 else None

    @property
    def paged_layers(self) -> list[PagedLatentLayer]:
        """The layers that are paged."""
        return [layer for layer in self.layers if isinstance(layer, PagedLatentLayer)]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Take the new latents of one layer; see `PagedLatentLayer.update`.

        Raises: ValueError: no such layer, or latents that do not fit (nothing is changed).
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"flash_mla.PagedLatentCache: has {len(self.layers)} layers, got tokens of layer {layer_idx}: "
                "a cache of another model?"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions of every row; whole pages are given back.

        Raises: ValueError: positive, or more than there are; nothing is changed.
        """
        self.group.check_crop(tokens_to_remove)
        # Sliding layers may refuse (they forget their past): they come first, while the pages are still as they were.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, PagedLatentLayer)):
            layer.crop(tokens_to_remove)

    def memory_report(self) -> MemoryReport:
        """Pages, tokens and bytes. Waits for the device.

        Raises: ValueError: tokens past a fixed capacity were lost.
        """
        self.validate()
        pages_total = pages_allocated = tokens_used = tokens_padded = 0
        for state in list(self.group.states.values())[:1]:
            lengths = state.cache_seqlens.tolist()
            tokens_used, tokens_padded = sum(lengths), state.batch * state.seen_int()
            pages_total = state.num_blocks - 1
            pages_allocated = state.pages_in_use()
        bytes_allocated = bytes_padded = 0
        for layer in self.paged_layers:
            if layer.kv_cache is not None and layer.state is not None:
                row = layer.d_qk * layer.dtype.itemsize
                bytes_allocated += layer.kv_cache.numel() * layer.kv_cache.element_size()
                bytes_padded += layer.state.batch * layer.state.seen_int() * row
        return MemoryReport(
            block_size=self.block_size,
            pages_total=pages_total,
            pages_allocated=pages_allocated,
            tokens_used=tokens_used,
            tokens_padded=tokens_padded,
            bytes_allocated=bytes_allocated,
            bytes_padded=bytes_padded,
        )

    def validate(self) -> None:
        """Check what lies in device memory: lengths, page numbers, reference counts, capacity. Waits for the device.

        Raises: ValueError: the first thing that cannot be right.
        """
        for state in self.group.states.values():
            state.validate()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLatentCache:
        """A cache of its own pages for the same model: the config is shared, since it says which attention runs."""
        memo[id(self.group.config)] = self.group.config
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            setattr(clone, name, copy.deepcopy(value, memo))
        return clone


def _latent_ranks(config: Any, num_layers: int) -> list[int | None]:
    """`kv_lora_rank` of each layer. Configs that differ by layer refuse the plain attribute, so ask layer by layer."""
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is None or len(per_layer) != num_layers:
        return [getattr(config, "kv_lora_rank", None)] * num_layers
    return [getattr(layer_config, "kv_lora_rank", None) for layer_config in per_layer]
