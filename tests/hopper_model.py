"""What the decode, combine and plan kernels do, in numpy, from the bytes that a launch hands over and nothing else.

Written from the comments in `kernels/params.cuh`: tensor maps are walked as TMA walks them, addresses are read and
written where they point. What the host side gets wrong comes out as a wrong number or a failed assertion.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from fake_cuda import Launch

from flash_mla import _build
from flash_mla.backends import torch as definition
from flash_mla.backends.cuda.params import COMBINE, COMBINE_FIELDS, DECODE, DECODE_FIELDS
from flash_mla.backends.cuda.plan import PARAMS

BLOCK_N = 64
PLAN_WHOLE = 1 << 30
COMBINE_SOURCE = (_build.KERNELS / "combine.cu").read_text()
# Form of the merge -> name of its number of threads, columns per CTA ("KV_LORA_RANK" = all, "" = all, a warp per row).
FORMS = {
    form: (threads, columns)
    for form, threads, columns in re.findall(
        r"COMBINE_KERNEL\((\w+?)_##\w+, (\w+), \d+, \(combine_(?:row<KV_LORA_RANK, LAYOUT, (\w+), |warp<)",
        COMBINE_SOURCE,
    )
}


@dataclass(frozen=True)
class Map:
    """Arguments of one tensor map; sizes, strides (bytes) and box innermost first."""

    address: int
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    l2_promotion: int

    def packed(self) -> bytes:
        """128 bytes, as `hopper_on_host.h` reads them."""
        return struct.pack("=16Q", self.address, *self.sizes, *self.strides, *self.box, self.swizzle)

    def rows(self) -> np.ndarray:
        """Its memory as `[outer, heads, rows, d_qk]`; fp16, which numpy has."""
        assert self.dtype == "float16"
        columns, rows, tiles, heads, outer = self.sizes
        row, tile, head, out = self.strides
        whole = view(self.address, (outer, heads, rows, tiles, columns), np.float16, (out, head, row, tile, 2))
        return whole.reshape(outer, heads, rows, tiles * columns)


def view(address: int, shape: tuple[int, ...], dtype: type, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """An array at an address; contiguous unless strides (bytes) are given."""
    size = np.dtype(dtype).itemsize
    if strides is None:
        strides = tuple(size * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    extent = size + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * extent).from_address(address)
    return np.ndarray(shape, dtype, memory, strides=strides)


def decode_fields(launch: Launch) -> dict[str, int]:
    assert len(launch.params) == DECODE.size, "sizes of DecodeParams: here and in the cubin"
    names = ("q_map", "kv_map", *(name for name, _ in DECODE_FIELDS))
    return dict(zip(names, DECODE.unpack(launch.params), strict=True))


def combine_fields(launch: Launch) -> dict[str, int]:
    assert len(launch.params) == COMBINE.size, "sizes of CombineParams: here and in the cubin"
    return dict(zip((name for name, _ in COMBINE_FIELDS), COMBINE.unpack(launch.params), strict=True))


def items_of(items: int, slot: int) -> Iterator[tuple[int, int, int]]:
    """(request, begin, end) of a slot's items in order."""
    row = slot
    while row >= 0:
        request, begin, end, row = view(items + row * 16, (4,), np.int32).tolist()
        if request < 0:
            return
        yield request, begin, end


