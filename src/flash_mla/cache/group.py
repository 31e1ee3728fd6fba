"""What all paged layers of one cache share: its options, and one state per device."""

from __future__ import annotations

from typing import Any

import torch

from .fixed import FixedState
from .growing import GrowingState
from .state import PagedState

__all__ = ["PagedGroup"]


class PagedGroup:
    """Options and states. Layers refer to this and not to the cache, so that a dropped cache frees its pools at once,
    without waiting for the garbage collector.

    Args:
        config: text config of the model; says which attention runs.
        block_size, max_cache_len, prompt_repeats, backend: as in `PagedLatentCache`.
        kv_lora_ranks: by layer, None where a layer has no latents.
        is_fp8: whether tokens are stored as FP8 rows (`flash_mla.codec`).
    """

    def __init__(
        self,
        config: Any,
        block_size: int,
        max_cache_len: int | None,
        prompt_repeats: int,
        backend: str | None,
        kv_lora_ranks: list[int | None],
        is_fp8: bool = False,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.max_cache_len = max_cache_len
        self.prompt_repeats = prompt_repeats
        self.backend = backend
        self.kv_lora_ranks = kv_lora_ranks
        self.is_fp8 = is_fp8
        self.states: dict[torch.device, PagedState] = {}

    @property
    def attention(self) -> str | None:
        """The attention implementation that the model runs now."""
        attention: str | None = self.config._attn_implementation
        return attention

    @property
    def num_paged(self) -> int:
        """Layers that have latents."""
        return sum(rank is not None for rank in self.kv_lora_ranks)

    def join(self, batch: int, device: torch.device, index: int) -> tuple[PagedState, bool]:
        """The state of `device` and whether it was just made; then the asking layer, number `index`, is its leader."""
        if device in self.states:
            state = self.states[device]
            state.last_index = max(state.last_index, index)
            if state.num_forwards > 1:
                state.num_written = -1  # this layer missed a forward
                state.check_complete()
            state.num_layers += 1
            return state, False
        if self.max_cache_len is not None:
            self.states[device] = FixedState(batch, self.block_size, device, self.max_cache_len)
        else:
            repeats = self.prompt_repeats if batch % self.prompt_repeats == 0 else 1
            self.states[device] = GrowingState(batch, self.block_size, device, repeats)
        self.states[device].backend = self.backend
        self.states[device].num_layers = 1
        self.states[device].last_index = index
        return self.states[device], True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless every state can crop by `tokens_to_remove` (zero or negative)."""
        if tokens_to_remove and not self.states:
            raise ValueError(
                f"flash_mla.PagedLatentCache.crop: the cache is empty, got {tokens_to_remove} positions to remove"
            )
        for state in self.states.values():
            state.check_crop(tokens_to_remove)
