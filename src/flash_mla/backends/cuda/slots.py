"""Where new tokens go, found by a compiled kernel: one launch, the integers of `backends.torch.next_slots`."""

from __future__ import annotations

import struct
import threading

import torch

from . import driver

__all__ = ["next_slots"]

# SlotsParams of kernels/slots.cu: addresses of block_table, cache_seqlens, valid, slots and lengths; strides of
# block_table (2), cache_seqlens (1) and valid (2) in elements; seqlen_q, block_size, max_blocks, capacity.
PARAMS = struct.Struct("=5Q5q4i")
ADDRESSES = struct.Struct("=5Q")  # all that differs from step to step until a page is added
NO_CAPACITY = 2**31 - 1
MOST_KEPT = 1024  # entries of `driver.memo`


def next_slots(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    seqlen_q: int,
    block_size: int,
    valid: torch.Tensor | None = None,
    capacity: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and lengths of a forward; arguments, results and rule as `backends.torch.next_slots`.

    Reads device memory only; no host sync; capturable in a CUDA graph.
    """
    batch, max_blocks = block_table.shape
    slots = torch.empty((batch, seqlen_q), dtype=torch.int64, device=block_table.device)
    lengths = torch.empty(batch, dtype=torch.int32, device=block_table.device)
    if batch == 0:
        return slots, lengths
    device_index = block_table.get_device()
    stream = driver.raw_stream(device_index)
    fixed = (
        *block_table.stride(),
        cache_seqlens.stride(0),
        *((0, 0) if valid is None else valid.stride()),
        seqlen_q,
        block_size,
        max_blocks,
        NO_CAPACITY if capacity is None else capacity,
    )
    key = ("next_slots", threading.get_ident(), device_index, stream, batch, *fixed)
    launch: driver.Launch | None = driver.memo.get(key)
    if launch is None:
        if len(driver.memo) >= MOST_KEPT:
            driver.memo.clear()
        function, params = driver.function(device_index, "slots", "next_slots"), PARAMS.pack(*(0,) * 5, *fixed)
        launch = driver.memo[key] = driver.Launch(function, (batch, 1, 1), 32, 0, stream, params)
    read = (block_table.data_ptr(), cache_seqlens.data_ptr(), 0 if valid is None else valid.data_ptr())
    ADDRESSES.pack_into(launch.params, 0, *read, slots.data_ptr(), lengths.data_ptr())
    driver.launch_all(device_index, (launch,))
    return slots, lengths
