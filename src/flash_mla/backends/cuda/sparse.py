"""Sparse decode on Hopper: every query a request of its own, whose tokens are the rows that it names."""

from __future__ import annotations

import torch

from ...contract import ITEM_COST, PLAN_BLOCK, DecodeCall
from ..equal_lengths import equal_lengths
from .decode import decode, num_slots
from .plan import plan

__all__ = ["sparse_decode"]


def _slots_of_whole(queries: int, units: int, most: int) -> int | None:
    """Slots, at most `most`, that get equally many whole queries of `units` units each, or None.

    None where a slot would work longer than its even share of all `most` slots by more than an item costs, which a cut
    costs at the least, and the merge beside. The plan for so many slots cuts nothing: its even share is what they take,
    or, of few units, less than a slot must have free to be cut for.
    """
    per_slot = -(-queries // most)
    if per_slot == 0 or queries % per_slot or (per_slot * most - queries) * units > ITEM_COST * most:
        return None
    return queries // per_slot


def sparse_decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
    wants_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Attention of each query to the rows that it names; arguments and results as `backends.torch.sparse_decode`.

    The largest score is refused (`decode_refusals`), so `wants_max` is False.
    """
    slots, may_cut = num_slots(call), True
    if lengths is None:
        if whole := _slots_of_whole(call.batch, -(-call.max_blocks // PLAN_BLOCK), slots):
            slots, may_cut = whole, False
        lengths, items, splits = equal_lengths(q.device, call.batch, call.max_blocks, slots, plan)
    else:  # the kernel trusts lengths as far as the list of indices goes
        lengths = lengths.clamp(max=call.max_blocks)
        items, splits = plan(lengths, slots)
    out, lse = decode(call, q, kv_cache, indices.contiguous(), lengths, softmax_scale, items, splits, may_cut)
    if attn_sink is not None:  # exp(lse) / (exp(lse) + exp(sink)); nothing visible: lse is inf and out 0
        share = torch.sigmoid(lse[..., 0] - attn_sink).masked_fill(lse[..., 0].isinf(), 0)
        out = (out.squeeze(1) * share.unsqueeze(-1)).to(out.dtype).unsqueeze(1)
    return out, lse, None
