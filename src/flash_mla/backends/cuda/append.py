"""Append on Hopper: which calls the compiled kernel takes, how wide a unit it moves, and its launch."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading

import torch

from ...contract import AppendCall
from . import driver

__all__ = ["AppendParams", "append", "append_refusals", "geometry"]

CAPABILITY = (9, 0)
# Rows per CTA, one warp each. Few rows go one to a CTA, to as many SMs as there are: a row is bound by latency then.
WARPS = 8
FEW_ROWS = 1024
# By bytes of a unit.
MAX_UNIT = 16
KERNELS = {unit: f"append_rows_{unit}" for unit in (2, 4, 8, 16)}


class AppendParams(ctypes.Structure):
    """AppendParams of `kernels/append.cu`; strides and lengths in bytes."""

    _fields_ = (
        ("kv_cache", ctypes.c_uint64),
        ("latent", ctypes.c_uint64),
        ("k_rope", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("kv_stride_block", ctypes.c_int64),
        ("kv_stride_token", ctypes.c_int64),
        ("kv_stride_head", ctypes.c_int64),
        ("latent_stride_batch", ctypes.c_int64),
        ("latent_stride_token", ctypes.c_int64),
        ("latent_stride_head", ctypes.c_int64),
        ("rope_stride_batch", ctypes.c_int64),
        ("rope_stride_token", ctypes.c_int64),
        ("rope_stride_head", ctypes.c_int64),
        ("slots_stride_batch", ctypes.c_int64),
        ("slots_stride_token", ctypes.c_int64),
        ("num_rows", ctypes.c_uint32),
        ("seqlen_q", ctypes.c_uint32),
        ("h_kv", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("latent_bytes", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
    )


# The struct in two parts: addresses, which change with every call, and the rest, which repeats from step to step.
ADDRESSES = struct.Struct("@4Q")
GEOMETRY = struct.Struct("@11q4I2i")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.params = AppendParams()
        self.bytes = memoryview(self.params).cast("B")


_thread = _PerThread()


def append_refusals(call: AppendCall) -> list[str]:
    """Reasons against an append call; empty = accepts. It moves bytes, so it takes every dtype and shape."""
    if call.device_type != "cuda":
        return [f"needs a CUDA device, got {call.device_type}"]
    if reason := driver.unavailable():
        return [reason]
    reasons = []
    if call.capability != CAPABILITY:
        major, minor = call.capability or (0, 0)
        reasons.append(f"needs compute capability 9.0 (Hopper), have {major}.{minor}")
    if call.kv_cache_strides[3] != 1:
        reasons.append(f"needs the last stride of kv_cache to be 1, got {call.kv_cache_strides[3]}")
    if call.num_blocks * call.block_size >= 2**32:
        reasons.append(f"takes a pool of fewer than 2**32 tokens, got {call.num_blocks} x {call.block_size}")
    if call.batch * call.seqlen_q * call.h_kv >= 2**31:
        reasons.append(f"takes fewer than 2**31 rows, got {call.batch} x {call.seqlen_q} x {call.h_kv}")
    return reasons


@functools.lru_cache(maxsize=1024)
def geometry(
    call: AppendCall,
    itemsize: int,
    latent_strides: tuple[int, ...],
    rope_strides: tuple[int, ...],
    slots_strides: tuple[int, ...],
) -> tuple[bytes, int]:
    """Everything of `AppendParams` but the addresses, and the union of the bits that bound the width of a unit.

    Strides come in elements. The stride of a dimension of one element is never walked, and may be anything.
    """
    extents = (call.num_blocks, call.block_size, call.h_kv, *(call.batch, call.seqlen_q, call.h_kv) * 2)
    elements = (*call.kv_cache_strides[:3], *latent_strides[:3], *rope_strides[:3])
    strides = [itemsize * stride if extent > 1 else 0 for stride, extent in zip(elements, extents, strict=True)]
    latent_bytes, rope_bytes = itemsize * call.kv_lora_rank, itemsize * call.qk_rope_head_dim
    bits = MAX_UNIT
    for quantity in (*strides, latent_bytes, rope_bytes):
        bits |= quantity
    num_rows = call.batch * call.seqlen_q * call.h_kv
    counts = (num_rows, call.seqlen_q, call.h_kv, call.block_size, latent_bytes, latent_bytes + rope_bytes)
    return GEOMETRY.pack(*strides, *(8 * stride for stride in slots_strides), *counts), bits


def append(
    call: AppendCall, kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write each new token's `[latent | rotated key]` row into its slot, in place, in one launch.

    Shapes as in `contract.check_append`. A `latent` or `k_rope` whose last stride is not 1 is copied first; the pool
    never is. Two tokens share a slot only if equal or unread.
    """
    num_rows = call.batch * call.seqlen_q * call.h_kv
    if num_rows == 0:
        return
    if latent.stride(3) != 1:
        latent = latent.contiguous()
    if k_rope.stride(3) != 1:
        k_rope = k_rope.contiguous()
    rest, bits = geometry(call, kv_cache.element_size(), latent.stride(), k_rope.stride(), slots.stride())
    pool, source, rope = kv_cache.data_ptr(), latent.data_ptr(), k_rope.data_ptr()
    bits |= pool | source | rope
    thread = _thread
    ADDRESSES.pack_into(thread.bytes, 0, pool, source, rope, slots.data_ptr())
    thread.bytes[ADDRESSES.size :] = rest
    # The lowest bit that is set: the widest unit, at most 16 bytes, that divides every address, stride and length.
    kernel = driver.function(call.device_index, "append", KERNELS[bits & -bits])
    warps = 1 if num_rows <= FEW_ROWS else WARPS
    grid = (-(-num_rows // warps), 1, 1)
    stream = driver.raw_stream(call.device_index)
    driver.launch(call.device_index, kernel, grid, 32 * warps, 0, stream, thread.params)
