"""The definition of every op in plain torch: any device, any floating dtype, any page size. The other backends are
measured against this one, and this one against `F.scaled_dot_product_attention` on expanded keys and values.
"""

from __future__ import annotations

from typing import Any

import torch

from ..codec import decode_rows, encode_rows
from ..contract import (
    CUT_COST,
    FIXED_UNITS,
    ITEM_COST,
    MAX_PARTS,
    MIN_TAKE,
    PLAN_BLOCK,
    PLAN_CANDIDATES,
    PLAN_WHOLE,
    AppendCall,
    DecodeCall,
    check_slots,
)

__all__ = [
    "append",
    "append_refusals",
    "decode",
    "decode_refusals",
    "next_slots",
    "num_slots",
    "plan",
    "plan_whole",
    "sparse_decode",
]

# Elements of gathered latents held at once: 2**26 fp32 elements are 256 MiB.
GATHER_ELEMENTS = 2**26
# Columns of a score in fp32 that are summed by themselves (see `_products`).
SUMMED_COLUMNS = 32


def decode_refusals(call: DecodeCall) -> list[str]:
    """The definition takes every valid call."""
    return []


def append_refusals(call: AppendCall) -> list[str]:
    """The definition takes every valid call."""
    return []


def num_slots(call: DecodeCall) -> int:
    """A slot per request: nothing runs side by side here."""
    return max(1, call.batch)


