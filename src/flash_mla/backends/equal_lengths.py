"""Lengths and plans of queries that all name as many rows: the same for every layer of every step, so they are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["equal_lengths", "nothing_kept"]

# By backend, device, stream (another one might come before they are made), queries, rows and slots; two or three batch
# sizes of a model.
_kept: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
MOST_KEPT = 16


class _PerThread(threading.local):
    keeps = True


_thread = _PerThread()


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it each call makes its own: what compiled graphs warm up with comes from their memory."""
    before, _thread.keeps = _thread.keeps, False
    try:
        yield
    finally:
        _thread.keeps = before


def _may_keep(device: torch.device) -> bool:
    """Not in a capture: a graph that refers to what is kept would outlive it."""
    return _thread.keeps and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def equal_lengths(
    device: torch.device,
    num_queries: int,
    topk: int,
    slots: int,
    plan: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths int32 `[num_queries]`, all topk, and `plan` of them: kept, but a graph owns its own."""
    stream = torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    key = (plan, device, stream, num_queries, topk, slots)
    may_keep = _may_keep(device)
    found = _kept.get(key) if may_keep else None
    if found is not None:
        return found
    with torch.inference_mode(False):
        lengths = torch.full((num_queries,), topk, dtype=torch.int32, device=device)
        made = (lengths, *plan(lengths, slots))
    if may_keep:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[key] = made
    return made
