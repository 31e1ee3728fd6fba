"""What FlashMLA's functions do beyond dense attention: rows named by index, a second cache, sinks, prompts.

Two caches are two launches, each without the sink, merged by their log-sums; the sink follows once. One cache is one
launch, which applies the sink itself.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from . import debug, ops
from .contract import FLOAT_DTYPES, FP8_ROW_DTYPES, UnsupportedError, describe

__all__ = ["NamedRows", "attend_to_named", "check_options", "flash_mla_sparse_fwd", "in_upstream_words", "with_sink"]

_KVCACHE, _SPARSE_FWD = "flash_mla.flash_mla_with_kvcache", "flash_mla.flash_mla_sparse_fwd"


class NamedRows(NamedTuple):
    """A cache and the rows of it that each query names: `k_cache`, `indices` and `topk_length` of
    `flash_mla_with_kvcache`, or its three `extra_*`."""

    cache: torch.Tensor
    indices: torch.Tensor
    topk_length: torch.Tensor | None
    is_extra: bool


def in_upstream_words(message: str) -> str:
    """An error message of `contract.py` with the argument names of `flash_mla_with_kvcache`."""
    for ours, theirs in (
        ("kv_cache", "k_cache"),
        ("kv_lora_rank", "head_dim_v"),
        ("plan items", "tile_scheduler_metadata"),
        ("plan splits", "num_splits"),
    ):
        message = message.replace(ours, theirs)
    return message


def check_options(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    extra: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    topk_length: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the optional arguments of `flash_mla_with_kvcache` go together.

    Args: as there; `extra` is extra_k_cache, extra_indices_in_kvcache and extra_topk_length. Shapes are left to
        `contract.py`, but for that of the sink, which two launches do not see.
    """
    extra_k_cache, extra_indices, extra_topk_length = extra
    if not isinstance(q, torch.Tensor) or q.ndim != 4:
        raise _wrong(_KVCACHE, "q", "[batch, seqlen_q, num_heads, d_qk]", q)
    is_one_byte = isinstance(k_cache, torch.Tensor) and k_cache.dtype in FP8_ROW_DTYPES
    if is_fp8_kvcache and not is_one_byte:
        must = "[num_blocks, block_size, h_kv, bytes] of one-byte elements (uint8, int8, float8_e4m3fn)"
        raise _wrong(_KVCACHE, "k_cache", f"{must} with is_fp8_kvcache", k_cache)
    if is_one_byte and not is_fp8_kvcache:
        raise ValueError(
            f"{_KVCACHE}: is_fp8_kvcache must be True for a k_cache of one-byte elements, got {is_fp8_kvcache!r} and "
            f"{describe(k_cache)}"
        )
    if (extra_k_cache is None) != (extra_indices is None):
        raise ValueError(f"{_KVCACHE}: extra_k_cache and extra_indices_in_kvcache must come together, got only one")
    if extra_topk_length is not None and extra_indices is None:
        raise ValueError(f"{_KVCACHE}: extra_topk_length must come with extra_indices_in_kvcache, got None for that")
    if indices is None:
        if topk_length is not None or extra_indices is not None:
            raise ValueError(f"{_KVCACHE}: topk_length and extra_* must come with indices, got indices=None")
    elif causal:
        raise ValueError(f"{_KVCACHE}: causal must be False with indices (they name the visible tokens), got True")
    if attn_sink is not None and not (
        isinstance(attn_sink, torch.Tensor)
        and attn_sink.dtype == torch.float32
        and attn_sink.shape == (q.shape[2],)
        and attn_sink.device == q.device
    ):
        raise _wrong(_KVCACHE, "attn_sink", f"float32 [num_heads={q.shape[2]}] on {q.device} like q", attn_sink)
    if isinstance(extra_k_cache, torch.Tensor) and isinstance(k_cache, torch.Tensor):
        if is_fp8_kvcache and extra_k_cache.dtype not in FP8_ROW_DTYPES:
            raise _wrong(_KVCACHE, "extra_k_cache", "of one-byte elements like k_cache", extra_k_cache)
        if not is_fp8_kvcache and extra_k_cache.dtype != k_cache.dtype:
            raise _wrong(_KVCACHE, "extra_k_cache", f"{k_cache.dtype} like k_cache", extra_k_cache)


