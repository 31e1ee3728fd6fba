"""Sparse decode on Hopper: every query a request of its own, whose tokens are the rows that it names."""

from __future__ import annotations

import torch

from ...contract import DecodeCall
from ..equal_lengths import equal_lengths
from .decode import decode, num_slots
from .plan import plan

__all__ = ["sparse_decode"]


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
    if lengths is None:
        lengths, items, splits = equal_lengths(q.device, call.batch, call.max_blocks, num_slots(call), plan)
    else:  # the kernel trusts lengths as far as the list of indices goes
        lengths = lengths.clamp(max=call.max_blocks)
        items, splits = plan(lengths, num_slots(call))
    out, lse = decode(call, q, kv_cache, indices.contiguous(), lengths, softmax_scale, items, splits)
    if attn_sink is not None:  # exp(lse) / (exp(lse) + exp(sink)); nothing visible: lse is inf and out 0
        share = torch.sigmoid(lse[..., 0] - attn_sink).masked_fill(lse[..., 0].isinf(), 0)
        out = (out.squeeze(1) * share.unsqueeze(-1)).to(out.dtype).unsqueeze(1)
    return out, lse, None
