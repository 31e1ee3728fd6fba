"""Portable GPU kernels in Triton: which calls they take, how they are cut into programs, and their launches.

The device code is `triton_kernels.py` and `triton_plan.py`. It runs on any GPU that Triton compiles for, and on a CPU
under TRITON_INTERPRET=1 (set before the first import), which is how it is tested without a GPU. (Over 400 lines: dense
and sparse calls are one launch, whose arguments are most of it.)
"""

from __future__ import annotations

import functools
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..codec import ROW_ALIGNMENT
from ..contract import (
    CUT_COST,
    FIXED_UNITS,
    ITEM_COST,
    LATENT_SHAPES,
    MAX_PARTS,
    MIN_TAKE,
    PLAN_BLOCK,
    PLAN_CANDIDATES,
    AppendCall,
    DecodeCall,
    check_slots,
)
from .equal_lengths import equal_lengths
from .torch import plan_whole

kernels: Any = None
plans: Any = None
INTERPRETED = False
if importlib.util.find_spec("triton") is not None:
    import triton

    from . import triton_kernels as kernels
    from . import triton_plan as plans

    INTERPRETED = not isinstance(kernels.decode_kernel, triton.JITFunction)

__all__ = [
    "INTERPRETED",
    "append",
    "append_refusals",
    "decode",
    "decode_refusals",
    "num_slots",
    "plan",
    "sparse_decode",
]

LOG2_E = math.log2(math.e)
# As `triton_kernels` names them; plain integers, to be at hand without triton.
FORM_PLAIN, FORM_ROWS, FORM_SWAPPED = 0, 1, 2
# First Triton whose compilation of the wgmma forms was looked at.
WGMMA_TRITON = (3, 4)
# What the interpreter pretends to be: enough processors that small cases are cut; Hopper, so that every form runs.
INTERPRETER_SMS = 16
INTERPRETER_HAS_WGMMA = True
# What 32 rows x 32 tokens of FP8 rows take, in bytes: 107,136 with two buffers, 111,616 with three.
FP8_TILE_BYTES = 112 * 1024
# Rows of queries whose rotated columns one program of `append` places.
PLACED_ROWS = 16


@dataclass(frozen=True)
class Device:
    """What a schedule depends on: number of SMs, shared memory of one program in bytes, whether it has wgmma."""

    num_sms: int
    shared_memory: int
    has_wgmma: bool


@dataclass(frozen=True)
class Schedule:
    """How one decode call is cut: tile of rows x tokens, form of the products, warps, stages, programs per SM."""

    block_m: int
    block_n: int
    form: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@functools.cache
def device_of(device_type: str, device_index: int) -> Device:
    """The device's plain numbers, asked for once per process."""
    if device_type != "cuda" or INTERPRETED:
        return Device(INTERPRETER_SMS, 232448, INTERPRETER_HAS_WGMMA)
    properties = torch.cuda.get_device_properties(device_index)
    # ROCm calls its architecture numbers a compute capability too, and has 64 KiB per workgroup.
    if torch.version.hip is not None:
        return Device(properties.multi_processor_count, 65536, False)
    shared_memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    # The forms for wgmma lean on how Triton pipelines; older compilers are not known to do the same.
    recent = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= WGMMA_TRITON
    return Device(properties.multi_processor_count, shared_memory, properties.major == 9 and recent)


