"""What a valid call is: shapes, dtypes and devices, checked before any backend sees a tensor.

A call that passes is described by plain integers (`DecodeCall`, `AppendCall`), so that a backend's list of refusals
and its choice of schedule can be tested without a GPU. Values in device memory (lengths, table entries, slots) are not
looked at here: reading them would make the host wait for the device. `PagedLatentCache.validate()` does that on demand.
(Over 400 lines: the checks of all ops read side by side, in the same words.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codec import row_layout

__all__ = [
    "CUT_COST",
    "FIXED_UNITS",
    "ITEM_COST",
    "LATENT_SHAPES",
    "MAX_PARTS",
    "MIN_TAKE",
    "PLAN_BLOCK",
    "PLAN_CANDIDATES",
    "PLAN_WHOLE",
    "AppendCall",
    "DecodeCall",
    "UnsupportedError",
    "check_append",
    "check_decode",
    "check_plan",
    "check_slots",
    "check_sparse",
    "fixed_slots",
    "no_backend_message",
]

# (kv_lora_rank, qk_rope_head_dim) of the published MLA models: what a compiled or portable kernel is built for.
LATENT_SHAPES = ((512, 64), (256, 64), (256, 32), (128, 32))

# --- the split plan (layout and rule: `backends.torch.plan`) ----------------------------------------------------------

# Tokens in one unit of the split plan. A part of a request is a whole number of units whatever the page size, so a plan
# made for one page size holds for every other.
PLAN_BLOCK = 64
# Cut points are fractions of a request in units of 2^-30. ceil(b * 2^30 / d) stands for b of d units; a kernel takes
# d * ceil(b * 2^30 / d) >> 30 units: that is b again, as rounding up adds less than d / 2^30 of a unit and d <= 2^25
# (2^31 tokens). The product reaches 2^55: 64 bits, not 32.
PLAN_WHOLE = 2**30

# What a piece of work costs a slot beyond its units, in units: one is 64 rows of 1152 B = 73,728 B of the cache, about
# 2 us of one H200 SM's share of the memory. Beginning an item fills a pipeline and drains it; a piece of a request that
# was cut writes its rows besides (64 rows x 512 columns: 67 KB in fp16, twice that in the portable kernel's fp32), and
# somebody reads them back. Measured on an H200: 3/2 is level with this, 2/2, 2/1 and 1/1 are 10% slower at batch 128 x
# 2 queries of ragged lengths; at three other shapes all are within 4%.
ITEM_COST = 4
CUT_COST = 3
# Units in the smallest piece that a request is cut for. At most CUT_COST + 1: see PLAN_CANDIDATES.
MIN_TAKE = 1
# Capacities of a slot that the plan tries, one unit apart, from an even share of the work on. Going on to the next slot
# loses ITEM_COST + CUT_COST + MIN_TAKE - 1 units of room that is too small to cut for, or costs a cut, ITEM_COST +
# 2 * CUT_COST: so an even share and ITEM_COST + 2 * CUT_COST more always suffices, and the candidates must reach that
# far. They are the lanes of one warp.
PLAN_CANDIDATES = 32

# deterministic=True: a request is cut by its own length alone, into equal parts of at least about FIXED_UNITS units
# (2048 tokens), so that its result has the same bits in any batch.
MAX_PARTS = 8
FIXED_UNITS = 32

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# How a pool of FP8 rows may be typed: its bytes are of several types.
FP8_ROW_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


class UnsupportedError(ValueError):
    """A valid call that no backend (or not the one asked for) can run here. The message lists the reasons."""


@dataclass(frozen=True)
class DecodeCall:
    """A decode call in plain values; strides are in elements, `capability` is None off CUDA."""

    device_type: str
    device_index: int
    capability: tuple[int, int] | None
    dtype: str
    batch: int
    seqlen_q: int
    num_heads: int
    h_kv: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    num_blocks: int
    block_size: int
    max_blocks: int
    q_strides: tuple[int, ...]
    kv_cache_strides: tuple[int, ...]
    block_table_strides: tuple[int, ...]
    causal: bool
    kv_cache_misalignment: int = 0  # bytes past the last multiple of 16
    deterministic: bool = False  # the plan that comes with it cuts each request by its own length alone
    fp8: bool = False  # rows as `codec.py` describes them: strides of kv_cache are in bytes then
    sparse: bool = False  # each query reads the `max_blocks` rows that it names: a request is a query
    wants_max: bool = False  # sparse: the largest score too

    @property
    def rows(self) -> int:
        """Query rows that share one latent row: seqlen_q * num_heads / h_kv."""
        return self.seqlen_q * self.num_heads // self.h_kv


@dataclass(frozen=True)
class AppendCall:
    """An append call in plain values; strides are in elements, `dtype` is that of what comes."""

    device_type: str
    device_index: int
    capability: tuple[int, int] | None
    dtype: str
    batch: int
    seqlen_q: int
    h_kv: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    num_blocks: int
    block_size: int
    kv_cache_strides: tuple[int, ...]
    kv_cache_misalignment: int = 0  # bytes past the last multiple of 16
    fp8: bool = False  # rows as `codec.py` describes them: strides of kv_cache are in bytes then


def describe(tensor: object) -> str:
    """Dtype, shape and device of what came, for the end of an error message."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _fail(function: str, argument: str, must: str, came: object) -> ValueError:
    return ValueError(f"flash_mla.{function}: {argument} must be {must}, got {describe(came)}")


