"""Append on Hopper: which calls the compiled kernels take, how wide a unit they move, and their launch."""

from __future__ import annotations

import ctypes
import functools
import operator
import struct
import threading

import torch

from ...codec import ROW_ALIGNMENT
from ...contract import AppendCall
from . import driver

__all__ = ["AppendParams", "append", "append_refusals", "geometry", "launch_form"]

CAPABILITY = (9, 0)
# Rows per CTA, one warp each. Few rows go one to a CTA, to as many SMs as there are: a row is bound by latency then.
WARPS = 8
FEW_ROWS = 1024
# By bytes of a unit.
MAX_UNIT = 16
KERNELS = {unit: f"append_rows_{unit}" for unit in (2, 4, 8, 16)}
# FP8 rows: by the dtype that their columns come in.
FP8_KERNELS = {"bfloat16": "append_fp8_bf16", "float16": "append_fp8_fp16", "float32": "append_fp8_fp32"}
# The kernel counts units of q's rotated columns in 32 bits, and a unit may be as small as 2 bytes.
MOST_QUERY_BYTES = 2**31


class AppendParams(ctypes.Structure):
    """AppendParams of `kernels/append.cu`; strides and lengths in bytes."""

    _fields_ = (
        ("kv_cache", ctypes.c_uint64),
        ("latent", ctypes.c_uint64),
        ("k_rope", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("q_rope", ctypes.c_uint64),
        ("q", ctypes.c_uint64),
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
        ("q_rope_stride_batch", ctypes.c_int64),
        ("q_rope_stride_token", ctypes.c_int64),
        ("q_rope_stride_head", ctypes.c_int64),
        ("q_stride_batch", ctypes.c_int64),
        ("q_stride_token", ctypes.c_int64),
        ("q_stride_head", ctypes.c_int64),
        ("num_rows", ctypes.c_uint32),
        ("seqlen_q", ctypes.c_uint32),
        ("h_kv", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("latent_bytes", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
        ("num_heads", ctypes.c_uint32),
        ("q_rows", ctypes.c_uint32),
    )


# The struct in two parts: addresses, which change with every call, and the rest, which repeats from step to step.
ADDRESSES = struct.Struct("@6Q")
GEOMETRY = struct.Struct("@17q4I2i2I")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.params = AppendParams()
        self.bytes = memoryview(self.params).cast("B")


_thread = _PerThread()


def append_refusals(call: AppendCall) -> list[str]:
    """Reasons against an append call; empty = accepts.

    Rows of the dtype that they come in are moved as bytes: every dtype and shape. FP8 rows are encoded.
    """
    if call.device_type != "cuda":
        return [f"needs a CUDA device, got {call.device_type}"]
    if reason := driver.unavailable():
        return [reason]
    reasons = []
    if call.fp8:
        reasons += _fp8_refusals(call)
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


def _fp8_refusals(call: AppendCall) -> list[str]:
    reasons = []
    if call.dtype not in FP8_KERNELS:
        reasons.append(f"encodes FP8 rows from bfloat16, float16 or float32, got {call.dtype}")
    if call.qk_rope_head_dim % 2:
        reasons.append(f"writes FP8 rows of an even qk_rope_head_dim, got {call.qk_rope_head_dim}")
    if call.kv_cache_misalignment or any(stride % ROW_ALIGNMENT for stride in call.kv_cache_strides[:3]):
        reasons.append(
            f"needs FP8 rows that begin at multiples of {ROW_ALIGNMENT} bytes, got strides "
            f"{call.kv_cache_strides} and a pool {call.kv_cache_misalignment} bytes past one"
        )
    return reasons


@functools.lru_cache(maxsize=1024)
def geometry(
    call: AppendCall,
    itemsize: int,
    latent_strides: tuple[int, ...],
    rope_strides: tuple[int, ...],
    slots_strides: tuple[int, ...],
    num_heads: int = 0,
    q_rope_strides: tuple[int, ...] = (0, 0, 0),
    q_strides: tuple[int, ...] = (0, 0, 0),
) -> tuple[bytes, int, tuple[int, int, int]]:
    """Everything of `AppendParams` but the addresses, and the union of the bits that bound the width of a unit.

    Strides come in elements of `itemsize` bytes; those of a pool of FP8 rows are bytes. The stride of a dimension of
    one element is never walked, and may be anything.

    Returns: the bytes; the union over everything; and that over latents, rotated keys, and queries with the length of
        their rotated columns, each by itself.
    """
    rows, heads = (call.batch, call.seqlen_q, call.h_kv), (call.batch, call.seqlen_q, num_heads)

    def in_bytes(strides: tuple[int, ...], extents: tuple[int, ...], itemsize: int = itemsize) -> list[int]:
        return [itemsize * stride if extent > 1 else 0 for stride, extent in zip(strides, extents, strict=True)]

    pool_extents = (call.num_blocks, call.block_size, call.h_kv)
    pool = in_bytes(call.kv_cache_strides[:3], pool_extents, 1 if call.fp8 else itemsize)
    latent, rope = in_bytes(latent_strides[:3], rows), in_bytes(rope_strides[:3], rows)
    q_bytes = in_bytes(q_rope_strides[:3], heads) + in_bytes(q_strides[:3], heads)
    latent_bytes, rope_bytes = itemsize * call.kv_lora_rank, itemsize * call.qk_rope_head_dim
    # Rotated keys of no columns are not read, whatever their strides.
    parts = (_union(latent), _union(rope) if rope_bytes else 0, _union([*q_bytes, rope_bytes]))
    bits = _union([MAX_UNIT, *pool, *latent, *rope, *q_bytes, latent_bytes, rope_bytes])
    num_rows, q_rows = call.batch * call.seqlen_q * call.h_kv, call.batch * call.seqlen_q * num_heads
    counts = (num_rows, call.seqlen_q, call.h_kv, call.block_size, latent_bytes, latent_bytes + rope_bytes)
    slots = (8 * stride for stride in slots_strides)
    return GEOMETRY.pack(*pool, *latent, *rope, *slots, *q_bytes, *counts, num_heads, q_rows), bits, parts


def _union(quantities: list[int]) -> int:
    return functools.reduce(operator.or_, quantities)


def append(
    call: AppendCall,
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
) -> None:
    """Write each new token's `[latent | rotated key]` row into its slot, in place, and `q_rope` into the last columns
    of `q`, in one launch.

    Shapes as in `contract.check_append`. A `latent`, `k_rope` or `q_rope` whose last stride is not 1 is copied first;
    the pool never is. For FP8 rows so is a `latent` not all of whose rows begin at multiples of 16 bytes, and a
    `k_rope` likewise of two columns; a `q` or `q_rope` that cannot be moved by 16 bytes is torch's to copy then. Two
    tokens share a slot only if equal or unread.
    """
    num_rows = call.batch * call.seqlen_q * call.h_kv
    if num_rows == 0:
        return
    if latent.stride(3) != 1:
        latent = latent.contiguous()
    if k_rope.stride(3) != 1:
        k_rope = k_rope.contiguous()
    itemsize = latent.element_size()
    pool, source, rope, columns, q_source = kv_cache.data_ptr(), latent.data_ptr(), k_rope.data_ptr(), 0, 0
    q_bytes = 0
    if q is not None and q_rope is not None:
        q_bytes = call.batch * call.seqlen_q * q.shape[2] * call.qk_rope_head_dim * itemsize
    if q is None or q_rope is None or q.stride(3) != 1 or q_bytes >= MOST_QUERY_BYTES:
        if q is not None and q_rope is not None:
            q[..., call.kv_lora_rank :] = q_rope
        q_bytes = 0
        rest, bits, parts = geometry(call, itemsize, latent.stride(), k_rope.stride(), slots.stride())
    else:
        if q_rope.stride(3) != 1:
            q_rope = q_rope.contiguous()
        rest, bits, parts = geometry(
            call,
            itemsize,
            latent.stride(),
            k_rope.stride(),
            slots.stride(),
            q.shape[2],
            q_rope.stride(),
            q.stride(),
        )
        columns, q_source = q.data_ptr() + call.kv_lora_rank * itemsize, q_rope.data_ptr()
    if call.fp8:
        for_latent, for_rope, for_q = parts
        if (for_latent | source) % ROW_ALIGNMENT:
            latent = latent.clone(memory_format=torch.contiguous_format)
            return append(call, kv_cache, latent, k_rope, slots, q, q_rope)
        if (for_rope | rope) % (2 * itemsize):
            k_rope = k_rope.clone(memory_format=torch.contiguous_format)
            return append(call, kv_cache, latent, k_rope, slots, q, q_rope)
        if q is not None and q_rope is not None and q_bytes and (for_q | columns | q_source) % MAX_UNIT:
            q[..., call.kv_lora_rank :] = q_rope
            return append(call, kv_cache, latent, k_rope, slots)
        unit, name = MAX_UNIT, FP8_KERNELS[call.dtype]
    else:
        bits |= pool | source | rope | columns | q_source
        # The lowest bit that is set: the widest unit, at most 16 bytes, that divides every address, stride and length.
        unit = bits & -bits
        name = KERNELS[unit]
    thread = _thread
    ADDRESSES.pack_into(thread.bytes, 0, pool, source, rope, slots.data_ptr(), q_source, columns)
    thread.bytes[ADDRESSES.size :] = rest
    kernel = driver.function(call.device_index, "append", name)
    grid, threads = _grid(num_rows, q_bytes, unit)
    stream = driver.raw_stream(call.device_index)
    driver.launch(call.device_index, kernel, grid, threads, 0, stream, thread.params)


def _grid(num_rows: int, q_bytes: int, unit: int) -> tuple[tuple[int, int, int], int]:
    """CTAs and threads: a warp per row, a thread per unit of the queries' rotated columns."""
    warps = 1 if num_rows <= FEW_ROWS else WARPS
    return (-(-num_rows // warps) + -(-q_bytes // (unit * 32 * warps)), 1, 1), 32 * warps


def launch_form(
    call: AppendCall,
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    q_rope: torch.Tensor,
) -> tuple[str, tuple[int, int, int], int, bytes] | None:
    """Kernel, grid, threads and parameters (addresses missing) of an append that moves units of 16 bytes, as it is
    whenever latents, rotated keys and rotated queries begin at multiples of 16; None if one of this shape never does.
    """
    itemsize, num_rows = latent.element_size(), call.batch * call.seqlen_q * call.h_kv
    q_bytes = call.batch * call.seqlen_q * q.shape[2] * call.qk_rope_head_dim * itemsize
    if num_rows == 0 or q_bytes >= MOST_QUERY_BYTES:
        return None
    if any(tensor.stride(3) != 1 for tensor in (latent, k_rope, q, q_rope)):
        return None
    strides = (latent.stride(), k_rope.stride(), slots.stride())
    rest, bits, _ = geometry(call, itemsize, *strides, q.shape[2], q_rope.stride(), q.stride())
    if (bits | kv_cache.data_ptr() | (q.data_ptr() + call.kv_lora_rank * itemsize)) % MAX_UNIT:
        return None
    name = FP8_KERNELS[call.dtype] if call.fp8 else KERNELS[MAX_UNIT]
    return name, *_grid(num_rows, q_bytes, MAX_UNIT), bytes(ADDRESSES.size) + rest
