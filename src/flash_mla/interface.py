"""DeepSeek FlashMLA's own two functions for decode: all three generations of their signatures.

| generation | `get_mla_metadata` | returns | `num_splits` |
|---|---|---|---|
| 1 (Feb 2025) | `(cache_seqlens, num_heads_per_head_k, num_heads_k)` | two int32 tensors | tensor |
| 2 (Sep 2025) | the same and `num_heads_q, is_fp8_kvcache, topk` | two int32 tensors | tensor |
| 3 (Jan 2026) | `()` | a metadata object, planned inside the first call, and None | None |

A plan names fractions of a request and the tokens follow from the live lengths, so one that is older than the lengths
costs balance and never a token. Sparse attention needs no plan and does not look at one. (`flash_mla_sparse_fwd`, the
third function, and all that is beyond dense attention is in `sparse_interface.py`.)
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import ops
from .contract import DecodeCall, check_decode, check_plan, describe
from .sparse_interface import NamedRows, attend_to_named, check_options, in_upstream_words, with_sink

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

_METADATA, _KVCACHE = "flash_mla.get_mla_metadata", "flash_mla.flash_mla_with_kvcache"


class FlashMLASchedMeta:
    """What generation 3 passes around instead of tensors: empty until the first call that uses it has succeeded.

    One object serves all layers of a step, on any number of devices, and later steps too; a new one per step keeps the
    parts balanced. It belongs to one (batch, seqlen_q, num_heads, h_kv). A plan made inside a CUDA graph capture is
    part of that graph (each replay plans again) and is used nowhere else; a plan made outside is not used in a capture.

    A call with `indices` needs no plan: it takes an object in any state and leaves it as it is, for dense calls of any
    shape before and after. Dense calls over FP8 rows and over others share a plan.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, int, int, int] | None = None
        # Per device: the plan of eager calls, and the plan of the latest capture with the capture's id.
        self._eager: dict[torch.device, ops.SplitPlan] = {}
        self._captured: dict[torch.device, tuple[int, ops.SplitPlan]] = {}

    def __repr__(self) -> str:
        if self._shape is None:
            return "FlashMLASchedMeta(not planned yet)"
        names = ("batch", "seqlen_q", "num_heads", "h_kv")
        return f"FlashMLASchedMeta({', '.join(f'{n}={v}' for n, v in zip(names, self._shape, strict=True))})"

    def _check(self, call: DecodeCall) -> None:
        came = (call.batch, call.seqlen_q, call.num_heads, call.h_kv)
        if self._shape is not None and self._shape != came:
            raise ValueError(
                f"{_KVCACHE}: tile_scheduler_metadata was first used with (batch, seqlen_q, num_heads, h_kv) = "
                f"{self._shape}, got {came}; get_mla_metadata() makes another"
            )

    def _plan(self, device: torch.device, capture: int | None) -> ops.SplitPlan | None:
        if capture is None:
            return self._eager.get(device)
        made_in, plan = self._captured.get(device, (None, None))
        return plan if made_in == capture else None

    def _keep(self, call: DecodeCall, device: torch.device, capture: int | None, plan: ops.SplitPlan) -> None:
        self._shape = (call.batch, call.seqlen_q, call.num_heads, call.h_kv)
        if capture is None:
            self._eager[device] = plan
        elif capture != UNKNOWN_CAPTURE:
            self._captured[device] = (capture, plan)


# Capture under way whose identity the driver does not tell: such a plan serves one call.
UNKNOWN_CAPTURE = -1


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuStreamGetCaptureInfo_v2.restype = ctypes.c_int
    except (OSError, AttributeError):  # ROCm, or a driver without the entry point
        return None
    return driver