def _capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(tensor.device) if tensor.device.type == "cuda" else None


def _misalignment(tensor: torch.Tensor) -> int:
    """Bytes past a multiple of 16; 0 in a trace, where tensors have no address: the op looks again when it runs."""
    if torch.compiler.is_compiling():
        return 0
    return tensor.data_ptr() % 16


def _check_pool(function: str, kv_cache: torch.Tensor) -> bool:
    """Raise ValueError unless it is a pool of rows; return whether they are FP8 rows."""
    if not isinstance(kv_cache, torch.Tensor) or kv_cache.ndim != 4 or 0 in kv_cache.shape[1:]:
        raise _fail(function, "kv_cache", "[num_blocks, block_size, h_kv, d_qk]", kv_cache)
    if kv_cache.dtype not in (*FLOAT_DTYPES, *FP8_ROW_DTYPES):
        raise _fail(function, "kv_cache", "bfloat16, float16, float32, float64 or FP8 rows as uint8", kv_cache)
    return kv_cache.dtype in FP8_ROW_DTYPES


def _row_width(function: str, kv_cache: torch.Tensor, is_fp8: bool, kv_lora_rank: int, d_qk: int) -> int:
    """Elements of a row of the pool for latents of this shape; raises ValueError where FP8 rows cannot hold them."""
    if not is_fp8:
        return d_qk
    try:
        row_bytes = row_layout(kv_lora_rank, d_qk - kv_lora_rank).row_bytes
    except ValueError as error:
        raise ValueError(f"flash_mla.{function}: {str(error).removeprefix('flash_mla: ')}") from None
    if kv_cache.shape[3] != row_bytes:
        must = f"of FP8 rows of {row_bytes} bytes for ({kv_lora_rank}, {d_qk - kv_lora_rank}) columns"
        raise _fail(function, "kv_cache", must, kv_cache)
    return row_bytes


def _check_query(q: torch.Tensor, kv_cache: torch.Tensor, kv_lora_rank: int, function: str) -> bool:
    """Raise ValueError unless queries and pool fit together; return whether its rows are FP8 rows."""
    is_fp8 = _check_pool(function, kv_cache)
    h_kv = kv_cache.shape[2]
    width = "d_qk" if is_fp8 else f"d_qk={kv_cache.shape[3]}"
    if (
        not isinstance(q, torch.Tensor)
        or q.ndim != 4
        or q.shape[1] < 1
        or (not is_fp8 and q.shape[3] != kv_cache.shape[3])
    ):
        raise _fail(function, "q", f"[batch, seqlen_q >= 1, num_heads, {width}]", q)
    num_heads, d_qk = q.shape[2:]
    if is_fp8 and (q.dtype not in FLOAT_DTYPES or q.device != kv_cache.device):
        raise _fail(function, "q", f"bfloat16, float16, float32 or float64 on {kv_cache.device} like kv_cache", q)
    if not is_fp8 and (q.dtype != kv_cache.dtype or q.device != kv_cache.device):
        raise _fail(function, "q", f"{kv_cache.dtype} on {kv_cache.device} like kv_cache", q)
    if num_heads < 1 or num_heads % h_kv:
        raise _fail(function, "q", f"of a number of heads that h_kv={h_kv} divides", q)
    if not isinstance(kv_lora_rank, int) or not 0 < kv_lora_rank <= d_qk:
        raise ValueError(f"flash_mla.{function}: kv_lora_rank must be in 1..d_qk={d_qk}, got {kv_lora_rank!r}")
    _row_width(function, kv_cache, is_fp8, kv_lora_rank, d_qk)
    return is_fp8


