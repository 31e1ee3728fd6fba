"""What a mask says: which new tokens are real, what is visible in an additive one, and masks made of other masks."""

from __future__ import annotations

import torch
from torch import nn

from ..cache import PagedLatentLayer

__all__ = ["as_bool", "causal_mask", "check_mask", "chosen_mask", "over_context_mask", "real_tokens"]

# Additive masks say "not visible" with the dtype's minimum, -inf or some -10,000; a position's bias is far above this.
HIDDEN = -1e3


def as_bool(mask: torch.Tensor) -> torch.Tensor:
    """True = visible, from a bool or an additive mask."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Plain causal mask `[1, 1, seqlen_q, positions]`, bottom-right aligned."""
    seqlen_q, num_keys = query.shape[2], key.shape[2]
    ones = torch.ones((seqlen_q, num_keys), dtype=torch.bool, device=query.device)
    return ones.tril(num_keys - seqlen_q)[None, None]


def check_mask(mask: torch.Tensor, layer: PagedLatentLayer, query: torch.Tensor, *, has_indexer: bool = False) -> None:
    """Raise ValueError, before anything is stored, unless a mask covers the new tokens or the whole context; that of a
    layer with an indexer the whole context, and all heads alike, since the choice is one for all."""
    assert layer.state is not None
    batch, num_heads, seqlen_q, _ = query.shape
    widths = {layer.state.max_cache_len}
    if has_indexer:
        num_heads = 1
    else:
        widths.add(seqlen_q)
    if not torch.compiler.is_compiling():  # a compiled step has no number for the present length
        widths.add(layer.state.seen_int() + seqlen_q)
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, num_heads)
        or mask.shape[2] != seqlen_q
        or (mask.shape[3] not in widths and not torch.compiler.is_compiling())
        or not (mask.dtype == torch.bool or mask.is_floating_point())
    ):
        columns = sorted(width for width in widths if width is not None)
        raise ValueError(
            f"flash_mla: attention_mask must be bool or floating [batch={batch} or 1, num_heads={num_heads} or 1, "
            f"seqlen_q={seqlen_q}, one of {columns} positions], got {mask.dtype} {tuple(mask.shape)}"
        )


def real_tokens(mask: torch.Tensor, layer: PagedLatentLayer, batch: int, seqlen_q: int) -> torch.Tensor:
    """Which new tokens are not padding, bool `[batch, seqlen_q]`: those that some new query may see."""
    assert layer.state is not None
    if mask.shape[1:] == (1, 1, 1):  # a decode step's
        return as_bool(mask).view(-1, 1).expand(batch, 1)
    visible = as_bool(mask).any(1)
    if mask.shape[-1] == layer.state.max_cache_len != seqlen_q:
        # A mask over the whole capacity: the new columns begin at the present length. The leader has not moved it on
        # yet; the layers after it do not use the answer.
        columns = layer.state.seen + torch.arange(seqlen_q, device=mask.device)
        visible = visible.index_select(-1, columns.clamp(max=mask.shape[-1] - 1))
    else:
        visible = visible[..., -seqlen_q:]
    return visible.any(-2).expand(batch, seqlen_q)


def chosen_mask(
    indices: torch.Tensor, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Fold the indexer's choice (int `[batch, seqlen_q, topk]`, -1 = nothing) into the mask, as eager does itself."""
    num_keys = key.shape[2]
    # One column more than keys takes every index that names no key.
    where = torch.where((indices >= 0) & (indices < num_keys), indices, num_keys).long()
    chosen = torch.zeros((*indices.shape[:2], num_keys + 1), dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, where, True)[:, None, :, :num_keys]
    mask = causal_mask(query, key) if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def over_context_mask(
    mask: torch.Tensor | None, layer: PagedLatentLayer, batch: int, seqlen_q: int, num_keys: int
) -> torch.Tensor:
    """A mask `[batch, 1, seqlen_q, num_keys]` over the gathered context, the new tokens being written already."""
    state = layer.state
    assert state is not None
    device = state.device
    if mask is not None and mask.shape[-1] != seqlen_q:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return nn.functional.pad(mask, (0, num_keys - mask.shape[-1]), value=hidden)
    _, stored = state.positions()
    if stored is None:
        stored = torch.ones((batch, num_keys), dtype=torch.bool, device=device)
    new = torch.ones((1, 1, seqlen_q, seqlen_q), dtype=torch.bool, device=device).tril() if mask is None else mask
    heads = new.shape[1]
    visible = stored[:, None, None, :].expand(batch, heads, seqlen_q, num_keys).clone()
    if new.dtype != torch.bool:
        visible = torch.zeros(visible.shape, dtype=new.dtype, device=device).masked_fill(
            ~visible, torch.finfo(new.dtype).min
        )
    columns = (state.seen - seqlen_q) + torch.arange(seqlen_q, device=device)
    visible[..., columns] = new.expand(batch, heads, seqlen_q, seqlen_q)
    return visible
