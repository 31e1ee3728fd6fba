"""SDPA as Transformers calls it, and attention that also returns its log-sums, so that parts of one softmax over
different keys can be put together.

On Hopper torch gives both to cuDNN, which is four times as fast as the others at 192 query and 128 value columns (600
against 140 TFLOP/s on an H200) but plans for every new shape, in 50 ms of the host's time. A prompt of a length that
never comes again is faster without.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .visible import causal_mask

__all__ = ["attend", "merge", "sdpa", "sdpa_with_sinks"]

logger = logging.getLogger(__name__)

# What cuDNN's plan of one shape costs, and the rates with it and without (seconds, FLOP/s; H200, torch 2.11).
PLAN_S = 0.05
PLANNED_FLOPS = 600e12
UNPLANNED_FLOPS = 140e12

# Seconds lost so far for want of a plan, by shape. At a plan's price the plan is made: so no order of shapes costs more
# than twice what it would have, had one known them all before.
_lost: dict[tuple[Any, ...], float] = {}
_lock = threading.Lock()
MOST_SHAPES = 4096
_unplanned = 0  # calls under way that want no plan


@functools.cache
def _say(text: str) -> None:
    logger.info("flash_mla: %s", text)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN switched off in torch, whose switch is the process's: by the first that comes, on again by the last.

    torch.nn.attention.sdpa_kernel would put back what it found, which may be another thread's "off"; and it would
    switch on what the user has switched off.
    """
    global _unplanned
    with _lock:
        _unplanned += 1
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _lock:
            _unplanned -= 1
            if not _unplanned:
                torch.backends.cuda.enable_cudnn_sdp(True)


def _wants_plan(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, calls: int) -> bool:
    """Whether `calls` calls of this shape (the layers of a forward) are worth cuDNN's plan, with those before."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * (0.5 if is_causal else 1.0)
    flop = 2 * pairs * (query.shape[3] + value.shape[3])
    loss = flop / UNPLANNED_FLOPS - flop / PLANNED_FLOPS
    shape = (query.device, query.dtype, *query.shape, key.shape[2], value.shape[3], is_causal)
    with _lock:
        lost = _lost.pop(shape, 0.0)
        wants = lost + loss * calls >= PLAN_S
        # Newest last: the oldest is forgotten first. A shape that has its plan keeps it.
        _lost[shape] = PLAN_S if wants else lost + loss
        if len(_lost) > MOST_SHAPES:
            del _lost[next(iter(_lost))]
    return wants


def _may_plan(query: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and torch.version.hip is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
        and (_unplanned > 0 or torch.backends.cuda.cudnn_sdp_enabled())
    )


def sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
    calls: int | None = None,
) -> tuple[torch.Tensor, None]:
    """`sdpa_attention_forward` of Transformers with the arguments that SDPA knows.

    Args:
        calls: layers that will call with the same shape in this forward: cuDNN then plans only if they are worth it.
            None: as torch decides.
    """
    passed = {name: kwargs[name] for name in ("is_causal", "softcap", "position_bias") if name in kwargs}
    backends: AbstractContextManager[Any] = nullcontext()
    if calls is not None and not torch.compiler.is_compiling() and _may_plan(query):
        is_causal = mask is None and query.shape[2] > 1
        if not _wants_plan(query, key, value, is_causal, calls):
            _say("short prompts run without cuDNN, whose plan of a new shape takes longer than it saves")
            backends = _without_cudnn()
    with backends:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **passed)
    return out, None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    calls: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sums.

    Args:
        query: `[batch, num_heads, seqlen_q, head_dim]`.
        key, value: `[batch, num_heads, positions, head_dim]` and `[batch, num_heads, positions, v_head_dim]`.
        mask: `[batch or 1, num_heads or 1, seqlen_q, positions]`, bool (True = visible) or additive; None: all visible.
        is_causal: query i sees the keys up to i; without a mask, and for as many keys as queries.
        scaling: multiplier of the scores.
        calls: as of `sdpa`.
    Returns: out `[batch, num_heads, seqlen_q, v_head_dim]`, dtype of `query`; lse `[batch, num_heads, seqlen_q]` fp32
        (fp64 for fp64), natural log. A query that sees nothing gets some finite numbers and an lse near the dtype's
        minimum: beside keys that it does see they weigh nothing.
    """
    bias = None if mask is None else _as_bias(mask, query)
    if not query.is_cuda:
        return _attend_plainly(query, key, value, bias, is_causal, scaling)
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    # The kernels are called directly, for their log-sums: so it is asked here what torch asks before it calls them.
    params = torch.backends.cuda.SDPAParams(query, key, value, bias, 0.0, is_causal, False)
    may_plan = _may_plan(query) and torch.backends.cuda.can_use_cudnn_attention(params)
    if may_plan and _wants_plan(query, key, value, is_causal, calls):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, True, 0.0, is_causal, False, scale=scaling
        )
        return out, lse.view(query.shape[:3])
    if not torch.backends.cuda.can_use_efficient_attention(params):
        _say(f"neither cuDNN nor efficient attention takes chunks of {query.dtype} here: all scores are formed at once")
        return _attend_plainly(query, key, value, bias, is_causal, scaling)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, is_causal, scale=scaling
    )
    return out, lse[..., : query.shape[2]]  # it has a multiple of 32 queries


def _as_bias(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An additive mask in the dtype of `like`, its rows 16 elements aligned as the kernels want them."""
    columns = mask.shape[-1]
    bias = torch.zeros((*mask.shape[:-1], -(-columns // 16) * 16), dtype=like.dtype, device=mask.device)[..., :columns]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask, torch.finfo(like.dtype).min)
    return bias.copy_(mask.clamp(min=torch.finfo(like.dtype).min))


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `attend`."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(accumulate) @ key.to(accumulate).mT) * scaling
    if bias is not None:
        scores = scores + bias  # beside the dtype's minimum a score is rounded away: no -inf, and no row of NaN
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ value.to(accumulate)).to(query.dtype), scores.logsumexp(-1)


def merge(
    out: torch.Tensor, lse: torch.Tensor, more_out: torch.Tensor, more_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put two parts of one softmax together; `out` and `lse` in fp32 or fp64 and `out` changed in place.

    Args:
        out, more_out: `[batch, num_heads, seqlen_q, v_head_dim]`, attention over other keys each.
        lse, more_lse: `[batch, num_heads, seqlen_q]`, natural log; -inf where a part saw nothing.
    """
    weight = torch.sigmoid(more_lse - lse)  # of the second part: e^b / (e^a + e^b)
    out.lerp_(more_out.to(out.dtype), weight.unsqueeze(-1))
    return out, torch.logaddexp(lse, more_lse)


def sdpa_with_sinks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attention whose softmax has one more, valueless entry per head (`sinks` `[num_heads]`)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = causal_mask(query, key) if mask is None else mask
    minimum = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible, minimum) if visible.dtype == torch.bool else scores + visible
    entry = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    probability = torch.cat((scores, entry), dim=-1).float().softmax(-1)[..., :-1].to(value.dtype)
    probability = nn.functional.dropout(probability, p=dropout, training=module.training)
    return (probability @ value).transpose(1, 2).contiguous()
