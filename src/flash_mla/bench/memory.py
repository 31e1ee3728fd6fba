"""Device memory of a benchmark: what torch's allocator holds and what growing pools hold outside it, added up."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.cuda import memory as growing

__all__ = ["cache_bytes", "held_bytes", "peak_bytes", "reset_peak"]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def held_bytes(device: torch.device) -> int:
    """Bytes in use on `device` now; 0 off CUDA.

    Without what either allocator keeps for later: a run that uses a dropped cache's memory again takes it as if anew.
    """
    if device.type != "cuda":
        return 0
    index = _index(device)
    return torch.cuda.memory_allocated(device) + growing.held_bytes(index) - growing.kept_bytes(index)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes in use since `reset_peak`; None off CUDA.

    The sum of two peaks, of torch's allocator and of the pools outside it, which need not have come at one time: an
    upper bound, exact where the pools only grow. Memory of an earlier cache may have been larger than is needed, by at
    most 16 MiB per layer and 256 MiB in all: it counts whole.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) + growing.peak_bytes(_index(device))


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin at what is in use now."""
    if device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(device)
    growing.reset_peak()


def cache_bytes(cache: Any) -> int:
    """Bytes that a Transformers cache holds on its device: the pools of a paged one, keys and values of the others."""
    if hasattr(cache, "memory_report"):
        return int(cache.memory_report().bytes_allocated)
    total = 0
    for layer in getattr(cache, "layers", []):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total