def _capture_id(device: torch.device) -> int | None:
    """Number of the CUDA graph capture that the current stream is in; None outside a capture.

    The number tells one capture from the next, which `torch.cuda.is_current_stream_capturing` does not: what one
    capture computed holds nothing yet when another one reads it.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            return None
        driver = _driver()
        if driver is None:
            return UNKNOWN_CAPTURE
        status, number = ctypes.c_int(), ctypes.c_uint64()
        # cuStreamGetCaptureInfo_v2(stream, status*, id*, graph*, dependencies*, num_dependencies*); the last three may
        # be null. Status 1 = capturing. Source: CUDA driver API, stream management.
        error = driver.cuStreamGetCaptureInfo_v2(
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
            ctypes.byref(status),
            ctypes.byref(number),
            None,
            None,
            None,
        )
    return number.value if error == 0 and status.value == 1 else UNKNOWN_CAPTURE


@dataclass(frozen=True, eq=False)
class _MadeFor:
    """What a pair of metadata tensors was made for; `num_heads` is None where the caller did not say."""

    batch: int
    rows: int
    h_kv: int
    num_heads: int | None


# By identity of either tensor of a pair, as long as it lives. A copy or a slice is not known here: of such tensors only
# the layout is checked.
_made_for: WeakIdKeyDictionary = WeakIdKeyDictionary()


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_q_tokens_per_head_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[FlashMLASchedMeta, None]:
    """Plan how the requests of one step are cut into parts: the first half of FlashMLA's interface.

    Args: none for a metadata object that the first `flash_mla_with_kvcache` fills; else, as generations 1 and 2,
        cache_seqlens: int32 `[batch]`, tokens in the cache including the new ones.
        num_heads_per_head_k: seqlen_q * num_heads // h_kv, query rows that share one row of the cache.
        num_heads_k: h_kv.
        num_heads_q: num_heads, or None when it is not known yet.
        is_fp8_kvcache: whether the cache is of FP8 rows; a plan is the same for both.
        topk: indices per query in sparse attention, which needs no plan: what is returned serves dense calls too.
        num_q_tokens_per_head_k: the name that generation 2 gives to `num_heads_per_head_k`.
    Returns: `(metadata, None)`, or int32 tensors `(tile_scheduler_metadata [num_slots + batch, 4], num_splits
        [batch, 2])`: the two of `ops.SplitPlan`, to be passed on as they are. FlashMLA's own have other shapes.
    Raises: ValueError: wrong arguments.
    The result may be reused for all layers of a step and for later steps, whose lengths may differ. Reads device memory
    only; no host sync.
    """
    if num_heads_per_head_k is not None and num_q_tokens_per_head_k is not None:
        raise ValueError(f"{_METADATA}: num_heads_per_head_k and num_q_tokens_per_head_k are the same, got both")
    rows = num_heads_per_head_k if num_q_tokens_per_head_k is None else num_q_tokens_per_head_k
    if topk is not None and (not isinstance(topk, int) or topk < 1):
        raise ValueError(f"{_METADATA}: topk must be None or >= 1, got {topk!r}")
    if cache_seqlens is None:
        if not (rows is None and num_heads_k is None and num_heads_q is None):
            raise ValueError(f"{_METADATA}: cache_seqlens must be given together with the head counts, got None")
        return FlashMLASchedMeta(), None
    if not isinstance(cache_seqlens, torch.Tensor) or cache_seqlens.dtype != torch.int32 or cache_seqlens.ndim != 1:
        raise ValueError(f"{_METADATA}: cache_seqlens must be int32 [batch], got {describe(cache_seqlens)}")
    if not isinstance(rows, int) or rows < 1 or not isinstance(num_heads_k, int) or num_heads_k < 1:
        raise ValueError(
            f"{_METADATA}: num_heads_per_head_k and num_heads_k must be integers >= 1, got {rows!r} and {num_heads_k!r}"
        )
    # How the rows divide into queries and heads does not change the parts: generation 1 does not say, and need not.
    num_heads = rows * num_heads_k
    if num_heads_q is not None and (
        not isinstance(num_heads_q, int) or num_heads_q < 1 or num_heads_q % num_heads_k or num_heads % num_heads_q
    ):
        raise ValueError(
            f"{_METADATA}: num_heads_q must be a multiple of num_heads_k={num_heads_k} and divide "
            f"num_heads_per_head_k * num_heads_k = {num_heads}, got {num_heads_q!r}"
        )
    plan = ops.plan_splits_for(cache_seqlens, seqlen_q=1, num_heads=num_heads, h_kv=num_heads_k)
    if not torch.compiler.is_compiling():
        _made_for[plan.items] = _made_for[plan.splits] = _MadeFor(plan.batch, rows, num_heads_k, num_heads_q)
    return plan.items, plan.splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | FlashMLASchedMeta | None = None,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few new queries over a paged latent cache: the second half of FlashMLA's interface.

    Dense mode, without `indices`: each query sees its request's tokens. Sparse mode, with: the rows that it names.

    Args:
        q: `[batch, seqlen_q, num_heads, d_qk]`, bf16/fp16 (torch backend: fp32/fp64 too). Outer strides free.
        k_cache: `[num_blocks, block_size, h_kv, d_qk]`, dtype of `q`; V is the first `head_dim_v` columns. Any page
            size. Outer strides free. With `is_fp8_kvcache` uint8, int8 or float8_e4m3fn `[num_blocks, block_size, h_kv,
            row_bytes]`: 656 bytes for (512, 64) columns (`flash_mla.codec`). h_kv = 1 in sparse mode.
        block_table: int32 `[batch, max_blocks]`; entries past the length are not read. Unused in sparse mode.
        cache_seqlens: int32 `[batch]`, tokens in the cache including the new ones; 0 is allowed. Unused in sparse mode.
        head_dim_v: columns of the value, in elements (512 in DeepSeek's models).
        tile_scheduler_metadata, num_splits: the two results of `get_mla_metadata`, or None to plan inside. They may be
            older than the lengths. Values of metadata tensors are not checked (that would make the host wait). Sparse
            mode takes them and needs none.
        softmax_scale: multiplier of the scores before softmax; None is `d_qk**-0.5` as in FlashMLA, which is wrong for
            a real model (DeepSeek-V3: 192**-0.5 times YaRN's factor).
        causal: query j sees keys before `len - (seqlen_q - 1 - j)` (bottom-right aligned). No effect at seqlen_q = 1.
            False in sparse mode.
        is_fp8_kvcache: whether the caches are of FP8 rows.
        indices: int32 `[batch, seqlen_q, topk]`, block * block_size + offset of each visible row. Negative, or outside
            the pool: no token (`FLASH_MLA_DEBUG=1` refuses the latter). A row named twice counts twice. Any topk.
        attn_sink: fp32 `[num_heads]`, natural log, in both modes: one more entry in the softmax of each head, without a
            value: `out` is multiplied by exp(lse) / (exp(lse) + exp(sink)), `lse` is without it.
        extra_k_cache, extra_indices_in_kvcache: a second cache of the same rows (its pages may have another size), and
            int32 `[batch, seqlen_q, extra_topk]` that name rows of it: attended in addition, in sparse mode.
        topk_length, extra_topk_length: int32 `[batch]`, how many of the first indices count; None: all.
    Returns: out `[batch, seqlen_q, num_heads, head_dim_v]`, dtype of `q`, 0 where nothing is visible; lse
        `[batch, num_heads, seqlen_q]`, fp32 (fp64 for fp64), natural log, +inf where nothing is visible.
    Raises: ValueError: wrong shapes, dtypes or devices, or, in dense mode, metadata made for another batch or head
        shape. UnsupportedError: no backend accepts; lists each with its reasons.
    No host sync; capturable in a CUDA graph. Under `torch.compile` a metadata object is left alone and each call plans.
    """
    extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    check_options(q, k_cache, causal, is_fp8_kvcache, indices, attn_sink, extra, topk_length)
    _check_metadata(tile_scheduler_metadata, num_splits)
    if not isinstance(softmax_scale, (int, float, type(None))):
        raise ValueError(f"{_KVCACHE}: softmax_scale must be a number or None, got {describe(softmax_scale)}")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if indices is not None:
        parts = [NamedRows(k_cache, indices, topk_length, is_extra=False)]
        if extra_k_cache is not None and extra_indices_in_kvcache is not None:
            parts.append(NamedRows(extra_k_cache, extra_indices_in_kvcache, extra_topk_length, is_extra=True))
        return attend_to_named(q, parts, head_dim_v, scale, attn_sink)
    if block_table is None or cache_seqlens is None:
        raise ValueError(f"{_KVCACHE}: block_table and cache_seqlens must be int32 tensors in dense mode, got None")
    out, lse = _dense(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, scale, causal
    )
    return (out if attn_sink is None else with_sink(out, lse, attn_sink).to(q.dtype)), lse