def attend_to_named(
    q: torch.Tensor,
    parts: list[NamedRows],
    head_dim_v: int,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sparse mode of `flash_mla_with_kvcache`, arguments and results as there, over one cache or two."""
    if len(parts) == 1:
        return _attend_to_part(q, parts[0], head_dim_v, softmax_scale, attn_sink)
    results = [_attend_to_part(q, part, head_dim_v, softmax_scale, None) for part in parts]
    out, lse = _merged(*results[0], *results[1])
    return (out if attn_sink is None else with_sink(out, lse, attn_sink)).to(q.dtype), lse


def _merged(
    out: torch.Tensor, lse: torch.Tensor, extra_out: torch.Tensor, extra_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over both of two sets of rows, from that over each; out in the dtype of `lse`."""
    lse = lse.masked_fill(torch.isposinf(lse), float("-inf"))
    extra_lse = extra_lse.masked_fill(torch.isposinf(extra_lse), float("-inf"))
    both = torch.logaddexp(lse, extra_lse)
    is_empty = torch.isneginf(both)
    # Not exp(lse - both): that was rounded once more, and the two shares would not add up to 1. Where both are empty
    # the difference is NaN.
    share = torch.sigmoid(lse - extra_lse).masked_fill(is_empty, 0)
    extra_share = torch.sigmoid(extra_lse - lse).masked_fill(is_empty, 0)
    mixed = out * _per_row(share) + extra_out * _per_row(extra_share)
    return mixed, both.masked_fill(is_empty, float("inf"))


def _per_row(shares: torch.Tensor) -> torch.Tensor:
    """`[batch, num_heads, seqlen_q]` as a factor of out, `[batch, seqlen_q, num_heads, 1]`."""
    return shares.transpose(1, 2).unsqueeze(-1)


def _of_part(message: str, part: NamedRows) -> str:
    """An error message of `contract.py` about a launch, with the argument names that its caller knows."""
    message = in_upstream_words(message)
    if part.is_extra:
        for name, extra_name in (
            ("k_cache", "extra_k_cache"),
            ("indices", "extra_indices_in_kvcache"),
            ("topk_length", "extra_topk_length"),
        ):
            message = message.replace(name, extra_name)
    return message


def _attend_to_part(
    q: torch.Tensor, part: NamedRows, head_dim_v: int, softmax_scale: float, attn_sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.compiler.is_compiling():
        return ops.sparse_decode(
            q,
            part.cache,
            part.indices,
            kv_lora_rank=head_dim_v,
            softmax_scale=softmax_scale,
            attn_sink=attn_sink,
            topk_length=part.topk_length,
        )
    try:
        out, lse, _ = ops._sparse(
            "flash_mla_with_kvcache",
            q,
            part.cache,
            part.indices,
            attn_sink,
            part.topk_length,
            head_dim_v,
            softmax_scale,
            None,
            False,
        )
    except UnsupportedError:
        raise
    except ValueError as error:
        raise ValueError(_of_part(str(error), part)) from None
    return out, lse


def with_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
    """`out * exp(lse) / (exp(lse) + exp(attn_sink))`, in the dtype of `lse`; 0 where nothing is visible.

    Args:
        out: `[batch, seqlen_q, num_heads, head_dim_v]`, attention without the sink.
        lse: `[batch, num_heads, seqlen_q]`, fp32 or fp64, natural log, +inf where nothing is visible.
        attn_sink: fp32 `[num_heads]`, natural log; +inf takes everything, -inf nothing.
    """
    share = torch.sigmoid(lse - attn_sink.to(lse.dtype)[:, None])
    # inf - inf is NaN where nothing is visible and the sink is +inf, and NaN * 0 is NaN.
    return out * _per_row(share.masked_fill(torch.isposinf(lse), 0))


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query of a prompt to the rows that it names: FlashMLA's sparse prefill, absorbed form.

    Args:
        q: `[s_q, h_q, d_qk]`, bf16/fp16 (torch backend: fp32/fp64 too). Any number of heads. Outer strides free.
        kv: `[s_kv, 1, d_qk]`, dtype of `q`; V is the first `d_v` columns. Outer strides free.
        indices: int32 `[s_q, 1, topk]`, rows of `kv`. Negative, or s_kv and above: no token. A row named twice counts
            twice. Any topk.
        sm_scale: multiplier of the scores before softmax.
        d_v: columns of the value, in elements.
        attn_sink: fp32 `[h_q]`, natural log: one more entry in the softmax of each head, without a value: `out` is
            multiplied by exp(lse) / (exp(lse) + exp(sink)), the other two results are without it. None: none.
        topk_length: int32 `[s_q]`, how many of a query's first indices count; None: all.
    Returns: out `[s_q, h_q, d_v]`, dtype of `q`; max_logits, the largest scaled score, and lse, both `[s_q, h_q]`, fp32
        (fp64 for fp64), natural log. Where nothing is visible: 0, -inf, +inf.
    Raises: ValueError: wrong shapes, dtypes or devices. UnsupportedError: no backend accepts; lists each with its
        reasons.
    Values of `indices` and `topk_length` are not checked. Reads device memory only; no host sync; capturable in a CUDA
    graph. Source: DeepSeek-V3.2, section 2 (DSA).
    """
    if not isinstance(sm_scale, (int, float)):
        raise ValueError(f"{_SPARSE_FWD}: sm_scale must be a number, got {describe(sm_scale)}")
    if torch.compiler.is_compiling():
        return torch.ops.flash_mla.sparse_fwd.default(  # type: ignore[no-any-return]
            q, kv, indices, float(sm_scale), d_v, attn_sink, topk_length
        )
    return _sparse_fwd(q, kv, indices, float(sm_scale), d_v, attn_sink, topk_length)


def _sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_sparse_fwd(q, kv, indices, d_v, attn_sink, topk_length)
    if debug.is_on():  # past the last row is no mistake here, which it is in a paged cache
        indices = indices.masked_fill(indices >= kv.shape[0], -1)
    # Every query is a request, every row of kv a page.
    out, lse, max_logits = ops._sparse(
        "flash_mla_sparse_fwd",
        q.unsqueeze(1),
        kv.unsqueeze(1),
        indices,
        attn_sink,
        topk_length,
        d_v,
        sm_scale,
        None,
        True,
    )
    return out.squeeze(1), cast("torch.Tensor", max_logits).squeeze(2), lse.squeeze(2)


def _check_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
) -> None:
    if not isinstance(q, torch.Tensor) or q.ndim != 3 or 0 in q.shape[1:] or q.dtype not in FLOAT_DTYPES:
        raise _wrong(_SPARSE_FWD, "q", "bfloat16, float16, float32 or float64 [s_q, h_q, d_qk]", q)
    s_q, h_q, d_qk = q.shape
    if isinstance(kv, torch.Tensor) and kv.ndim == 3 and kv.shape[1] != 1:
        must = "[s_kv, 1, d_qk]: a query names its rows once, for one latent head"
        raise _wrong(_SPARSE_FWD, "kv", must, kv)
    _check("kv", kv, q.dtype, {"s_kv": None, "h_kv": 1, "d_qk": d_qk}, q.device)
    _check("indices", indices, torch.int32, {"s_q": s_q, "h_kv": 1, "topk": None}, q.device)
    if not isinstance(d_v, int) or not 0 < d_v <= d_qk:
        raise ValueError(f"{_SPARSE_FWD}: d_v must be in 1..d_qk={d_qk}, got {d_v!r}")
    if attn_sink is not None:
        _check("attn_sink", attn_sink, torch.float32, {"h_q": h_q}, q.device)
    if topk_length is not None:
        _check("topk_length", topk_length, torch.int32, {"s_q": s_q}, q.device)


def _check(
    argument: str, tensor: object, dtype: torch.dtype, shape: dict[str, int | None], device: torch.device
) -> None:
    """Raise ValueError unless it is a tensor of this dtype and device and of these named sizes; None: any size."""
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.ndim == len(shape)
        and all(want in (None, have) for want, have in zip(shape.values(), tensor.shape, strict=True))
    ):
        return
    sizes = ", ".join(name if size is None else f"{name}={size}" for name, size in shape.items())
    raise _wrong(_SPARSE_FWD, argument, f"{str(dtype).removeprefix('torch.')} [{sizes}] on {device} like q", tensor)


def _wrong(function: str, argument: str, must: str, came: object) -> ValueError:
    return ValueError(f"{function}: {argument} must be {must}, got {describe(came)}")


# The node beside its function, not in `ops.py`: nobody else calls it.
_library = torch.library.Library("flash_mla", "FRAGMENT")
_library.define(
    "sparse_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v, Tensor? attn_sink, Tensor? topk_length)"
    " -> (Tensor out, Tensor max_logits, Tensor lse)"
)


def _sparse_fwd_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s_q, h_q, _ = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = q.new_empty((s_q, h_q), dtype=accumulate)
    return q.new_empty((s_q, h_q, d_v)), sums, torch.empty_like(sums)


_library.impl("sparse_fwd", _sparse_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("flash_mla::sparse_fwd", _sparse_fwd_fake, lib=_library)