def check_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    kv_lora_rank: int,
    causal: bool,
    function: str = "decode",
    deterministic: bool = False,
) -> DecodeCall:
    """Raise ValueError unless the arguments fit together; return the call in plain values.

    Args:
        q: `[batch, seqlen_q, num_heads, d_qk]`, bfloat16, float16, float32 or float64; outer strides free.
        kv_cache: `[num_blocks, block_size, h_kv, d_qk]`, dtype and device of `q`; or FP8 rows, uint8 `[num_blocks,
            block_size, h_kv, row_bytes]` (`codec.py`).
        block_table: int32 `[batch, max_blocks]` on the same device.
        cache_seqlens: int32 `[batch]` on the same device.
        kv_lora_rank: columns of a latent that are the value too, in elements.
        causal: whether query j of a request sees only keys before `len - (seqlen_q - 1 - j)`.
        function: the name that error messages carry.
        deterministic: whether the plan that comes with the call cuts each request by its own length alone.
    """
    is_fp8 = _check_query(q, kv_cache, kv_lora_rank, function)
    batch, seqlen_q, num_heads, d_qk = q.shape
    num_blocks, block_size, h_kv, _ = kv_cache.shape
    if (
        not isinstance(block_table, torch.Tensor)
        or block_table.dtype != torch.int32
        or block_table.ndim != 2
        or block_table.shape[0] != batch
        or block_table.device != q.device
    ):
        raise _fail(function, "block_table", f"int32 [batch={batch}, max_blocks] on {q.device}", block_table)
    if (
        not isinstance(cache_seqlens, torch.Tensor)
        or cache_seqlens.dtype != torch.int32
        or cache_seqlens.shape != (batch,)
        or cache_seqlens.device != q.device
    ):
        raise _fail(function, "cache_seqlens", f"int32 [batch={batch}] on {q.device}", cache_seqlens)
    return DecodeCall(
        device_type=q.device.type,
        device_index=q.device.index or 0,
        capability=_capability(q),
        dtype=str(q.dtype).removeprefix("torch."),
        batch=batch,
        seqlen_q=seqlen_q,
        num_heads=num_heads,
        h_kv=h_kv,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=d_qk - kv_lora_rank,
        num_blocks=num_blocks,
        block_size=block_size,
        max_blocks=block_table.shape[1],
        q_strides=q.stride(),
        kv_cache_strides=kv_cache.stride(),
        block_table_strides=block_table.stride(),
        causal=causal,
        kv_cache_misalignment=_misalignment(kv_cache),
        deterministic=deterministic,
        fp8=is_fp8,
    )


def check_sparse(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    function: str = "sparse_decode",
    wants_max: bool = False,
) -> DecodeCall:
    """Raise ValueError unless the arguments fit together; return the call in plain values, every query a request.

    Args:
        q: `[batch, seqlen_q, num_heads, d_qk]`, bfloat16, float16, float32 or float64; outer strides free.
        kv_cache: as in `check_decode`, with h_kv = 1.
        indices: int32 `[batch, seqlen_q, topk]` on the same device, block * block_size + offset; negative: no token.
        kv_lora_rank: columns of a latent that are the value too, in elements.
        attn_sink: float32 `[num_heads]` on the same device, or None.
        topk_length: int32 `[batch]` on the same device, how many of the first indices count; None: all.
        function: the name that error messages carry.
        wants_max: whether the largest score is wanted too.
    """
    is_fp8 = _check_query(q, kv_cache, kv_lora_rank, function)
    batch, seqlen_q, num_heads, d_qk = q.shape
    num_blocks, block_size, h_kv, _ = kv_cache.shape
    if h_kv != 1:
        raise _fail(function, "kv_cache", "of one latent head (h_kv=1) with indices", kv_cache)

    def fits(tensor: object, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.dtype == dtype
            and tensor.shape[: len(shape)] == shape
            and tensor.device == q.device
        )

    if not fits(indices, torch.int32, (batch, seqlen_q)) or indices.ndim != 3:
        raise _fail(function, "indices", f"int32 [batch={batch}, seqlen_q={seqlen_q}, topk] on {q.device}", indices)
    if attn_sink is not None and not (fits(attn_sink, torch.float32, (num_heads,)) and attn_sink.ndim == 1):
        raise _fail(function, "attn_sink", f"float32 [num_heads={num_heads}] on {q.device}", attn_sink)
    if topk_length is not None and not (fits(topk_length, torch.int32, (batch,)) and topk_length.ndim == 1):
        raise _fail(function, "topk_length", f"int32 [batch={batch}] on {q.device}", topk_length)
    topk = indices.shape[2]
    return DecodeCall(
        device_type=q.device.type,
        device_index=q.device.index or 0,
        capability=_capability(q),
        dtype=str(q.dtype).removeprefix("torch."),
        batch=batch * seqlen_q,
        seqlen_q=1,
        num_heads=num_heads,
        h_kv=1,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=d_qk - kv_lora_rank,
        num_blocks=num_blocks,
        block_size=block_size,
        max_blocks=topk,
        q_strides=q.stride(),
        kv_cache_strides=kv_cache.stride(),
        block_table_strides=(topk, 1),
        causal=False,
        kv_cache_misalignment=_misalignment(kv_cache),
        fp8=is_fp8,
        sparse=True,
        wants_max=wants_max,
    )


