"""The split plan, made by a compiled kernel: one launch, the integers of `backends.torch.plan`."""

from __future__ import annotations

import ctypes
import struct

import torch

from ...contract import CUT_COST, ITEM_COST, check_slots
from . import driver

__all__ = ["plan"]

# PlanParams of kernels/plan.cu: addresses of cache_seqlens, items and splits; stride of cache_seqlens in elements;
# batch, num_slots, item_cost, cut_cost.
PARAMS = struct.Struct("=3Qq4i")
THREADS = 1024


def plan(cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal the requests out to slots; arguments, results and rule as `backends.torch.plan`.

    Reads device memory only; no host sync; capturable in a CUDA graph.
    """
    batch = cache_seqlens.shape[0]
    check_slots(batch, num_slots, deterministic)
    rows = num_slots + batch
    items = torch.empty((rows, 4), dtype=torch.int32, device=cache_seqlens.device)
    splits = torch.empty((batch, 2), dtype=torch.int32, device=cache_seqlens.device)
    addresses = (cache_seqlens.data_ptr(), items.data_ptr(), splits.data_ptr())
    params = ctypes.create_string_buffer(PARAMS.size)
    PARAMS.pack_into(params, 0, *addresses, cache_seqlens.stride(0), batch, num_slots, ITEM_COST, CUT_COST)
    device_index = cache_seqlens.get_device()
    function = driver.function(device_index, "plan", "plan_fixed" if deterministic else "plan_splits")
    # plan_splits walks through the requests in order: one block. plan_fixed has a thread per row.
    grid = (-(-rows // THREADS), 1, 1) if deterministic else (1, 1, 1)
    driver.launch(device_index, function, grid, THREADS, 0, driver.raw_stream(device_index), params)
    return items, splits
