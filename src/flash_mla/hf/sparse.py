"""Attention to the tokens that a model's indexer chose (DeepSeek sparse attention), over pages.

The indexer names positions in padded order, some of them masked or still to come when fewer are visible than it may
choose; they become rows of the pool, or none. A prompt on an empty cache is expanded and masked as long as that is less
work than the absorbed form over top-k rows for each of its queries.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..cache import Latents
from ..cache.state import PagedState
from .absorb import absorbed_query, absorbed_weights, expand, unabsorbed
from .paths import record
from .sdpa import sdpa, sdpa_with_sinks
from .visible import as_bool, check_mask, chosen_mask, over_context_mask, real_tokens

__all__ = ["sparse"]

# Absorbed queries and their results held at once, in bytes: a prompt of 8,192 tokens at 128 heads has 2.3 GB of them.
SLICE_BYTES = 2**28


def sparse(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Store the new tokens and attend to those that were chosen.

    Args:
        module: the attention module.
        query: `[batch, num_heads, seqlen_q, head_dim]`, rotated.
        new: the new latents, stored already if another layer shares them.
        mask: over the whole context `[batch or 1, 1, seqlen_q, positions]`, never None: the indexer needs it too.
        dropout: probability, for training.
        scaling: multiplier of the scores.
        kwargs: what the model passed besides; `indices` int `[batch, seqlen_q, topk]` and `s_aux` `[num_heads]` or None
            are taken out.
    Returns: `[batch, seqlen_q, num_heads, v_head_dim]`.
    Raises: ValueError: no mask, or one of another shape (nothing is stored).
    """
    layer, state = new.layer, new.layer.state
    assert state is not None
    indices, sinks = kwargs.pop("indices"), kwargs.pop("s_aux", None)
    batch, _, seqlen_q, _ = query.shape
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None:
        raise ValueError("flash_mla: sparse attention on the paged cache needs the mask that its indexer saw, got None")
    if not new.stored:
        if layer.is_leader:
            check_mask(mask, layer, query, has_indexer=True)
        layer.begin(new, _real(mask, new, batch, seqlen_q) if layer.is_leader else None)
    is_prompt = seqlen_q > 1 and not state.had_context
    if is_prompt:
        layer.absorbed.pop(module.layer_idx, None)  # a new prompt: what was kept may be of other weights
    model_type = module.config.model_type
    prompt_is_expanded = is_prompt and seqlen_q <= _longest_expanded(module, indices.shape[-1])
    # A compiled step cannot make what it lacks: with fixed capacity the prompt's forward prepares it.
    weights = None
    if not prompt_is_expanded or layer.group.max_cache_len is not None:
        weights = absorbed_weights(module, layer, new.latent)
    if not new.stored:
        layer.store(new)
    is_biased = (
        mask.dtype != torch.bool
    )  # an additive mask may say more than what is visible; Transformers' own are bool
    if prompt_is_expanded or weights is None or is_biased:
        if prompt_is_expanded:
            record(model_type, "prefill", "the indexer's choice as a mask")
            visible, latent, k_rope = mask[..., :seqlen_q], new.latent, new.k_rope
        else:
            no_matrix = "kv_b_proj is not one matrix (a bias, or adapters by row)"
            record(model_type, "gathered", no_matrix if weights is None else "an additive mask was given")
            latent, k_rope = layer.gather()
            visible = over_context_mask(mask, layer, batch, seqlen_q, latent.shape[2])
        key, value = expand(module, layer, latent, k_rope)
        visible = chosen_mask(indices, visible, query, key)
        if sinks is not None:
            return sdpa_with_sinks(module, query, key, value, visible, sinks, dropout, scaling)
        out, _ = sdpa(module, query, key, value, visible, dropout, scaling, kwargs)
        return out
    record(model_type, "sparse")
    assert layer.kv_cache is not None
    w_uk, w_uv = weights
    sinks = None if sinks is None else sinks.detach().float()
    num_heads = query.shape[1]
    slice_len = max(1, SLICE_BYTES // (batch * num_heads * (layer.d_qk + layer.kv_lora_rank) * query.element_size()))
    outs = []
    for begin in range(0, seqlen_q, slice_len):
        part = slice(begin, begin + slice_len)
        out, _ = ops.sparse_decode(
            absorbed_query(query[:, :, part], w_uk, module.qk_nope_head_dim).to(layer.dtype),
            layer.kv_cache,
            # The tensors themselves in a decode step: by them a layer knows what another one found out.
            _chosen_slots(state, indices, mask)
            if seqlen_q == 1
            else _chosen_slots(state, indices[:, part], mask[:, :, part]),
            kv_lora_rank=layer.kv_lora_rank,
            softmax_scale=scaling,
            attn_sink=sinks,
            backend=layer.group.backend,
        )
        outs.append(unabsorbed(out, w_uv).to(query.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _real(mask: torch.Tensor, new: Latents, batch: int, seqlen_q: int) -> torch.Tensor | None:
    """Which new tokens are not padding, bool `[batch, seqlen_q]`; None if all are, which is asked of prompts and chunks
    only: the host waits for the answer."""
    real = real_tokens(mask, new.layer, batch, seqlen_q)
    if seqlen_q > 1 and not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


def _longest_expanded(module: Any, topk: int) -> int:
    """Most tokens of a prompt for which expanding them takes fewer FLOP than top-k latents for each query.

    Per head and query, in FLOP / 2: half of the prompt is visible on average, nope + rope + v each; absorbed costs
    2 R + rope per chosen token. Equal at 2 topk (2 R + rope) / (nope + rope + v): 13,926 for DeepSeek-V3.2.
    """
    expanded = module.qk_nope_head_dim + module.qk_rope_head_dim + module.v_head_dim
    return int(2 * topk * (2 * module.kv_lora_rank + module.qk_rope_head_dim) / expanded)


def _chosen_slots(state: PagedState, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows of the pool, int32 `[batch, seqlen_q, topk]`, of chosen positions; -1 for those that are masked.

    Args:
        state: says where each position is stored.
        indices: int `[batch, seqlen_q, topk]`, positions in padded order.
        mask: `[batch or 1, 1, seqlen_q, positions]`.
    """
    batch, seqlen_q, _ = indices.shape
    if seqlen_q == 1 and not torch.compiler.is_compiling():
        return _chosen_in_step(state, indices, mask)
    slot_map = state.slot_map()
    num_positions = min(slot_map.shape[1], mask.shape[-1])
    inside = (indices >= 0) & (indices < num_positions)
    where = torch.where(inside, indices, 0).long()
    visible = as_bool(mask)[:, 0].expand(batch, seqlen_q, -1).gather(-1, where)
    slots = slot_map[:, None].expand(-1, seqlen_q, -1).gather(-1, where)
    return torch.where(inside & visible, slots, -1)


def _chosen_in_step(state: PagedState, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`_chosen_slots` of one query per row, in four launches: the mask is one for all layers, and is applied once.

    Layers that use another one's choice are given the same tensor, and get the same slots.
    """
    if state.chosen_slots is not None and state.chosen_slots[0] is indices and state.chosen_slots[1] is mask:
        return state.chosen_slots[2]
    if state.visible_slots is None or state.visible_slots[0] is not mask:
        slot_map = state.slot_map()
        num_positions = min(slot_map.shape[1], mask.shape[-1])
        visible = torch.where(as_bool(mask)[:, 0, 0, :num_positions], slot_map[:, :num_positions], -1)
        state.visible_slots = (mask, torch.nn.functional.pad(visible, (0, 1), value=-1))
    visible = state.visible_slots[1]
    last = visible.shape[1] - 1  # the column that says "none": of every index below 0 and past the positions
    where = (indices[:, 0].clamp(-1, last) % (last + 1)).long()
    slots = visible.gather(1, where)[:, None]
    state.chosen_slots = (indices, mask, slots)
    return slots