def _check_placed(function: str, q: object, q_rope: object, latent: torch.Tensor, d_qk: int) -> None:
    batch, seqlen_q, _, kv_lora_rank = latent.shape
    where = f"{latent.dtype} on {latent.device} like latent"
    if not isinstance(q, torch.Tensor) or q.ndim != 4 or (*q.shape[:2], q.shape[3]) != (batch, seqlen_q, d_qk):
        raise _fail(function, "q", f"[batch={batch}, seqlen_q={seqlen_q}, num_heads, d_qk={d_qk}] with q_rope", q)
    if not isinstance(q_rope, torch.Tensor) or q_rope.shape != (*q.shape[:3], d_qk - kv_lora_rank):
        raise _fail(function, "q_rope", f"[*q.shape[:3]={[*q.shape[:3]]}, {d_qk - kv_lora_rank}] with q", q_rope)
    for name, tensor in (("q", q), ("q_rope", q_rope)):
        if tensor.dtype != latent.dtype or tensor.device != latent.device:
            raise _fail(function, name, where, tensor)


def check_append(
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    function: str = "append",
) -> AppendCall:
    """Raise ValueError unless the arguments fit together; return the call in plain values.

    Args:
        kv_cache: `[num_blocks, block_size, h_kv, d_qk]`, rows contiguous enough to be addressed by slot; or FP8 rows,
            uint8 `[num_blocks, block_size, h_kv, row_bytes]`, which take every floating dtype.
        latent: `[batch, seqlen_q, h_kv, kv_lora_rank]`, dtype and device of `kv_cache`; strides free.
        k_rope: `[batch, seqlen_q, h_kv, qk_rope_head_dim]`, the same.
        slots: int64 `[batch, seqlen_q]`, block * block_size + offset.
        q: `[batch, seqlen_q, num_heads, d_qk]`, dtype and device of `latent`, or None.
        q_rope: `[batch, seqlen_q, num_heads, qk_rope_head_dim]`, the same; None exactly if `q` is.
        function: the name that error messages carry.
    """
    is_fp8 = _check_pool(function, kv_cache)
    num_blocks, block_size, h_kv, d_qk = kv_cache.shape
    if not isinstance(latent, torch.Tensor) or latent.ndim != 4 or latent.shape[2] != h_kv:
        raise _fail(function, "latent", f"[batch, seqlen_q, h_kv={h_kv}, kv_lora_rank]", latent)
    batch, seqlen_q, _, kv_lora_rank = latent.shape
    if is_fp8:
        if not isinstance(k_rope, torch.Tensor) or k_rope.shape[:-1] != (batch, seqlen_q, h_kv):
            must = f"[batch={batch}, seqlen_q={seqlen_q}, h_kv={h_kv}, qk_rope_head_dim]"
            raise _fail(function, "k_rope", must, k_rope)
        d_qk = kv_lora_rank + k_rope.shape[-1]
        _row_width(function, kv_cache, is_fp8, kv_lora_rank, d_qk)
    qk_rope_head_dim = d_qk - kv_lora_rank
    if not isinstance(k_rope, torch.Tensor) or k_rope.shape != (batch, seqlen_q, h_kv, qk_rope_head_dim):
        must = f"[batch={batch}, seqlen_q={seqlen_q}, h_kv={h_kv}, d_qk - kv_lora_rank = {qk_rope_head_dim}]"
        raise _fail(function, "k_rope", must, k_rope)
    dtypes = FLOAT_DTYPES if is_fp8 else (kv_cache.dtype,)
    for name, tensor in (("latent", latent), ("k_rope", k_rope)):
        if tensor.dtype not in dtypes or tensor.device != kv_cache.device:
            must = "bfloat16, float16, float32 or float64" if is_fp8 else str(kv_cache.dtype)
            raise _fail(function, name, f"{must} on {kv_cache.device} like kv_cache", tensor)
    if k_rope.dtype != latent.dtype:
        raise _fail(function, "k_rope", f"{latent.dtype} like latent", k_rope)
    if (
        not isinstance(slots, torch.Tensor)
        or slots.dtype != torch.int64
        or slots.shape != (batch, seqlen_q)
        or slots.device != kv_cache.device
    ):
        raise _fail(function, "slots", f"int64 [batch={batch}, seqlen_q={seqlen_q}] on {kv_cache.device}", slots)
    if q is not None or q_rope is not None:
        _check_placed(function, q, q_rope, latent, d_qk)
    return AppendCall(
        device_type=kv_cache.device.type,
        device_index=kv_cache.device.index or 0,
        capability=_capability(kv_cache),
        dtype=str(latent.dtype).removeprefix("torch."),
        batch=batch,
        seqlen_q=seqlen_q,
        h_kv=h_kv,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_cache_strides=kv_cache.stride(),
        kv_cache_misalignment=_misalignment(kv_cache),
        fp8=is_fp8,
    )