def choose_schedule(rows: int, d_qk: int, device: Device, fp8: bool = False) -> Schedule:
    """Tile sizes from plain integers; measured on an H200 (block_n 32 and 64, 4 and 8 warps, 1 to 4 buffers).

    Args:
        rows: query rows that share one latent row.
        d_qk: width of a latent row, in elements of 2 bytes.
        device: see `device_of`.
        fp8: whether the rows are FP8 rows, which become rows of 2-byte elements on their way.
    """
    if device.has_wgmma and rows > 16:
        if rows <= 32:
            return Schedule(32, 64, FORM_SWAPPED, 8, 2, 1)
        # Queries 73,728 B + two tiles of 73,728 B + P 8,192 B = 229,376 of 232,448 B at d_qk 576.
        return Schedule(64, 64, FORM_ROWS, 8, 2, 1)
    block_m = 16 if rows <= 16 else 32
    for block_n, num_warps, num_stages in ((64, 8, 3), (32, 4, 3), (32, 4, 2)):
        # mma.sync: a stage less in shared memory than in flight; 4 KiB for exchanges between warps.
        needed = (block_m + (num_stages - 1) * block_n) * d_qk * 2 + 4096
        if fp8 and block_m == 32:  # the scaled tile passes through shared memory; as Triton 3.9 compiles it
            needed = max(needed, FP8_TILE_BYTES)
        if needed <= device.shared_memory and (block_m == 16 or block_n == 32):
            return Schedule(block_m, block_n, FORM_PLAIN, num_warps, num_stages, 1)
    return Schedule(16, 16, FORM_PLAIN, 4, 2, 1)


def _platform_refusals(device_type: str, dtype: str, on_gpu: tuple[str, ...]) -> list[str]:
    if kernels is None:
        return ["triton is not installed"]
    if INTERPRETED:
        if device_type not in ("cpu", "cuda"):
            return [f"needs a CPU or CUDA tensor, got {device_type}"]
        # The interpreter's tl.dot multiplies the raw bits of bfloat16.
        if dtype not in ("float16", "float32"):
            return [f"the interpreter computes in float16 and float32 only, got {dtype}"]
        return []
    if device_type != "cuda":
        return [
            f"needs a GPU (on a CPU: TRITON_INTERPRET=1 in the environment before Python starts), got {device_type}"
        ]
    if dtype not in on_gpu:
        return [f"takes {' and '.join(on_gpu)}, got {dtype}"]
    return []


def _shape_refusals(call: DecodeCall | AppendCall) -> list[str]:
    reasons = []
    shape = (call.kv_lora_rank, call.qk_rope_head_dim)
    if shape not in LATENT_SHAPES:
        reasons.append(f"takes (kv_lora_rank, qk_rope_head_dim) in {list(LATENT_SHAPES)}, got {shape}")
    if call.block_size % 16 and not (isinstance(call, DecodeCall) and call.sparse):
        reasons.append(f"takes a block_size that 16 divides, got {call.block_size}")
    if call.kv_cache_strides[3] != 1:
        reasons.append(f"needs the last stride of kv_cache to be 1, got {call.kv_cache_strides[3]}")
    if call.fp8 and (call.kv_cache_misalignment or any(stride % 16 for stride in call.kv_cache_strides[:3])):
        reasons.append(
            "needs FP8 rows that begin at multiples of 16 bytes, got strides "
            f"{call.kv_cache_strides} and a pool {call.kv_cache_misalignment} bytes past one"
        )
    return reasons


def decode_refusals(call: DecodeCall) -> list[str]:
    """Reasons against a decode call; empty = accepts."""
    return _platform_refusals(call.device_type, call.dtype, ("bfloat16", "float16")) + _shape_refusals(call)


def append_refusals(call: AppendCall) -> list[str]:
    """Reasons against an append call; empty = accepts. It only moves rows, so it takes every dtype on a GPU."""
    dtypes = ("bfloat16", "float16", "float32", "float64")
    return _platform_refusals(call.device_type, call.dtype, dtypes) + _shape_refusals(call)