def _dense(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    metadata: torch.Tensor | FlashMLASchedMeta | None,
    num_splits: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.compiler.is_compiling():
        items = metadata if isinstance(metadata, torch.Tensor) else None
        return torch.ops.flash_mla.decode.default(  # type: ignore[no-any-return]
            q, k_cache, block_table, cache_seqlens, items, num_splits, head_dim_v, scale, causal, None
        )
    try:
        call = check_decode(q, k_cache, block_table, cache_seqlens, head_dim_v, causal, "flash_mla_with_kvcache")
        if isinstance(metadata, torch.Tensor) and num_splits is not None:
            _check_tensors(call, metadata, num_splits, q.device)
    except ValueError as error:
        raise ValueError(in_upstream_words(str(error))) from None
    if not isinstance(metadata, FlashMLASchedMeta):
        return ops._decode(call, q, k_cache, block_table, cache_seqlens, metadata, num_splits, scale, None)
    metadata._check(call)
    capture = _capture_id(q.device)
    plan = metadata._plan(q.device, capture) or ops._plan(call, cache_seqlens, None)
    result = ops._decode(call, q, k_cache, block_table, cache_seqlens, plan.items, plan.splits, scale, None)
    metadata._keep(call, q.device, capture, plan)  # only now: a call that failed leaves the object as it was
    return result


def _check_metadata(metadata: object, num_splits: object) -> None:
    """Raise ValueError unless the two are of the kinds that `get_mla_metadata` returns together, or None."""
    if isinstance(metadata, torch.Tensor):
        if not isinstance(num_splits, torch.Tensor):
            raise ValueError(
                f"{_KVCACHE}: num_splits must be the tensor that came with tile_scheduler_metadata, "
                f"got {describe(num_splits)}"
            )
    elif num_splits is not None:
        raise ValueError(
            f"{_KVCACHE}: num_splits must be None unless tile_scheduler_metadata is a tensor, "
            f"got {describe(num_splits)}"
        )
    elif not isinstance(metadata, (FlashMLASchedMeta, type(None))):
        raise ValueError(
            f"{_KVCACHE}: tile_scheduler_metadata must be what get_mla_metadata returned or None, "
            f"got {describe(metadata)}"
        )


def _check_tensors(call: DecodeCall, items: torch.Tensor, splits: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless metadata tensors have the layout of a plan and were made for the shape of `call`."""
    for name, tensor in (("tile_scheduler_metadata", items), ("num_splits", splits)):
        if tensor.device != device:
            raise ValueError(f"{_KVCACHE}: {name} must be on {device} like q, got {describe(tensor)}")
        made_for = _made_for.get(tensor)
        if made_for is None:
            continue
        came = (call.batch, call.rows, call.h_kv)
        if (made_for.batch, made_for.rows, made_for.h_kv) != came or made_for.num_heads not in (None, call.num_heads):
            heads = "" if made_for.num_heads is None else f", num_heads={made_for.num_heads}"
            raise ValueError(
                f"{_KVCACHE}: {name} was made for batch={made_for.batch}, {made_for.rows} query rows per head of the "
                f"cache, h_kv={made_for.h_kv}{heads}; got batch={call.batch}, seqlen_q={call.seqlen_q}, "
                f"num_heads={call.num_heads}, h_kv={call.h_kv}"
            )
    pair = _made_for.get(items), _made_for.get(splits)
    if None not in pair and pair[0] is not pair[1]:
        raise ValueError(f"{_KVCACHE}: tile_scheduler_metadata and num_splits come from two calls of get_mla_metadata")
    check_plan(call, items, splits, "flash_mla_with_kvcache")