def check_plan(call: DecodeCall, items: torch.Tensor, splits: torch.Tensor, function: str = "decode") -> None:
    """Raise ValueError unless a split plan has the layout of `ops.plan_splits` for this batch.

    Args:
        call: the decode call that is to use the plan.
        items: int32 `[num_slots + batch, 4]`, num_slots >= 1: request, begin, end, next.
        splits: int32 `[batch, 2]`: slot of a request's first part, number of its parts.
        function: the name that error messages carry.
    """
    if (
        items.dtype != torch.int32
        or items.ndim != 2
        or items.shape[1] != 4
        or items.shape[0] <= call.batch
        or not items.is_contiguous()
    ):
        must = f"contiguous int32 [num_slots + batch, 4] with num_slots >= 1 and batch={call.batch}"
        raise _fail(function, "plan items", must, items)
    if splits.dtype != torch.int32 or splits.shape != (call.batch, 2) or not splits.is_contiguous():
        raise _fail(function, "plan splits", f"contiguous int32 [batch={call.batch}, 2]", splits)
    for name, tensor in (("plan items", items), ("plan splits", splits)):
        if (tensor.device.type, tensor.device.index or 0) != (call.device_type, call.device_index):
            raise _fail(function, name, f"on {call.device_type}:{call.device_index} like q", tensor)
        if _misalignment(tensor):  # a row of items is one load of 16 bytes
            raise ValueError(
                f"flash_mla.{function}: {name} must begin at a multiple of 16 bytes, "
                f"it is {_misalignment(tensor)} past one"
            )


def check_slots(batch: int, num_slots: int, deterministic: bool) -> None:
    """Raise ValueError unless a plan for `batch` requests can be made for that many slots."""
    least = fixed_slots(batch) if deterministic else 1
    if not isinstance(num_slots, int) or num_slots < least:
        why = f" (batch={batch}, deterministic)" if deterministic else ""
        raise ValueError(f"flash_mla.plan: num_slots must be >= {least}{why}, got {num_slots!r}")


def fixed_slots(batch: int) -> int:
    """Slots of a deterministic plan: MAX_PARTS per request, and at least one."""
    return max(1, batch * MAX_PARTS)


def no_backend_message(function: str, reasons: dict[str, list[str]]) -> str:
    """The text of an UnsupportedError: each backend with its reasons, one line each."""
    width = max(map(len, reasons)) + 1
    lines = [f"  {name + ':':<{width}} {'; '.join(why)}" for name, why in reasons.items()]
    return "\n".join([f"flash_mla.{function}: no backend accepts this call", *lines])
