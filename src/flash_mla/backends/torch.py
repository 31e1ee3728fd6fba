"""The definition of every op in plain torch: any device, any floating dtype, any page size. The other backends are
measured against this one, and this one against `F.scaled_dot_product_attention` on expanded keys and values.
"""

from __future__ import annotations

import torch

from ..contract import PLAN_BLOCK, AppendCall, DecodeCall

__all__ = ["append", "append_refusals", "decode", "decode_refusals", "num_items", "plan"]

# Elements of gathered latents held at once: 2**26 fp32 elements are 256 MiB.
GATHER_ELEMENTS = 2**26


def decode_refusals(call: DecodeCall) -> list[str]:
    """The definition takes every valid call."""
    return []


def append_refusals(call: AppendCall) -> list[str]:
    """The definition takes every valid call."""
    return []


def num_items(call: DecodeCall) -> int:
    """One item per request: nothing is split here."""
    return call.batch


def plan(cache_seqlens: torch.Tensor, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal `num_items` parts out to the requests so that the longest part is as short as possible.

    Args:
        cache_seqlens: int32 `[batch]`, tokens.
        num_items: rows of the plan, >= batch.
    Returns: items int32 `[num_items, 4]` and first_item int32 `[batch + 1]`, as in `contract.check_plan`.
    Reads device memory only.
    """
    device, batch = cache_seqlens.device, cache_seqlens.shape[0]
    units = (cache_seqlens.clamp(min=0).long() + PLAN_BLOCK - 1) // PLAN_BLOCK
    # Smallest number of units per part for which all parts fit, by bisection: 2**31 tokens are 2**25 units.
    low = torch.zeros((), dtype=torch.int64, device=device)  # does not fit, or is zero
    high = torch.full((), 2**25, dtype=torch.int64, device=device)  # one part each: always fits
    for _ in range(25):
        middle = (low + high) // 2
        parts = ((units + middle.clamp(min=1) - 1) // middle.clamp(min=1)).clamp(min=1)
        fits = (parts.sum() <= num_items) & (middle > 0)
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    parts = ((units + high - 1) // high).clamp(min=1)
    first_item = torch.cat((parts.new_zeros(1), parts.cumsum(0)))
    index = torch.arange(num_items, device=device)
    request = torch.searchsorted(first_item[1:], index, right=True).clamp(max=batch - 1)
    begin = first_item[request]
    used = (index < first_item[-1]).unsqueeze(1)
    items = torch.where(used, torch.stack((request, index - begin, parts[request], begin), dim=1), -1)
    return items.to(torch.int32), first_item.to(torch.int32)


def decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None = None,
    first_item: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over gathered pages; scores, softmax and sums in fp32 (fp64 for fp64 input). Ignores a split plan.

    Shapes as in `contract.check_decode`; returns out `[batch, seqlen_q, num_heads, kv_lora_rank]` in q's dtype and lse
    `[batch, num_heads, seqlen_q]` fp32 (fp64 for fp64 input), natural log, +inf where nothing is visible.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=q.device)
    lse = torch.empty((call.batch, call.num_heads, call.seqlen_q), dtype=accumulate, device=q.device)
    num_keys = call.max_blocks * call.block_size
    d_qk = q.shape[3]
    step = max(1, GATHER_ELEMENTS // max(1, num_keys * d_qk))
    key = torch.arange(num_keys, device=q.device)
    group = call.num_heads // call.h_kv
    for begin in range(0, call.batch, step):
        rows = slice(begin, min(begin + step, call.batch))
        lengths = cache_seqlens[rows].long()
        # Entries past the length are garbage by contract (2**31-ish): they may not even be used as an index.
        used = key[:: call.block_size] < lengths[:, None]
        pages = torch.where(used, block_table[rows].long(), 0)
        kv = kv_cache[pages].reshape(len(lengths), num_keys, call.h_kv, d_qk).to(accumulate)
        stored = key < lengths[:, None]  # [rows, keys]
        # Rows past the length may hold NaN, and 0 * NaN is NaN: clear them before they meet a zero probability.
        kv = kv.masked_fill(~stored[:, :, None, None], 0)
        queries = q[rows].to(accumulate).unflatten(2, (call.h_kv, group))  # [rows, seqlen_q, h_kv, group, d_qk]
        scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, kv) * softmax_scale
        visible = stored[:, None, :].expand(-1, call.seqlen_q, -1)
        if call.causal:
            last = lengths[:, None] - torch.arange(call.seqlen_q - 1, -1, -1, device=q.device)  # [rows, seqlen_q]
            visible = visible & (key < last[:, :, None])
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        part_lse = scores.logsumexp(-1)  # [rows, h_kv, group, seqlen_q]
        empty = part_lse == float("-inf")
        # Not exp(scores - lse): a rounded lse of 10 would cost every probability 1e-6 in fp32.
        probability = scores.softmax(-1).masked_fill(empty.unsqueeze(-1), 0)
        mixed = torch.einsum("bhgqk,bkhd->bqhgd", probability, kv[..., : call.kv_lora_rank])
        out[rows] = mixed.flatten(2, 3).to(q.dtype)
        lse[rows] = part_lse.masked_fill(empty, float("inf")).flatten(1, 2)
    return out, lse


def append(
    call: AppendCall, kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write each new token's `[latent | rotated key]` row into its slot, in place.

    Shapes as in `contract.check_append`. Two tokens share a slot only if equal or unread.
    """
    block, offset = slots // call.block_size, slots % call.block_size
    kv_cache[block, offset] = torch.cat((latent, k_rope), dim=-1)