def do_decode(launch: Launch, maps: dict[bytes, Map]) -> None:
    """`flash_fwd_splitkv_mla_kernel_*`, CTA by CTA; a CTA has 64 query rows, or as many as "few" says."""
    p = decode_fields(launch)
    few = re.search(r"_few(\d+)_", launch.kernel)
    tile_rows = int(few[1]) if few else 64
    rank = int(launch.kernel.split("_")[-2])
    q_map, kv_map = maps[p["q_map"]], maps[p["kv_map"]]
    q, kv = q_map.rows(), kv_map.rows()
    box_rows = p["box_rows"]
    assert p["block_size"] == kv.shape[2]
    assert p["block_size"] % box_rows == BLOCK_N % box_rows == 0
    assert q_map.box[:3] == (64, tile_rows, q_map.sizes[2])
    # A third of a unit for few rows. Boxes of fewer tokens are one tile, as they are where a row is not whole tiles.
    tiles = kv_map.sizes[2] // (3 if few else 1)
    assert kv_map.box[:3] == (64, box_rows, tiles if box_rows == BLOCK_N else 1)
    assert launch.grid == (p["num_slots"] * p["tiles"], 1, 1)
    assert p["row_tiles"] * tile_rows >= q.shape[2] > (p["row_tiles"] - 1) * tile_rows
    shape = (p["seqlen_q"], p["num_heads"])
    scale = float(p["softmax_scale_log2"])
    for cta in range(launch.grid[0]):
        slot, tile = divmod(cta, p["tiles"])
        kv_head, first_row = tile // p["row_tiles"], tile % p["row_tiles"] * tile_rows
        rows = np.arange(first_row, min(first_row + tile_rows, p["seqlen_q"] * p["group"]))
        query, head = rows // p["group"], kv_head * p["group"] + rows % p["group"]
        for request, begin, end in items_of(p["items"], slot):
            assert request < q.shape[0]
            assert 0 <= begin < end <= PLAN_WHOLE
            length = max(0, int(view(p["cache_seqlens"] + request * p["seqlens_stride"] * 4, (1,), np.int32)[0]))
            units = -(-length // BLOCK_N)
            tokens = np.arange((units * begin >> 30) * BLOCK_N, min((units * end >> 30) * BLOCK_N, length))
            table = p["block_table"] + request * p["table_stride_request"] * 4
            strides = [table + token // p["block_size"] * p["table_stride_page"] * 4 for token in tokens.tolist()]
            pages = np.array([view(address, (1,), np.int32)[0] for address in strides], dtype=np.int64)
            keys = kv[pages, kv_head, tokens % p["block_size"]].astype(np.float64)
            scores = q[request, kv_head, rows].astype(np.float64) @ keys.T * scale
            if p["is_causal"]:
                scores[tokens >= (length - (p["seqlen_q"] - 1 - query))[:, None]] = -np.inf
            top = scores.max(1, initial=-np.inf)
            weights = np.exp2(scores - np.where(np.isinf(top), 0, top)[:, None])
            total = weights.sum(1)
            sees = total > 0
            o = weights @ keys[:, :rank] / np.where(sees, total, 1)[:, None]
            log_sum = np.where(sees, top + np.log2(np.where(sees, total, 1)), -np.inf)
            if begin == 0 and end == PLAN_WHOLE:
                view(p["out"], (request + 1, *shape, rank), np.float16)[request, query, head] = o
                natural = np.where(sees, log_sum * math.log(2), np.inf)
                view(p["lse"], (request + 1, *shape[::-1]), np.float32)[request, head, query] = natural
            else:
                part = p["num_slots"] + slot if begin == 0 else slot
                columns, sums, order = partial_results(p, shape, rank, "few" if few else "")
                together = o[:, order].reshape(len(rows), *columns.shape[3:])  # what shares a scale
                scales = 2.0 ** (np.frexp(np.abs(together).max(2))[1] - 15.0)
                columns[part, query, head] = together / scales[..., None]
                sums[part, query, head] = np.column_stack((log_sum, scales))


def partial_results(
    p: dict[str, int], shape: tuple[int, int], rank: int, layout: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all parts and rows, as `kernels/partial.cuh` has them: columns, those that share a scale together; log-sum and
    scales; the column at each position of a row."""
    position = np.arange(rank)
    if layout == "few":
        scales, half = 8, rank // 2
        column = position // half * half + position % half // 64 * 16  # a half, a warp's 16 of each tile of 64
        column += position % 8 // 2 * 64 + position % 2 * 8 + position % 64 // 8
    elif layout == "pair":
        scales, half = 8, rank // 2
        column = position // half * half + position % half // 64 * 16
        column += position % 8 // 2 * 64 + position % 2 + position % 64 // 8 * 2
    else:
        scales = 2
        column = position // 16 * 16 + position % 4 // 2 * 8 + position // 4 % 4 * 2 + position % 2
    assert sorted(column) == list(range(rank))
    parts = 2 * p["num_slots"]
    columns = view(p["o_partial"], (parts, *shape, scales, rank // scales), np.float16)
    sums = view(p["partial_sums"], (1 + scales, *shape, parts), np.float32)
    return columns, sums.transpose(3, 1, 2, 0), column


def do_combine(launch: Launch) -> None:
    """`flash_fwd_mla_combine_kernel_*`; every row of every cut request once. "few", "pair": the order of columns."""
    p = combine_fields(launch)
    form, *layout, _, number = launch.kernel.partition("_kernel_")[2].split("_")
    rank = int(number)
    shape = (p["seqlen_q"], p["num_heads"])
    rows = math.prod(shape)
    name, cta_columns = FORMS[form]
    (threads,) = (
        int(number) for number in re.findall(rf"^constexpr int {name} = (\d+);", COMBINE_SOURCE, re.MULTILINE)
    )
    assert launch.block == (threads, 1, 1)
    if cta_columns:
        groups = launch.grid[0]
        assert launch.grid[1:] == (rows, rank // (int(cta_columns) if cta_columns.isdigit() else rank))
    else:
        groups, more = divmod(launch.grid[0], -(-rows * 32 // threads))
        assert (more, *launch.grid[1:]) == (0, 1, 1)
    columns, sums, order = partial_results(p, shape, rank, "".join(layout))
    for index in range(groups):
        request = p["first_request"] + index
        if p["by_slot"]:
            request, begin, *_ = view(p["items"] + index * 16, (4,), np.int32).tolist()
            if index == 0 or request < 0 or begin == 0:
                continue
        slot, num_parts = view(p["splits"] + request * 8, (2,), np.int32).tolist()
        slot -= p["first_slot"]
        if num_parts < 2 or (p["by_slot"] and slot + 1 != index):
            continue
        parts = [p["num_slots"] + slot, *range(slot + 1, slot + num_parts)]
        log_sums = sums[parts][..., 0].astype(np.float64)
        o = columns[parts].astype(np.float64) * sums[parts][..., 1:, None]
        top = log_sums.max(0)
        weights = np.exp2(log_sums - np.where(np.isinf(top), 0, top))
        total = weights.sum(0)
        sees = total > 0
        o = o.reshape(*weights.shape, rank)[..., np.argsort(order)]
        merged = (weights[..., None] * o).sum(0) / np.where(sees, total, 1)[..., None]
        if "_bf16_" in launch.kernel:  # numpy has none
            bits = torch.from_numpy(merged).to(torch.bfloat16).view(torch.int16).numpy()
            view(p["out"], (request + 1, *shape, rank), np.int16)[request] = bits
        else:
            view(p["out"], (request + 1, *shape, rank), np.float16)[request] = merged
        natural = (top + np.log2(np.where(sees, total, 1))) * math.log(2)
        view(p["lse"], (request + 1, *shape[::-1]), np.float32)[request] = np.where(sees, natural, np.inf).T


def do_plan(launch: Launch) -> None:
    """`plan_splits` and `plan_fixed`: the definition's integers at the addresses that came."""
    lengths, items, splits, stride, batch, num_slots, *_ = PARAMS.unpack(launch.params)
    values = view(lengths, (batch,), np.int32, (stride * 4,)).copy()
    made = definition.plan(torch.from_numpy(values), num_slots, launch.kernel == "plan_fixed")
    view(items, (num_slots + batch, 4), np.int32)[:] = made[0].numpy()
    view(splits, (batch, 2), np.int32)[:] = made[1].numpy()
