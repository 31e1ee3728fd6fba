"""The Triton device code of the split plan. Rule and layout are those of `backends.torch.plan`, integer for integer.

One program, because the walk through the requests is serial: 32 lanes walk with 32 capacities of a slot, then the
program walks with the smallest that suffices and notes where each request begins, then the notes become rows. A walk
takes one step per request, however many slots that request fills.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["plan_fixed_kernel", "plan_kernel"]

# The cut point behind the last unit of a request: fractions in 2^-30, see contract.PLAN_WHOLE.
WHOLE = tl.constexpr(2**30)


@triton.jit
def units_of(length, UNIT: tl.constexpr):
    # 64 bits: length + 63 overflows int32 from 2^31 - 63 on.
    return (tl.maximum(length, 0).to(tl.int64) + (UNIT - 1)) // UNIT


@triton.jit
def cut_point(units_before, units):
    """units_before of units as a fraction, rounded up: units * fraction >> 30 is units_before again."""
    units = tl.maximum(units, 1)
    return ((units_before * WHOLE + units - 1) // units).to(tl.int32)


@triton.jit
def place(units, slot, room, capacity, ITEM_COST: tl.constexpr, CUT_COST: tl.constexpr, MIN_TAKE: tl.constexpr):
    """One step of the walk: (slot of the first part, number of parts, units of the first part), new slot and room.

    What the first slot does not hold begins slots of its own, each taking as much as it can: no step per slot.
    """
    PIECE_COST: tl.constexpr = ITEM_COST + CUT_COST
    moves_on = (units + ITEM_COST > room) & (room < PIECE_COST + MIN_TAKE)
    slot = tl.where(moves_on, slot + 1, slot)
    room = tl.where(moves_on, capacity, room)
    is_whole = units + ITEM_COST <= room
    taken = tl.where(is_whole, units, room - PIECE_COST)
    left = (units - taken).to(tl.int32)
    most = capacity - PIECE_COST
    # No request has more than 2^25 units: cut short there, the quotient is the same and takes a 32-bit division.
    divisor = tl.minimum(most, 2**25).to(tl.int32)
    more = tl.where(is_whole, 0, (left + divisor - 1) // divisor)
    room = tl.where(is_whole, room - units - ITEM_COST, more * most - left)
    return slot, 1 + more, taken, slot + more, room


@triton.jit
def write_later_parts(
    cache_seqlens, items, splits, seqlens_stride, batch, num_slots, most, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of slots that go on with a request; the rows of all other slots are marked unused for now."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_slots, BLOCK):
        slot = start + lane
        is_slot = slot < num_slots
        # The last request that begins in a slot before this one: slots of first parts ascend.
        below = tl.zeros([BLOCK], tl.int32)
        above = tl.zeros([BLOCK], tl.int32) + batch
        span = batch
        while span > 0:
            is_open = is_slot & (below < above)
            middle = (below + above) // 2
            goes_right = is_open & (tl.load(splits + middle * 2, is_open, other=0) < slot)
            below = tl.where(goes_right, middle + 1, below)
            above = tl.where(is_open & (goes_right == 0), middle, above)
            span = span // 2
        request = below - 1
        found = is_slot & (request >= 0)
        part = slot - tl.load(splits + request * 2, found, other=0)
        num_parts = tl.load(splits + request * 2 + 1, found, other=0)
        is_later = found & (part < num_parts)
        is_last = part + 1 == num_parts
        length = tl.load(cache_seqlens + request.to(tl.int64) * seqlens_stride, is_later, other=0)
        units = units_of(length, UNIT)
        taken = tl.load(items + (num_slots + request) * 4 + 2, is_later, other=0)
        begin = taken + (part - 1) * most
        next_slot = tl.load(splits + (request + 1) * 2, is_later & (request + 1 < batch), other=-1)
        row = items + slot * 4
        tl.store(row, tl.where(is_later, request, -1), is_slot)
        tl.store(row + 1, tl.where(is_later, cut_point(begin, units), 0), is_slot)
        end = tl.where(is_last, WHOLE, cut_point(begin + most, units))
        tl.store(row + 2, tl.where(is_later, end, 0), is_slot)
        tl.store(row + 3, tl.where(next_slot == slot, num_slots + request + 1, -1), is_slot)


@triton.jit
def write_first_parts(
    cache_seqlens, items, splits, seqlens_stride, batch, num_slots, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of items that begin a request: the slot's own row if it begins with it, else the request's spare row."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, batch, BLOCK):
        request = start + lane
        is_request = request < batch
        first = tl.load(splits + request * 2, is_request, other=0)
        num_parts = tl.load(splits + request * 2 + 1, is_request, other=0)
        has_before = is_request & (request > 0)
        slot_before = tl.load(splits + request * 2 - 2, has_before, other=-1)
        slot_before += tl.load(splits + request * 2 - 1, has_before, other=1) - 1
        next_slot = tl.load(splits + request * 2 + 2, request + 1 < batch, other=-1)
        length = tl.load(cache_seqlens + request.to(tl.int64) * seqlens_stride, is_request, other=0)
        spare = items + (num_slots + request) * 4
        taken = tl.load(spare + 2, is_request, other=0).to(tl.int64)
        end = tl.where(num_parts == 1, WHOLE, cut_point(taken, units_of(length, UNIT)))
        following = tl.where(next_slot == first, num_slots + request + 1, -1)
        is_first = first > slot_before
        row = items + tl.where(is_first, first, num_slots + request) * 4
        tl.store(row, request, is_request)
        tl.store(row + 1, 0, is_request)
        tl.store(row + 2, end, is_request)
        tl.store(row + 3, following, is_request)
        tl.store(spare, -1, is_request & is_first)
        tl.store(spare + 1, 0, is_request & is_first)
        tl.store(spare + 2, 0, is_request & is_first)
        tl.store(spare + 3, -1, is_request & is_first)


@triton.jit(do_not_specialize=["batch", "num_slots"])
def plan_kernel(
    cache_seqlens,  # int32 [batch]
    items,  # int32 [num_slots + batch, 4]
    splits,  # int32 [batch, 2]
    seqlens_stride,
    batch,
    num_slots,
    UNIT: tl.constexpr,  # tokens
    ITEM_COST: tl.constexpr,  # units
    CUT_COST: tl.constexpr,  # units
    MIN_TAKE: tl.constexpr,  # units
    CANDIDATES: tl.constexpr,  # capacities of a slot, one per lane
    BLOCK: tl.constexpr,  # requests, or slots, at a time
):
    """One program: the smallest capacity of a slot that suffices, then the rows of items and splits."""
    lane = tl.arange(0, BLOCK)
    total = tl.full([], 0, tl.int64)
    for start in range(0, batch, BLOCK):
        request = start + lane
        length = tl.load(cache_seqlens + request.to(tl.int64) * seqlens_stride, request < batch, other=0)
        total += tl.sum(tl.where(request < batch, units_of(length, UNIT) + ITEM_COST, 0), 0)
    lowest = tl.maximum((total + num_slots - 1) // num_slots, ITEM_COST + CUT_COST + MIN_TAKE)

    capacities = lowest + tl.arange(0, CANDIDATES)
    slots = tl.zeros([CANDIDATES], tl.int32)
    rooms = capacities
    cursor = cache_seqlens
    for _ in range(0, batch):
        units = units_of(tl.load(cursor), UNIT)
        cursor += seqlens_stride
        _, _, _, slots, rooms = place(units, slots, rooms, capacities, ITEM_COST, CUT_COST, MIN_TAKE)
    # The last candidates always suffice: contract.PLAN_CANDIDATES.
    capacity = tl.min(tl.where(slots < num_slots, capacities, lowest + CANDIDATES), 0)

    # Notes for what follows: the splits, and in column 2 of row num_slots + request the units of its first part.
    slot = tl.full([], 0, tl.int32)
    room = capacity
    cursor = cache_seqlens
    for request in range(0, batch):
        units = units_of(tl.load(cursor), UNIT)
        cursor += seqlens_stride
        first, num_parts, taken, slot, room = place(units, slot, room, capacity, ITEM_COST, CUT_COST, MIN_TAKE)
        tl.store(splits + request * 2, first)
        tl.store(splits + request * 2 + 1, num_parts)
        tl.store(items + (num_slots + request) * 4 + 2, taken.to(tl.int32))
    tl.debug_barrier()  # other threads of this program read the notes next
    most = capacity - (ITEM_COST + CUT_COST)
    write_later_parts(cache_seqlens, items, splits, seqlens_stride, batch, num_slots, most, UNIT, BLOCK)
    tl.debug_barrier()  # it reads the notes of rows that are written next
    write_first_parts(cache_seqlens, items, splits, seqlens_stride, batch, num_slots, UNIT, BLOCK)


@triton.jit(do_not_specialize=["batch", "num_slots"])
def plan_fixed_kernel(
    cache_seqlens,  # int32 [batch]
    items,  # int32 [num_slots + batch, 4]
    splits,  # int32 [batch, 2]
    seqlens_stride,
    batch,
    num_slots,
    UNIT: tl.constexpr,  # tokens
    MAX_PARTS: tl.constexpr,
    FIXED_UNITS: tl.constexpr,  # units
    BLOCK: tl.constexpr,  # rows per program
):
    """The deterministic plan: part p of request r, equal to the others, in row r * MAX_PARTS + p."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    request = index // MAX_PARTS
    part = index % MAX_PARTS
    is_request = request < batch
    length = tl.load(cache_seqlens + request.to(tl.int64) * seqlens_stride, is_request, other=0)
    units = units_of(length, UNIT)
    num_parts = tl.minimum(tl.maximum((units + (FIXED_UNITS - 1)) // FIXED_UNITS, 1), MAX_PARTS).to(tl.int32)
    is_part = is_request & (part < num_parts)
    begin = cut_point(units * part // num_parts, units)
    end = tl.where(part + 1 == num_parts, WHOLE, cut_point(units * (part + 1) // num_parts, units))
    is_row = index < num_slots + batch
    row = items + index * 4
    tl.store(row, tl.where(is_part, request, -1), is_row)
    tl.store(row + 1, tl.where(is_part, begin, 0), is_row)
    tl.store(row + 2, tl.where(is_part, end, 0), is_row)
    tl.store(row + 3, -1, is_row)
    tl.store(splits + request * 2, request * MAX_PARTS, is_request & (part == 0))
    tl.store(splits + request * 2 + 1, num_parts, is_request & (part == 0))