def num_slots(call: DecodeCall) -> int:
    """Slots of a split plan: as many programs of a row tile each as run at once, and at least one."""
    device = device_of(call.device_type, call.device_index)
    schedule = choose_schedule(call.rows, call.kv_lora_rank + call.qk_rope_head_dim, device, call.fp8)
    tiles = call.h_kv * -(-call.rows // schedule.block_m)
    return max(1, device.num_sms * schedule.programs_per_sm // tiles)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever device the tensors are on.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def plan(cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal the requests out to slots, in one launch; arguments, results and rule as `backends.torch.plan`.

    Reads device memory only.
    """
    batch = cache_seqlens.shape[0]
    check_slots(batch, num_slots, deterministic)
    rows = num_slots + batch
    items = torch.empty((rows, 4), dtype=torch.int32, device=cache_seqlens.device)
    splits = torch.empty((batch, 2), dtype=torch.int32, device=cache_seqlens.device)
    arguments = (cache_seqlens, items, splits, cache_seqlens.stride(0), batch, num_slots)
    with _on(cache_seqlens.device):
        if deterministic:
            plans.plan_fixed_kernel[(-(-rows // 256),)](
                *arguments, UNIT=PLAN_BLOCK, MAX_PARTS=MAX_PARTS, FIXED_UNITS=FIXED_UNITS, BLOCK=256
            )
        else:
            plans.plan_kernel[(1,)](
                *arguments,
                UNIT=PLAN_BLOCK,
                ITEM_COST=ITEM_COST,
                CUT_COST=CUT_COST,
                MIN_TAKE=MIN_TAKE,
                CANDIDATES=PLAN_CANDIDATES,
                BLOCK=512,
            )
    return items, splits


def _views(kv_cache: torch.Tensor, is_fp8: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool of FP8 rows as bytes, fp32 and int16, all of the same memory; any other pool three times."""
    if not is_fp8:
        return kv_cache, kv_cache, kv_cache
    # Rows of another stride than their length cannot be viewed as wider elements: the kernel has the strides, and
    # wants the address and a type.
    rows = kv_cache.view(torch.uint8)
    first = rows.as_strided((ROW_ALIGNMENT,), (1,)) if rows.numel() else rows.new_empty(ROW_ALIGNMENT)
    return rows, first.view(torch.float32), first.view(torch.int16)


def decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None = None,
    splits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split-KV attention over the pages: one launch, a second one that merges if the plan has slots to cut for.

    Shapes as in `contract.check_decode`; returns as `backends.torch.decode`. A `q` whose last stride is not 1 is
    copied; the pool never is.
    """
    return _launch(call, q, kv_cache, block_table, cache_seqlens, softmax_scale, items, splits, None, None)


def sparse_decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
    wants_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of each query to the rows that it names; arguments and results as `backends.torch.sparse_decode`.

    The kernel of dense decode, every query a request and every row a page. Where the largest score is wanted no query
    is cut (prompts, which have queries enough).
    """
    items = splits = largest = None
    if lengths is not None:  # the kernel trusts lengths as far as the table goes
        lengths = lengths.clamp(max=call.max_blocks)
    elif wants_max:
        lengths = torch.full((call.batch,), call.max_blocks, dtype=torch.int32, device=q.device)
    else:
        lengths, items, splits = equal_lengths(q.device, call.batch, call.max_blocks, num_slots(call), plan)
    if wants_max:
        items, splits = plan_whole(lengths, 1)
        largest = torch.empty((call.batch, call.num_heads, 1), dtype=torch.float32, device=q.device)
    out, lse = _launch(call, q, kv_cache, indices, lengths, softmax_scale, items, splits, attn_sink, largest)
    return out, lse, largest


def _launch(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None,
    splits: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    largest: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=q.device)
    lse = torch.empty((call.batch, call.num_heads, call.seqlen_q), dtype=torch.float32, device=q.device)
    if call.batch == 0:
        return out, lse
    if items is None or splits is None:
        items, splits = plan(cache_seqlens, num_slots(call))
    if q.stride(3) != 1:
        q = q.contiguous()
    device = device_of(call.device_type, call.device_index)
    schedule = choose_schedule(call.rows, call.kv_lora_rank + call.qk_rope_head_dim, device, call.fp8)
    rows_of_plan = items.shape[0]
    slots = rows_of_plan - call.batch
    # Nothing is cut for one slot: the two are never touched, and out and lse stand in for them.
    o_partial, lse_partial = out, lse
    if slots > 1:
        o_partial = torch.empty((2 * slots, *out.shape[1:]), dtype=torch.float32, device=q.device)
        lse_partial = torch.empty((2 * slots, *out.shape[1:3]), dtype=torch.float32, device=q.device)
    row_tiles = -(-call.rows // schedule.block_m)
    tiles = row_tiles * call.h_kv
    rows_of_pool, kv_scales, kv_rope = _views(kv_cache, call.fp8)
    with _on(q.device):
        kernels.decode_kernel[(rows_of_plan * tiles,)](
            q,
            rows_of_pool,
            kv_scales,
            kv_rope,
            block_table,
            cache_seqlens,
            lse if attn_sink is None else attn_sink,
            lse if largest is None else largest,
            items,
            splits,
            out,
            lse,
            o_partial,
            lse_partial,
            *q.stride()[:3],
            kv_cache.stride(0),
            kv_cache.stride(2),
            *block_table.stride(),
            cache_seqlens.stride(0),
            softmax_scale * LOG2_E,
            call.seqlen_q,
            call.num_heads,
            call.num_heads // call.h_kv,
            row_tiles,
            tiles,
            slots,
            call.block_size,
            min(call.num_blocks * call.block_size, 2**31 - 1),
            KV_STRIDE_TOKEN=kv_cache.stride(1),
            CAUSAL=call.causal and call.seqlen_q > 1,
            KV_LORA_RANK=call.kv_lora_rank,
            QK_ROPE_HEAD_DIM=call.qk_rope_head_dim,
            BLOCK_M=schedule.block_m,
            BLOCK_N=schedule.block_n,
            ONE_PAGE=not call.sparse and call.block_size % schedule.block_n == 0,
            UNIT=PLAN_BLOCK,
            FORM=schedule.form,
            FP8=call.fp8,
            SPARSE=call.sparse,
            HAS_SINKS=attn_sink is not None,
            WANTS_MAX=largest is not None,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )
        if slots > 1:
            rows = call.seqlen_q * call.num_heads
            # Few rows: many small programs, for latency. Many: whole rows, so that unsplit requests cost few programs.
            few = call.batch * rows <= 1024
            block_rows, block_d = (1, 128) if few else (4, call.kv_lora_rank)
            # All parts of a request in flight at once, if the registers last.
            block_parts = min(64, triton.next_power_of_2(-(-slots // call.batch))) if few else 2
            grid = (call.batch * -(-rows // block_rows) * (call.kv_lora_rank // block_d),)
            kernels.merge_kernel[grid](
                splits,
                out,
                lse,
                o_partial,
                lse_partial,
                lse if attn_sink is None else attn_sink,
                call.seqlen_q,
                call.num_heads,
                slots,
                HAS_SINKS=attn_sink is not None,
                KV_LORA_RANK=call.kv_lora_rank,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                BLOCK_PARTS=block_parts,
                num_warps=4,
            )
    return out, lse


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

    Shapes as in `contract.check_append`. Two tokens share a slot only if equal or unread.
    """
    num_rows = call.batch * call.seqlen_q * call.h_kv
    if num_rows == 0:
        return
    block_rows = 1 if num_rows <= 1024 else 8
    places = q is not None and q_rope is not None
    # Nothing to place: the pool stands in for both and no program reaches them.
    target, source = (q, q_rope) if q is not None and q_rope is not None else (kv_cache, kv_cache)
    num_heads = target.shape[2] if places else 1
    q_programs = -(-call.batch * call.seqlen_q * num_heads // PLACED_ROWS) if places else 0
    append_programs = -(-num_rows // block_rows)
    rows_of_pool, kv_scales, kv_rope = _views(kv_cache, call.fp8)
    with _on(kv_cache.device):
        kernels.append_kernel[(append_programs + q_programs,)](
            rows_of_pool,
            kv_scales,
            kv_rope,
            latent,
            k_rope,
            slots,
            target,
            source,
            *kv_cache.stride()[:3],
            *latent.stride(),
            *k_rope.stride(),
            *slots.stride(),
            *target.stride(),
            *source.stride(),
            num_rows,
            call.batch * call.seqlen_q * num_heads,
            append_programs,
            call.seqlen_q,
            call.h_kv,
            num_heads,
            call.block_size,
            KV_LORA_RANK=call.kv_lora_rank,
            QK_ROPE_HEAD_DIM=call.qk_rope_head_dim,
            BLOCK_ROWS=block_rows,
            PLACED_ROWS=PLACED_ROWS,
            FP8=call.fp8,
            num_warps=1 if block_rows == 1 else 4,
        )
