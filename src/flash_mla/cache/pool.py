"""How a layer's pool of pages is made and grown: in place where the driver can map memory behind it, else by a copy."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..backends.cuda import memory

__all__ = ["Pool"]

logger = logging.getLogger(__name__)


@functools.cache
def _grows_in_place(device: torch.device) -> bool:
    """Whether pools on a device grow without a copy; says once at INFO which way they grow, and why."""
    if device.type != "cuda":
        reason: str | None = f"{device.type} tensors cannot grow in place"
    else:
        reason = memory.refusal(device.index or 0)
    if reason is None:
        logger.info("flash_mla: pools on %s grow in place", device)
    else:
        logger.info("flash_mla: pools on %s are copied when they grow: %s", device, reason)
    return reason is None


def _pages_in_granules(page_bytes: int, granule_bytes: int, num_blocks: int) -> int:
    return memory.round_up(num_blocks * page_bytes, granule_bytes) // page_bytes


class Pool:
    """Makes and grows the pages `[num_blocks, block_size, 1, d_qk]` of one layer; the layer keeps the tensor.

    A copy of it (copy.deepcopy, pickle) has no memory of its own yet: the copied pool is an ordinary tensor, which is
    copied once more when it grows for the first time.

    Args:
        grows: whether it ever will; one of fixed capacity is an ordinary tensor.
    """

    def __init__(self, grows: bool) -> None:
        self.grows = grows
        self._memory: memory.GrowingMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A zeroed pool that may be written in place later, also if it is made inside `torch.inference_mode()`.

        Zeroed, so that who reads a page past its last token finds numbers: NaN times a probability of 0 is NaN.
        """
        if torch.compiler.is_compiling():
            return torch.zeros(shape, dtype=dtype, device=device)
        if self.grows and _grows_in_place(device):
            self._memory = memory.GrowingMemory(device, _num_bytes(shape, dtype))
            return self._memory.tensor(shape, dtype)
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=device)

    def grow(self, kv_cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """A pool of `num_blocks` pages that begins with those of `kv_cache` and ends with zeroed ones.

        In place: over the same memory, so that `kv_cache` goes on showing the same pages.
        Raises: torch.OutOfMemoryError: `kv_cache` is as it was.
        """
        shape = (num_blocks, *kv_cache.shape[1:])
        if not torch.compiler.is_compiling():
            grown = self._memory
            if grown is not None and grown.address == kv_cache.data_ptr():  # else somebody put another tensor there
                grown.grow(_num_bytes(shape, kv_cache.dtype))
                return grown.tensor(shape, kv_cache.dtype)
        pool = self.zeros(shape, kv_cache.dtype, kv_cache.device)
        pool[: kv_cache.shape[0]] = kv_cache
        return pool

    def round_up(self, kv_cache: torch.Tensor) -> Callable[[int], int] | None:
        """For `PageTable.round_up`: pages that the granules of so many pages hold; None where growing copies.

        At most a granule lies idle per layer: 2 MiB, 28 pages of 64 tokens x 1,152 bytes; 54 MiB over 27 layers. Memory
        of an earlier cache that is used again may have up to memory.SPARE_BYTES more: it is grown into without calling
        the driver.
        """
        if not (self.grows and _grows_in_place(kv_cache.device)):
            return None
        page_bytes = kv_cache[0].numel() * kv_cache.element_size()
        return functools.partial(_pages_in_granules, page_bytes, memory.granule(kv_cache.device.index or 0))


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    num_blocks, block_size, h_kv, d_qk = shape
    return num_blocks * block_size * h_kv * d_qk * dtype.itemsize
