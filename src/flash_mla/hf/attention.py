"""The attention function behind `attn_implementation="flash_mla"`: which of six paths a call takes, and why.

dense: no paged cache in this call (another cache, training, vision towers): SDPA, as Transformers would.
prefill: the cache was empty: the new tokens are expanded and attend to each other; nothing is read back.
sparse: an indexer chose the tokens (`sparse.py`): absorbed, over those rows of the pages alone.
absorbed: the queries are multiplied by W_UK, attend to the latents in their pages, and W_UV follows.
sliced: a chunk on a context, padded or so long that expanding pays: among itself by SDPA, to the context in parts.
gathered: a custom mask over the whole context, or what a graph cannot slice: all of it expanded at once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from ..cache import Latents, PagedLatentLayer
from ..cache.state import PagedState
from ..contract import UnsupportedError
from . import step
from .absorb import absorbed_query, absorbed_weights, expand, unabsorbed
from .paths import record
from .sdpa import sdpa, sdpa_with_sinks
from .sliced import absorbed_context, over_context
from .sparse import sparse
from .visible import causal_mask, check_mask, chosen_mask, over_context_mask, real_tokens

__all__ = ["flash_mla_attention"]

logger = logging.getLogger(__name__)


def flash_mla_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Latents,
    value: torch.Tensor | Latents,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it.

    Args:
        module: the attention module.
        query: `[batch, num_heads, seqlen_q, qk_nope_head_dim + qk_rope_head_dim]`, rotated.
        key, value: the paged cache's handle (twice), or expanded tensors `[batch, num_heads, positions, head_dim]`.
        attention_mask: `[batch, 1, seqlen_q, positions]`, bool (True = visible) or additive; None = plain causal.
        dropout: probability, for training.
        scaling: multiplier of the scores.
        kwargs: what models pass besides (`indices`, `s_aux`, `cu_seq_lens_q`, `is_causal`, ...).
    Returns: `[batch, seqlen_q, num_heads, v_head_dim]` and None (attention weights are never formed).
    Raises: UnsupportedError: continuous batching. ValueError: training on a paged cache.
    """
    if kwargs.get("cache") is not None:
        raise UnsupportedError(
            "flash_mla: continuous batching (generate_batch, PagedAttentionCache) is not supported: its pages hold "
            "expanded keys and values and it passes no mask; use generate(), or attn_implementation='sdpa'"
        )
    if not isinstance(key, Latents):
        assert isinstance(value, torch.Tensor)
        return _dense(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if module.training and torch.is_grad_enabled() and key.latent.requires_grad:
        raise ValueError("flash_mla: a paged cache keeps no gradients; train with use_cache=False")
    if torch.is_grad_enabled() and key.latent.requires_grad and not torch.compiler.is_compiling():
        _say_detached()
    if kwargs.get("indices") is not None:
        return sparse(module, query, key, attention_mask, dropout, scaling, kwargs), None
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError("flash_mla: attention sinks (s_aux) on the paged cache need an indexer's indices")
    return _paged(module, query, key, attention_mask, dropout, scaling, kwargs)


@functools.cache
def _say_detached() -> None:
    logger.warning("flash_mla: gradients do not flow through a paged cache; torch.no_grad() spares their cost")


# --- paged ------------------------------------------------------------------------------------------------------------


def _paged(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    layer, state = new.layer, new.layer.state
    assert state is not None
    seqlen_q = query.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is not None and layer.is_leader:
        check_mask(mask, layer, query)
    if mask is None:
        state.padding_unknown = False
    covers_context = mask is not None and mask.shape[-1] != seqlen_q
    # The leader alone moves the state on; the others need not know which tokens are padding.
    says = mask if layer.is_leader else None
    layer.begin(new, None if says is None else real_tokens(says, layer, query.shape[0], seqlen_q))
    if seqlen_q == 1 and not covers_context and not torch.compiler.is_compiling():
        out = _decode_step(module, query, new, scaling)
        if out is not None:
            return out, None
    if seqlen_q > 1 and not state.had_context:
        layer.absorbed.pop(module.layer_idx, None)  # a new prompt: what was kept may be of other weights
    # A compiled step cannot make what it lacks: with fixed capacity the prompt's forward prepares it.
    weights = None
    if seqlen_q == 1 or state.had_context or layer.group.max_cache_len is not None:
        weights = absorbed_weights(module, layer, new.latent)
    model_type = module.config.model_type
    if covers_context:
        record(model_type, "gathered", "a mask over the whole context was given")
    elif seqlen_q > 1 and not state.had_context:
        record(model_type, "prefill")
        layer.store(new)
        key, value = expand(module, layer, new.latent, new.k_rope)
        return sdpa(module, query, key, value, mask, dropout, scaling, kwargs, calls=layer.group.num_paged)
    elif weights is not None and (seqlen_q == 1 or (mask is None and seqlen_q <= _longest_absorbed(module))):
        record(model_type, "absorbed")
        return _absorbed(module, query, new, weights, scaling, causal=seqlen_q > 1), None
    elif seqlen_q > 1 and _can_slice(state, weights):
        return _sliced(module, query, new, mask, weights, scaling), None
    elif weights is None:
        record(model_type, "gathered", "kv_b_proj is not one matrix (a bias, or adapters by row)")
    else:
        record(model_type, "gathered", "a chunk on a context in a graph")
    layer.store(new)
    latent, k_rope = layer.gather()
    key, value = expand(module, layer, latent, k_rope)
    visible = over_context_mask(mask, layer, query.shape[0], seqlen_q, key.shape[2])
    return sdpa(module, query, key, value, visible, dropout, scaling, kwargs)


def _longest_absorbed(module: Any) -> int:
    """Most new tokens per request for which attending to latents takes fewer FLOP than expanding the context.

    Per head and context token, in FLOP / 2: expanding costs R * (nope + v) once and nope + rope + v per query;
    absorbed costs 2 R + rope per query. Equal at q = R (nope + v) / (2 R - nope - v): 170 for DeepSeek-V3. Twice that
    is what was measured on an H200, where the absorbed kernel runs at 720 TFLOP/s, SDPA at 635, and expanding and
    putting together are bound by memory (figures in sliced.py: equal at 350).
    """
    rank, per_head = module.kv_lora_rank, module.qk_nope_head_dim + module.v_head_dim
    return int(2 * rank * per_head / max(1, 2 * rank - per_head))


def _can_slice(state: PagedState, weights: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    """Whether a chunk can attend to its context in parts: rows of one length, or a matrix for the absorbed kernel."""
    return not torch.compiler.is_compiling() and (state.context_len is not None or weights is not None)


def _sliced(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    mask: torch.Tensor | None,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
) -> torch.Tensor:
    layer, state = new.layer, new.layer.state
    assert state is not None and layer.kv_cache is not None
    seqlen_q, longest = query.shape[2], _longest_absorbed(module)
    how = "rows of different lengths" if state.context_len is None else f"at most {longest} queries"
    context: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
    if weights is not None and (state.context_len is None or seqlen_q <= longest):
        record(module.config.model_type, "sliced", f"the context absorbed: {how}")
        w_uk, w_uv = weights
        q = absorbed_query(query, w_uk, module.qk_nope_head_dim).to(layer.dtype)
        context = functools.partial(absorbed_context, layer, q, scaling, functools.partial(unabsorbed, w_uv=w_uv))
    else:
        record(module.config.model_type, "sliced", f"the context expanded: {seqlen_q} queries, more than {longest}")
    layer.store(new)
    return over_context(module, query, new, mask, scaling, functools.partial(expand, module, layer), context)


def _decode_step(module: Any, query: torch.Tensor, new: Latents, scaling: float) -> torch.Tensor | None:
    """One token per request on a plain weight, by what the step before found out; None where that cannot be."""
    layer = new.layer
    found: step.Step | None = layer.step
    if found is None or not found.fits(module, layer, query, new):
        weights = absorbed_weights(module, layer, new.latent)
        found = layer.step = None if weights is None else step.prepare(module, query, new, weights)
        if found is None:
            return None
    plan = _plan(layer, found.buffer.q, causal=False)
    if torch.is_grad_enabled():
        with torch.no_grad():
            out = step.run(found, query, new, plan, scaling)
    else:
        out = step.run(found, query, new, plan, scaling)
    record(module.config.model_type, "absorbed")  # behind the launches, which the host's time keeps waiting
    return out


def _absorbed(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    weights: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """Store the new tokens and let the queries attend to latents; `[batch, seqlen_q, num_heads, v_head_dim]`."""
    layer, state = new.layer, new.layer.state
    assert state is not None and layer.kv_cache is not None
    w_uk, w_uv = weights
    layer.store(new)
    q = absorbed_query(query, w_uk, module.qk_nope_head_dim).to(layer.dtype)
    out, _ = ops.decode(
        q,
        layer.kv_cache,
        state.block_table,
        state.cache_seqlens,
        kv_lora_rank=layer.kv_lora_rank,
        softmax_scale=scaling,
        causal=causal,
        plan=_plan(layer, q, causal),
        backend=layer.group.backend,
    )
    return unabsorbed(out, w_uv).to(query.dtype)


def _plan(layer: PagedLatentLayer, q: torch.Tensor, causal: bool) -> ops.SplitPlan | None:
    """The split plan of this forward, made by its first layer; None where decode does not want one."""
    state = layer.state
    assert state is not None and layer.kv_cache is not None
    if not _plans(q):
        return None
    plan = state.plan
    if plan is None or (plan.seqlen_q, plan.num_heads) != tuple(q.shape[1:3]):
        plan = state.plan = ops.plan_splits(
            q,
            layer.kv_cache,
            state.block_table,
            state.cache_seqlens,
            kv_lora_rank=layer.kv_lora_rank,
            causal=causal,
            backend=layer.group.backend,
        )
    if torch.compiler.is_compiling() and layer.index == state.last_index:
        state.plan = None  # a tensor of the graph's own: nothing of it may be kept when the graph ends
    return plan


def _plans(q: torch.Tensor) -> bool:
    """Whether decode wants a split plan: the definition in torch, which serves the CPU, does not split."""
    return q.is_cuda


# --- dense ------------------------------------------------------------------------------------------------------------


def _dense(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    model_type = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    indices, sinks = kwargs.pop("indices", None), kwargs.pop("s_aux", None)
    lengths = kwargs.get("cu_seq_lens_q")
    if indices is not None:
        record(model_type, "dense", "the indexer's choice as a mask")
        mask = chosen_mask(indices, mask, query, key)
    elif lengths is not None and mask is None:
        record(model_type, "dense", "packed sequences, one by one")
        return _packed(module, query, key, value, dropout, scaling, kwargs)
    else:
        record(model_type, "dense", "no paged cache in this call")
    if sinks is not None:
        return sdpa_with_sinks(module, query, key, value, mask, sinks, dropout, scaling), None
    return sdpa(module, query, key, value, mask, dropout, scaling, kwargs)


def _packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Sequences packed one after the other in a batch of one (vision towers, padding-free training), each by itself."""
    ends_q = kwargs["cu_seq_lens_q"].tolist()
    ends_k = kwargs["cu_seq_lens_k"].tolist() if kwargs.get("cu_seq_lens_k") is not None else ends_q
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    outs = []
    for begin_q, end_q, begin_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        part_q, part_k = query[:, :, begin_q:end_q], key[:, :, begin_k:end_k]
        mask = causal_mask(part_q, part_k) if is_causal else None
        own = {**kwargs, "is_causal": False}
        out, _ = sdpa(module, part_q, part_k, value[:, :, begin_k:end_k], mask, dropout, scaling, own)
        outs.append(out)
    return torch.cat(outs, dim=1), None
