"""A chunk of new tokens on top of a context, with bounded memory: parts of the softmax, put together by their log-sums.

The new tokens attend among themselves by SDPA. To the context they attend in one of two ways: expanded slice by slice,
which takes fewer FLOP for many queries, or through the absorbed kernel, which knows rows of different lengths and needs
no slice for few queries. Measured on an H200 at 32 x 1,024 queries of 16 heads over 4,096 tokens: 2.2 ms of attention,
1.4 of expanding and 0.4 of putting together against 6.5 ms of the absorbed kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from ..cache import Latents, PagedLatentLayer
from .sdpa import attend, merge

__all__ = ["absorbed_context", "over_context"]

# Expanded keys and values of a slice; a copy of each part is alive for a while besides.
SLICE_BYTES = 2**30

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def over_context(
    module: Any,
    query: torch.Tensor,
    new: Latents,
    mask: torch.Tensor | None,
    scaling: float,
    expand: Expand,
    context: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None,
) -> torch.Tensor:
    """Attention of a chunk whose tokens are stored already.

    Args:
        module: the attention module.
        query: `[batch, num_heads, seqlen_q, head_dim]`, rotated.
        new: the chunk's own latents.
        mask: over the chunk's own positions, `[batch or 1, heads or 1, seqlen_q, seqlen_q]`; None: plain causal.
        scaling: multiplier of the scores.
        expand: latents and rotated keys `[batch, 1, positions, *]` -> keys and values.
        context: attention to the context through the absorbed kernel, as `merge` takes it; None: in expanded slices,
            which needs rows of one length that the host knows (`state.context_len`).
    Returns: `[batch, seqlen_q, num_heads, v_head_dim]`, contiguous.
    """
    layer, state = new.layer, new.layer.state
    assert state is not None
    calls = layer.group.num_paged
    key, value = expand(new.latent, new.k_rope)
    out, lse = attend(query, key, value, mask, mask is None, scaling, calls)
    out = out.to(torch.float64 if out.dtype == torch.float64 else torch.float32)
    if context is not None:
        out, lse = merge(out, lse, *context())
        return out.transpose(1, 2).to(query.dtype).contiguous()
    assert state.context_len is not None
    columns = key.shape[3] + value.shape[3]
    del key, value
    pages = max(1, SLICE_BYTES // (query.shape[0] * query.shape[1] * columns * query.element_size() * state.block_size))
    for begin in range(0, state.context_len, pages * state.block_size):
        end = min(begin + pages * state.block_size, state.context_len)
        key, value = expand(*_slice(layer, begin, end))
        out, lse = merge(out, lse, *attend(query, key, value, None, False, scaling, calls))
        del key, value  # before the next slice is expanded
    return out.transpose(1, 2).to(query.dtype).contiguous()


def _slice(layer: PagedLatentLayer, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `begin` (the first of a page) to `end` of every row, `[batch, 1, tokens, *]` each."""
    state = layer.state
    assert state is not None and layer.kv_cache is not None
    pages = state.block_table[:, begin // state.block_size : -(-end // state.block_size)]
    rows = layer.kv_cache[pages.long()].flatten(1, 2)[:, : end - begin].transpose(1, 2)
    return layer.latents_of(rows)


def absorbed_context(
    layer: PagedLatentLayer, q: torch.Tensor, scaling: float, unabsorbed: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to what was stored before this forward, through the absorbed kernel.

    Args:
        layer: its state's `context_seqlens` say how much that is, row by row.
        q: `[batch, seqlen_q, num_heads, d_qk]`, multiplied by W_UK.
        unabsorbed: multiplies `[batch, seqlen_q, num_heads, kv_lora_rank]` by W_UV.
    Returns: out `[batch, num_heads, seqlen_q, v_head_dim]` and lse `[batch, num_heads, seqlen_q]`, -inf where a row has
        no context.
    """
    state = layer.state
    assert state is not None and layer.kv_cache is not None and state.context_seqlens is not None
    out, lse = ops.decode(
        q,
        layer.kv_cache,
        state.block_table,
        state.context_seqlens,
        kv_lora_rank=layer.kv_lora_rank,
        softmax_scale=scaling,
        causal=False,
        backend=layer.group.backend,
    )
    return unabsorbed(out).transpose(1, 2), torch.where(lse == float("inf"), -lse, lse)