def plan(cache_seqlens: torch.Tensor, num_slots: int, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal the requests out to `num_slots` slots, in order, so that the fullest slot is as little full as possible.

    A slot has room for `capacity` units. It takes whole requests, at units + ITEM_COST each, until the next one does
    not fit; of that one it takes what fills it (if that is MIN_TAKE units at least), and the slots after it take the
    rest. A piece of a cut request costs CUT_COST more. The capacity is the smallest of PLAN_CANDIDATES that suffices.

    Args:
        cache_seqlens: int32 `[batch]`, tokens; below 0 counts as 0.
        num_slots: slots to deal out to, >= 1; for a deterministic plan `contract.fixed_slots(batch)` or more.
        deterministic: cut every request by its own length alone, each part in a slot of its own.
    Returns: items int32 `[num_slots + batch, 4]`, splits int32 `[batch, 2]`.
        A row of items is (request, begin, end, next): units `[units * begin >> 30, units * end >> 30)` of the request
        as long as it is when the plan is used, then the item in row `next`; -1 ends the slot. Row s < num_slots is the
        first item of slot s; request r that begins in a slot after another one is in row num_slots + r. An unused row
        is (-1, 0, 0, -1).
        A row of splits is (slot of part 0, number of parts); parts p >= 1 are the first items of slots `slot + p`.
        Part 0 of a cut request has its partial result at index num_slots + slot, part p >= 1 at slot + p: a slot ends
        with at most one part 0 and begins with at most one later part, so 2 * num_slots partial results are enough.
    The definition walks through the lengths on the host: the integers above are promised for CPU tensors. Lengths in
    other memory are not read (it would make the host wait): every request stays whole, in the same layout, which is
    all that this backend needs. Deterministic plans are the same everywhere.
    """
    batch = cache_seqlens.shape[0]
    check_slots(batch, num_slots, deterministic)
    if deterministic:
        return _plan_fixed(cache_seqlens, num_slots)
    if cache_seqlens.device.type != "cpu":
        return plan_whole(cache_seqlens, num_slots)
    units = [(max(length, 0) + PLAN_BLOCK - 1) // PLAN_BLOCK for length in cache_seqlens.tolist()]
    even_share = -(-(sum(units) + ITEM_COST * batch) // num_slots)
    lowest = max(even_share, ITEM_COST + CUT_COST + MIN_TAKE)
    candidates = (_walk(units, num_slots, lowest + candidate) for candidate in range(PLAN_CANDIDATES))
    requests = next(pieces for pieces in candidates if pieces is not None)

    items = [[-1, 0, 0, -1] for _ in range(num_slots + batch)]
    splits = []
    last_row = [-1] * num_slots  # of each slot, so far
    for request, (first_slot, ends) in enumerate(requests):
        splits.append([first_slot, len(ends)])
        begin = 0
        for slot, end in enumerate(ends, start=first_slot):
            cut = PLAN_WHOLE if end == units[request] else -(-end * PLAN_WHOLE // units[request])
            row = slot if last_row[slot] < 0 else num_slots + request
            if last_row[slot] >= 0:
                items[last_row[slot]][3] = row
            items[row] = [request, begin, cut, -1]
            last_row[slot] = row
            begin = cut
    return (
        torch.tensor(items, dtype=torch.int32).reshape(num_slots + batch, 4),
        torch.tensor(splits, dtype=torch.int32).reshape(batch, 2),
    )


def _walk(units: list[int], num_slots: int, capacity: int) -> list[tuple[int, list[int]]] | None:
    """For each request the slot of its first part and the units at which its parts end; None if the slots run out."""
    requests = []
    slot, room = 0, capacity
    for left in units:
        ends: list[int] = []
        first_slot, taken = slot, 0
        while left + ITEM_COST + (CUT_COST if ends else 0) > room:
            take = room - ITEM_COST - CUT_COST
            if take >= MIN_TAKE:
                taken, left = taken + take, left - take
                ends.append(taken)
            slot, room = slot + 1, capacity
            if slot == num_slots:
                return None
            if not ends:
                first_slot = slot
        room -= left + ITEM_COST + (CUT_COST if ends else 0)
        requests.append((first_slot, [*ends, taken + left]))
    return requests


def plan_whole(cache_seqlens: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every request whole, as many to each slot whatever their lengths; from the shape alone, on the device."""
    batch = cache_seqlens.shape[0]
    request = torch.arange(batch, device=cache_seqlens.device)
    slot = request if batch <= num_slots else request * num_slots // batch
    is_first = torch.ones_like(request, dtype=torch.bool)
    is_first[1:] = slot[1:] != slot[:-1]
    row = torch.where(is_first, slot, num_slots + request)
    items = _unused_rows(cache_seqlens, num_slots)
    following = torch.full_like(request, -1)
    following[:-1] = torch.where(is_first[1:], -1, row[1:])
    values = (request, torch.zeros_like(request), torch.full_like(request, PLAN_WHOLE), following)
    items[row] = torch.stack(values, dim=1).to(torch.int32)
    return items, torch.stack((slot, torch.ones_like(slot)), dim=1).to(torch.int32)


def _plan_fixed(cache_seqlens: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Part p of request r in slot r * MAX_PARTS + p: ceil(units / FIXED_UNITS) equal parts, at most MAX_PARTS."""
    batch = cache_seqlens.shape[0]
    units = (cache_seqlens.clamp(min=0).long() + PLAN_BLOCK - 1) // PLAN_BLOCK
    parts = ((units + FIXED_UNITS - 1) // FIXED_UNITS).clamp(1, MAX_PARTS)
    edge = torch.arange(MAX_PARTS + 1, device=cache_seqlens.device)
    some = units.clamp(min=1).unsqueeze(1)  # a request without tokens is one part, whose cut points need no units
    cuts = (units.unsqueeze(1) * edge // parts.unsqueeze(1) * PLAN_WHOLE + some - 1) // some
    cuts = torch.where(edge < parts.unsqueeze(1), cuts, PLAN_WHOLE)
    request = torch.arange(batch, device=cache_seqlens.device)
    columns = (request.unsqueeze(1).expand(-1, MAX_PARTS), cuts[:, :-1], cuts[:, 1:], torch.full_like(cuts[:, 1:], -1))
    items = _unused_rows(cache_seqlens, num_slots)
    rows = torch.stack(columns, dim=2).to(torch.int32)
    is_part = (edge[:-1] < parts.unsqueeze(1)).unsqueeze(2)
    unused = items[: batch * MAX_PARTS].unflatten(0, (batch, MAX_PARTS))
    items[: batch * MAX_PARTS] = torch.where(is_part, rows, unused).flatten(0, 1)
    return items, torch.stack((request * MAX_PARTS, parts), dim=1).to(torch.int32)


def _unused_rows(cache_seqlens: torch.Tensor, num_slots: int) -> torch.Tensor:
    items = torch.zeros((num_slots + cache_seqlens.shape[0], 4), dtype=torch.int32, device=cache_seqlens.device)
    items[:, 0::3] = -1
    return items


def decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None = None,
    splits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over gathered pages; scores, softmax and sums in fp32 (fp64 for fp64 input). Ignores a split plan.

    Shapes as in `contract.check_decode`; returns out `[batch, seqlen_q, num_heads, kv_lora_rank]` in q's dtype and lse
    `[batch, num_heads, seqlen_q]` fp32 (fp64 for fp64 input), natural log, +inf where nothing is visible.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=q.device)
    lse = torch.empty((call.batch, call.num_heads, call.seqlen_q), dtype=accumulate, device=q.device)
    if call.num_blocks == 0:  # no pool, so no token
        return out.zero_(), lse.fill_(float("inf"))
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
        kv = _rows(call, kv_cache, pages, accumulate).flatten(1, 2)  # [rows, keys, h_kv, d_qk]
        stored = key < lengths[:, None]  # [rows, keys]
        # Rows past the length may hold NaN, and 0 * NaN is NaN: clear them before they meet a zero probability.
        kv = kv.masked_fill(~stored[:, :, None, None], 0)
        queries = q[rows].to(accumulate).unflatten(2, (call.h_kv, group))  # [rows, seqlen_q, h_kv, group, d_qk]
        of_head = queries.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)  # [rows * h_kv, group * seqlen_q, d_qk]
        scores = _products(of_head, kv.transpose(1, 2).flatten(0, 1), q.dtype) * softmax_scale
        scores = scores.view(len(kv), call.h_kv, group, call.seqlen_q, num_keys)
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


def _adds_one_by_one(device: torch.device) -> bool:
    """Whether a batched product in fp32 may add all columns to one running sum: a CPU's library sums in blocks."""
    return device.type != "cpu"


def _products(queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Every query of `[n, queries, d_qk]` times every key of `[n, keys, d_qk]` that stands beside it.

    A running sum in fp32 rounds at each column: over 576 that is five times the error that the product of two matrices
    has on an H200. There what came in fp32 is summed by SUMMED_COLUMNS columns, and these sums one to another. `dtype`
    is that of the call's queries: of 16-bit ones the result is rounded a hundred times as much.
    """
    if dtype != torch.float32 or not _adds_one_by_one(queries.device):
        return queries @ keys.mT
    total = queries.new_zeros((*queries.shape[:2], keys.shape[1]))
    for of_queries, of_keys in zip(queries.split(SUMMED_COLUMNS, -1), keys.split(SUMMED_COLUMNS, -1), strict=True):
        total.baddbmm_(of_queries, of_keys.mT)
    return total


def _rows(call: DecodeCall, kv_cache: torch.Tensor, where: Any, dtype: torch.dtype) -> torch.Tensor:
    """`kv_cache[where]` as `[..., d_qk]` in `dtype`, whatever the rows are made of."""
    if not call.fp8:
        rows: torch.Tensor = kv_cache[where].to(dtype)
        return rows
    rows = kv_cache.view(torch.uint8)[where]
    return torch.cat(decode_rows(rows, call.kv_lora_rank, call.qk_rope_head_dim, dtype), dim=-1)


def sparse_decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
    wants_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of each query to the rows of the pool that it names; a row named twice counts twice.

    Args:
        call: with every query as a request: `batch` queries of `seqlen_q` = 1, `max_blocks` = topk.
        q: `[queries, 1, num_heads, d_qk]`.
        kv_cache: `[num_blocks, block_size, 1, d_qk]`, or FP8 rows.
        indices: int32 `[queries, topk]`, block * block_size + offset; outside the pool: no token.
        lengths: int32 `[queries]`, how many of the first indices count, or None.
        softmax_scale: multiplier of the scores.
        attn_sink: fp32 `[num_heads]`: one more entry of each softmax, without a value, in natural log; or None.
        wants_max: whether to return the largest scaled score.
    Returns: out `[queries, 1, num_heads, kv_lora_rank]`, lse and, if wanted, the largest score, both fp32 (fp64 for
        fp64) `[queries, num_heads, 1]`, natural log, without the sink. Where nothing is visible: 0, +inf, -inf.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=q.device)
    lse = torch.empty((call.batch, call.num_heads, 1), dtype=accumulate, device=q.device)
    largest = torch.empty_like(lse) if wants_max else None
    num_rows, topk, d_qk = call.num_blocks * call.block_size, call.max_blocks, q.shape[3]
    if num_rows == 0 or topk == 0:
        return out.zero_(), lse.fill_(float("inf")), None if largest is None else largest.fill_(float("-inf"))
    step = max(1, GATHER_ELEMENTS // (topk * d_qk))
    place = torch.arange(topk, device=q.device)
    for begin in range(0, call.batch, step):
        part = slice(begin, min(begin + step, call.batch))
        slots = indices[part].long()
        visible = (slots >= 0) & (slots < num_rows)
        if lengths is not None:
            visible &= place < lengths[part, None]
        slots = torch.where(visible, slots, 0)
        kv = _rows(call, kv_cache, (slots // call.block_size, slots % call.block_size, 0), accumulate)
        # Row 0 stands in for what is not visible and may hold NaN, and 0 * NaN is NaN.
        kv = kv.masked_fill(~visible.unsqueeze(-1), 0)
        scores = _products(q[part, 0].to(accumulate), kv, q.dtype) * softmax_scale
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
        part_lse = scores.logsumexp(-1)
        empty = part_lse == float("-inf")
        probability = scores.softmax(-1).masked_fill(empty.unsqueeze(-1), 0)
        mixed = probability @ kv[..., : call.kv_lora_rank]
        if attn_sink is not None:  # exp(lse) / (exp(lse) + exp(sink))
            mixed = mixed * torch.sigmoid(part_lse - attn_sink.to(accumulate)).masked_fill(empty, 0).unsqueeze(-1)
        out[part, 0] = mixed.to(q.dtype)
        lse[part, :, 0] = part_lse.masked_fill(empty, float("inf"))
        if largest is not None:
            largest[part, :, 0] = scores.amax(-1)
    return out, lse, largest


def next_slots(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    seqlen_q: int,
    block_size: int,
    valid: torch.Tensor | None = None,
    capacity: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the new tokens of a forward go.

    Args:
        block_table: int32 `[batch, max_blocks]`, max_blocks >= 1.
        cache_seqlens: int32 `[batch]`, tokens before this forward.
        seqlen_q: new positions per request.
        block_size: tokens per page.
        valid: bool `[batch, seqlen_q]`, False where a position is padding; None: all are tokens.
        capacity: tokens that a request can hold; None: what its pages hold, the caller sees to it.
    Returns: slots int64 `[batch, seqlen_q]`, block * block_size + offset of each token behind those that are there, 0
        for padding and past the capacity; int32 `[batch]`, the lengths with those that are stored.
    """
    before = cache_seqlens.long()[:, None]
    rank = before + (torch.arange(seqlen_q, device=block_table.device) if valid is None else valid.cumsum(1) - 1)
    # A number outside the row gives some slot of the row; what is not stored goes to page 0 below.
    block = (rank.clamp(min=0) // block_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table.gather(1, block).long() * block_size + rank % block_size
    if valid is None and capacity is None:
        return slots, cache_seqlens + seqlen_q
    stored = torch.ones_like(rank, dtype=torch.bool) if valid is None else valid
    if capacity is not None:
        stored = stored & (rank < capacity)
    return torch.where(stored, slots, 0), cache_seqlens + stored.sum(1, dtype=torch.int32)


def append(
    call: AppendCall,
    kv_cache: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
) -> None:
    """Write each new token's `[latent | rotated key]` row into its slot, in place, and `q_rope` into the last columns
    of `q`.

    Shapes as in `contract.check_append`. Two tokens share a slot only if equal or unread.
    """
    block, offset = slots // call.block_size, slots % call.block_size
    if call.fp8:
        kv_cache.view(torch.uint8)[block, offset] = encode_rows(latent, k_rope)
    else:
        kv_cache[block, offset] = torch.cat((latent, k_rope), dim=-1)
    if q is not None and q_rope is not None:
        q[..., call.kv_lora_rank :] = q_rope
