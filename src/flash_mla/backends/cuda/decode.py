"""Decode on Hopper: which calls the compiled kernel takes, how many CTAs share them, and the two launches.

The second launch merges the parts of cut requests. It is programmatic: it is set up while decode runs. It is left out
where a plan has no room for cuts. (Over 400 lines: a kernel's form, its tensor maps and its parameters follow from one
another.)
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ...codec import row_layout
from ...contract import LATENT_SHAPES, PLAN_BLOCK, DecodeCall, fixed_slots
from . import driver
from .params import COMBINE, COMBINE_ADDRESSES, DECODE, DECODE_ADDRESSES, FP8_DECODE, GATHER, TENSOR_MAP_BYTES

__all__ = ["decode", "decode_refusals", "num_slots", "prepared_for", "runs_on", "workspace_bytes"]

CAPABILITY = (9, 0)
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
ROW_TILE = 64  # query rows per CTA
THREADS = 384
FOUR_ROLES_THREADS = 512  # of kernels/four_roles.cuh
# Ring slots by kv_lora_rank, as kernels/dense_decode.cu instantiates them: what SHARED_BYTES follows from.
STAGES = {512: 3, 256: 5, 128: 8}
TILE_COLUMNS = 64
MAX_WORKSPACE = 64 * 2**20  # bytes
# sizeof(Shared) of kernels/dense_decode.cu, rounded up to its alignment: a test compares.
SHARED_BYTES = {512: 232448, 256: 206848, 128: 198656}
# Up to this many query rows per latent head, kernels/dense_decode_few.cu: rows of its kernels -> sizeof(Shared).
FEW_ROWS = {16: 230400, 32: 229376}
FEW_SHAPES = ((512, 64),)
FEW_BOX_TILES = 3  # a box is a third of a unit
# Query rows of a CTA over FP8 rows -> sizeof(Shared), of pages and of rows by index: kernels/dense_decode_fp8.cu, and
# dense_decode_fp8_wide.cu for 64.
FP8_ROWS = {16: (203776, 220160), 32: (225280, 199680), 64: (226304, 226304)}
FP8_PAIR_BYTES = 224256  # sizeof(Shared) of kernels/dense_decode_fp8_pair.cu: 64 rows in each of two CTAs
PAIRS = False  # of FP8 tiles of 64 rows: off until a GPU has measured them
SPARSE_BYTES = 223232  # sizeof(Shared) of kernels/sparse_decode.cu
SPARSE_ROWS = False  # of bf16 and fp16, by index: off until a GPU has measured them
FEWEST_WIDE_UNITS = 24  # per SM, of 64 indices: fewer are shared by tiles of 32 query rows
MOST_POOL_BYTES = 2**36  # where kernels count steps of 16 bytes in 32 bits: of FP8 rows, and of rows by index
FP8_BOX_TILES = 4  # of 128 bytes per token: 128 codes
TILE_SCALES, FEW_SCALES = 2, 8  # TileLayout::SCALES and FewLayout::SCALES (PairLayout's too) of kernels/partial.cuh
LOG2_E = math.log2(math.e)
# How rows are merged, by their number: a CTA of 256 threads per row and 64 columns, 128, or all; beyond that a warp per
# row. Up to these numbers there are 528 CTAs or fewer at 512 columns: four for each of an H200's 132 SMs, one wave.
MERGED_BY_64, MERGED_BY_128, MERGED_BY_ROW = 66, 132, 528
ROW_THREADS, WARP_THREADS = 256, 128
MOST_PREPARED = 1024  # calls; a cache of 61 layers takes 61, and as many again when its table or pools grow


class _PerThread(threading.local):
    """Buffers that the driver copies from during a launch."""

    def __init__(self) -> None:
        self.decode = ctypes.create_string_buffer(max(FP8_DECODE.size, GATHER.size))  # which begin with DECODE
        self.combine = ctypes.create_string_buffer(COMBINE.size)
        self.decode_bytes = memoryview(self.decode).cast("B")
        self.combine_bytes = memoryview(self.combine).cast("B")


_thread = _PerThread()


# Facts of the machine: torch.compile takes them as they are instead of tracing into the driver.
@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def _unavailable() -> str | None:
    return driver.unavailable()


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def _num_sms(device_index: int) -> int:
    return driver.num_sms(device_index)


def runs_on(device_index: int) -> bool:
    """Whether the kernels run on this CUDA device at all."""
    return _unavailable() is None and driver.capability(device_index) == CAPABILITY


def decode_refusals(call: DecodeCall) -> list[str]:
    """Reasons against a decode call; empty = accepts."""
    if call.device_type != "cuda":
        return [f"needs a CUDA device, got {call.device_type}"]
    if reason := _unavailable():
        return [reason]
    reasons = []
    if call.fp8:
        reasons += _fp8_refusals(call)
    if call.sparse:
        reasons += _sparse_refusals(call)
    if call.wants_max:
        reasons.append("does not return the largest score")
    if call.capability != CAPABILITY:
        major, minor = call.capability or (0, 0)
        reasons.append(f"needs compute capability 9.0 (Hopper), have {major}.{minor}")
    if call.dtype not in DTYPES:
        reasons.append(f"takes {' and '.join(DTYPES)}, got {call.dtype}")
    shape = (call.kv_lora_rank, call.qk_rope_head_dim)
    if shape not in LATENT_SHAPES:
        reasons.append(f"takes (kv_lora_rank, qk_rope_head_dim) in {list(LATENT_SHAPES)}, got {shape}")
    if call.block_size % 16 and not call.sparse:
        reasons.append(f"takes a block_size that 16 divides, got {call.block_size}")
    if call.kv_cache_strides[3] != 1:
        reasons.append(f"needs the last stride of kv_cache to be 1, got {call.kv_cache_strides[3]}")
    # What TMA can walk: 16-byte steps. The stride of a dimension of one element is never walked.
    extents = (call.num_blocks, call.block_size, call.h_kv)
    steps = [stride for stride, extent in zip(call.kv_cache_strides, extents, strict=False) if extent > 1]
    step = 16 if call.fp8 else 8  # FP8 rows: in bytes
    if any(stride % step or stride == 0 for stride in steps):
        reasons.append(f"needs strides of kv_cache that are not 0 and that {step} divides, got {call.kv_cache_strides}")
    if call.kv_cache_misalignment:
        reasons.append(
            f"needs kv_cache to begin at a multiple of 16 bytes, it is {call.kv_cache_misalignment} past one"
        )
    if call.rows * call.h_kv * max(1, call.batch) >= 2**31:
        reasons.append(f"takes fewer than 2**31 query rows, got {call.batch} x {call.rows} x {call.h_kv}")
    return reasons


def _fp8_refusals(call: DecodeCall) -> list[str]:
    reasons = []
    if call.dtype != "bfloat16":
        reasons.append(f"takes bfloat16 queries of FP8 rows, got {call.dtype}")
    shape = (call.kv_lora_rank, call.qk_rope_head_dim)
    if shape not in FEW_SHAPES:
        reasons.append(f"takes FP8 rows of (kv_lora_rank, qk_rope_head_dim) in {list(FEW_SHAPES)}, got {shape}")
    extents = (call.num_blocks, call.block_size, call.h_kv)
    last = sum((extent - 1) * stride for extent, stride in zip(extents, call.kv_cache_strides, strict=False))
    if last >= MOST_POOL_BYTES:
        reasons.append(
            f"takes FP8 rows within 64 GiB, got {extents} rows with strides {call.kv_cache_strides[:3]} bytes"
        )
    return reasons


def _sparse_refusals(call: DecodeCall) -> list[str]:
    if not call.fp8 and not SPARSE_ROWS:
        return ["has no kernel for sparse attention over rows that are not FP8"]
    reasons = []
    shape = (call.kv_lora_rank, call.qk_rope_head_dim)
    if not call.fp8 and shape not in FEW_SHAPES:
        reasons.append(f"takes rows by index of (kv_lora_rank, qk_rope_head_dim) in {list(FEW_SHAPES)}, got {shape}")
    block, row = call.kv_cache_strides[:2]
    unit = "bytes" if call.fp8 else "elements"
    if not call.fp8 and call.num_blocks * call.block_size * row * 2 > MOST_POOL_BYTES:
        reasons.append(f"takes rows by index within 64 GiB, got {call.num_blocks * call.block_size} of {2 * row} bytes")
    if call.num_blocks > 1 and block != call.block_size * row:
        reasons.append(
            f"takes indices into a pool whose rows are all equally far apart, got {row} {unit} in blocks of "
            f"{call.block_size} that are {block} apart"
        )
    return reasons


def _tiles(call: DecodeCall) -> tuple[int, int]:
    """(tiles of query rows per latent head, tiles altogether = CTAs per slot)."""
    row_tiles = -(-call.rows // (_fp8_rows(call) if call.fp8 else ROW_TILE))
    return row_tiles, row_tiles * call.h_kv


def _fp8_rows(call: DecodeCall) -> int:
    """Query rows of a CTA over FP8 rows.

    More than 32 rows are done in tiles of 32, twice as many, where a list of indices is too little for tiles of 64:
    128 heads of 32 queries and 2,048 indices each took 67 and 74 us, of 128 queries 241 and 204.
    """
    rows = next((most for most in FP8_ROWS if call.rows <= most), max(FP8_ROWS))
    if rows == ROW_TILE and call.sparse:
        units = call.batch * -(-call.max_blocks // PLAN_BLOCK) * -(-call.rows // ROW_TILE)
        if units < FEWEST_WIDE_UNITS * _num_sms(call.device_index):
            return ROW_TILE // 2
    return rows


def _in_pairs(call: DecodeCall) -> bool:
    """Whether two CTAs, with tiles of the same FP8 rows, make fp16 of half of them each."""
    return PAIRS and call.fp8 and _fp8_rows(call) == ROW_TILE and _tiles(call)[0] % 2 == 0


def num_slots(call: DecodeCall) -> int:
    """Slots that fill the device once: its SMs over the CTAs that a slot has."""
    sms: int = _num_sms(call.device_index)
    return max(1, sms // _tiles(call)[1])


def workspace_bytes(call: DecodeCall, slots: int) -> int:
    """Bytes of partial results: two per slot, each kv_lora_rank fp16, a log-sum and the fp32 scales per query row.

    From shapes and the number of SMs alone: slots * tiles <= SMs, so at most 2 * 132 * 64 rows of 1,036 bytes (17 MiB)
    on an H200, or 2 * 132 * 32 of 1,060 where rows are few.
    """
    return 2 * slots * call.seqlen_q * call.num_heads * (2 * call.kv_lora_rank + 4 * (1 + _form(call).scales))


def _workspace(device: torch.device, size: int) -> torch.Tensor:
    """Memory for partial results, given back when the call returns.

    From torch's allocator, which hands it out again in the order of the stream: the same block call after call, one per
    device and stream, and that of a graph's own pool in a capture. Kept here instead, a block that was first wanted
    while torch warms up a CUDA graph would come from that graph's pool, and torch refuses to capture.
    """
    return torch.empty(size, dtype=torch.uint8, device=device)


def _walkable(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """`q` as `[batch, rows, h_kv, d_qk]` whose strides TMA can walk: a view where there is one, else a copy.

    Row r of a latent head is query r // group, head r % group of its group. A copy is made of a `q` whose last stride
    is not 1, whose others are 0 or no multiple of 8 elements, or whose queries and heads do not share one stride.
    """
    batch, seqlen_q, num_heads, d_qk = q.shape
    group = num_heads // h_kv
    steps = [stride for stride, extent in zip(q.stride()[:3], q.shape[:3], strict=True) if extent > 1]
    if q.stride(3) != 1 or any(stride % 8 or stride == 0 for stride in steps) or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)  # .contiguous() keeps what is only misaligned
    if seqlen_q == 1:
        return q.view(batch, h_kv, group, d_qk).transpose(1, 2)
    if h_kv == 1 and (num_heads == 1 or q.stride(1) == num_heads * q.stride(2)):
        stride = q.stride(1) if num_heads == 1 else q.stride(2)
        return q.as_strided((batch, seqlen_q * num_heads, 1, d_qk), (q.stride(0), stride, stride, 1))
    rows = q.view(batch, seqlen_q, h_kv, group, d_qk).transpose(1, 2).reshape(batch, h_kv, seqlen_q * group, d_qk)
    return rows.transpose(1, 2)


@dataclass(frozen=True)
class _Form:
    """A kernel, what its boxes hold (query rows, and tiles of 64 columns of a whole unit's rows), and how its partial
    results are merged."""

    file: str
    name: str
    shared_bytes: int
    q_rows: int
    kv_tiles: int
    scales: int  # per row of a partial result: SCALES of its layout in kernels/partial.cuh
    merge: str  # suffix of the kernels that merge them
    threads: int = THREADS


def _form(call: DecodeCall) -> _Form:
    """The kernel of a call: operands swapped for few query rows, where they would leave most of a 64-row tile empty."""
    shape = (call.kv_lora_rank, call.qk_rope_head_dim)
    if call.fp8:
        return _fp8_form_of(_fp8_rows(call), call.sparse, _in_pairs(call), *shape)
    if call.sparse:
        return _sparse_form_of(call.dtype, *shape)
    rows = next((rows for rows in FEW_ROWS if call.rows <= rows and shape in FEW_SHAPES), ROW_TILE)
    return _form_of(rows, call.dtype, *shape)


@functools.cache
def _form_of(rows: int, dtype: str, kv_lora_rank: int, qk_rope_head_dim: int) -> _Form:
    suffix = f"{DTYPES[dtype]}_{kv_lora_rank}_{qk_rope_head_dim}"
    merge = f"{DTYPES[dtype]}_{kv_lora_rank}"
    if rows in FEW_ROWS:
        name = f"flash_fwd_splitkv_mla_kernel_few{rows}_{suffix}"
        return _Form("dense_decode_few", name, FEW_ROWS[rows], rows, FEW_BOX_TILES, FEW_SCALES, f"few_{merge}")
    name = f"flash_fwd_splitkv_mla_kernel_{suffix}"
    tiles = -(-(kv_lora_rank + qk_rope_head_dim) // TILE_COLUMNS)
    return _Form("dense_decode", name, SHARED_BYTES[kv_lora_rank], ROW_TILE, tiles, TILE_SCALES, merge)


@functools.cache
def _sparse_form_of(dtype: str, kv_lora_rank: int, qk_rope_head_dim: int) -> _Form:
    name = f"flash_fwd_splitkv_mla_sparse_kernel_{DTYPES[dtype]}_{kv_lora_rank}_{qk_rope_head_dim}"
    merge = f"{DTYPES[dtype]}_{kv_lora_rank}"
    return _Form("sparse_decode", name, SPARSE_BYTES, ROW_TILE, 0, TILE_SCALES, merge, FOUR_ROLES_THREADS)


@functools.cache
def _fp8_form_of(rows: int, sparse: bool, in_pairs: bool, kv_lora_rank: int, qk_rope_head_dim: int) -> _Form:
    is_wide = rows == ROW_TILE
    file, form = "dense_decode_fp8", f"few{rows}_"
    if is_wide:
        file, form = ("dense_decode_fp8_pair", "pair_") if in_pairs else ("dense_decode_fp8_wide", "")
    name = f"flash_fwd_splitkv_mla_fp8_kernel_{'sparse_' * sparse}{form}bf16_{kv_lora_rank}_{qk_rope_head_dim}"
    scales, merge = (TILE_SCALES, "bf16") if is_wide else (FEW_SCALES, "pair_bf16")
    # Boxes move no rows that are named by index, nor those that become fp16 on their way.
    tiles = 0 if sparse or is_wide else FP8_BOX_TILES
    threads = FOUR_ROLES_THREADS if is_wide else THREADS
    shared = FP8_PAIR_BYTES if in_pairs else FP8_ROWS[rows][sparse]
    return _Form(file, name, shared, rows, tiles, scales, f"{merge}_{kv_lora_rank}", threads)


def _fp8_maps(call: DecodeCall, kv_cache: torch.Tensor, box_rows: int) -> tuple[bytes, bytes, bytes]:
    """The maps of the parts of FP8 rows, as elements of 2 bytes: rotated keys, latents, scales."""
    num_blocks, block_size, h_kv, row_bytes = kv_cache.shape
    strides = [kv_cache.stride(dim) if kv_cache.shape[dim] > 1 else row_bytes for dim in (1, 2, 0)]
    layout = row_layout(call.kv_lora_rank, call.qk_rope_head_dim)

    def part(offset: int, columns: int, tiles: int, box_tiles: int, swizzle: int) -> bytes:
        return driver.tensor_map(
            kv_cache.data_ptr() + offset,
            "bfloat16",
            (columns, block_size, tiles, h_kv, num_blocks),
            (strides[0], 2 * TILE_COLUMNS, *strides[1:]),
            (columns, box_rows, box_tiles, 1, 1),
            swizzle,
            128,
            call.device_index,
        )

    # Boxes of fewer rows than a unit's are one tile each, or tiles in shared memory would not be 64 rows apart.
    box_tiles = FP8_BOX_TILES if box_rows == PLAN_BLOCK else 1
    return (
        part(layout.k_rope, call.qk_rope_head_dim, 1, 1, 128),
        part(0, TILE_COLUMNS, FP8_BOX_TILES, box_tiles, 128),
        part(layout.scales, (layout.k_rope - layout.scales) // 2, 1, 1, 0),
    )


def _tensor_map(call: DecodeCall, tensor: torch.Tensor, box_rows: int, box_tiles: int) -> bytes:
    """The map of `[outer, rows, heads, d_qk]`: boxes of `box_rows` rows x `box_tiles` tiles of 64 columns.

    Where 64 divides d_qk, its tiles of 64 columns are a dimension of their own; else a box is one tile.
    """
    outer, num_rows, heads, d_qk = tensor.shape
    size = tensor.element_size()
    # The stride of a dimension of one element is never walked: anything valid.
    strides = [tensor.stride(dim) * size if tensor.shape[dim] > 1 else d_qk * size for dim in (1, 2, 0)]
    tiles = -(-d_qk // TILE_COLUMNS)
    columns = TILE_COLUMNS
    if d_qk % TILE_COLUMNS:
        columns, tiles, box_tiles = d_qk, 1, 1
    # 128 bytes into L2 at a time: rows are 1,152 bytes = 4.5 x 256, so promotion to 256 would read a half too much.
    return driver.tensor_map(
        tensor.data_ptr(),
        call.dtype,
        (columns, num_rows, tiles, heads, max(1, outer)),
        (strides[0], TILE_COLUMNS * size, *strides[1:]),
        (TILE_COLUMNS, box_rows, box_tiles, 1, 1),
        128,
        128,
        call.device_index,
    )


def decode(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    items: torch.Tensor | None = None,
    splits: torch.Tensor | None = None,
    may_cut: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split-KV attention over the pages by the plan; shapes and results as `backends.torch.decode`.

    `may_cut` is False where the plan is known to cut no request: then nothing is merged.
    A `q` that TMA cannot walk is copied (see `_walkable`); the pool never is.
    """
    device, device_index = q.device, call.device_index
    out = torch.empty((*q.shape[:3], call.kv_lora_rank), dtype=q.dtype, device=device)
    lse = torch.empty((call.batch, call.num_heads, call.seqlen_q), dtype=torch.float32, device=device)
    if call.batch == 0:
        return out, lse
    if call.num_blocks == 0:  # no pool, so no token; a tensor map wants an address
        return out.zero_(), lse.fill_(math.inf)
    if items is None or splits is None:
        from .plan import plan

        items, splits = plan(cache_seqlens, num_slots(call))
    slots = items.shape[0] - call.batch
    # Strides: those of a sparse `q` are not its call's, in which batch and queries are apart.
    key = (call, q.data_ptr(), q.stride(), kv_cache.data_ptr(), cache_seqlens.stride(0), slots, may_cut, softmax_scale)
    prepared = driver.memo.get(key)
    if prepared is None:
        rows = _walkable(q, call.h_kv)
        prepared = _prepare(call, rows, kv_cache, cache_seqlens.stride(0), slots, may_cut, softmax_scale)
        if rows.data_ptr() == q.data_ptr():  # a copy lies elsewhere the next time
            if len(driver.memo) >= MOST_PREPARED:
                driver.memo.clear()
            driver.memo[key] = prepared
    o_partial = partial_sums = 0
    if prepared.workspace_bytes:
        workspace = _workspace(device, prepared.workspace_bytes)
        o_partial = workspace.data_ptr()
        partial_sums = o_partial + prepared.sums_offset
    stream = driver.raw_stream(device_index)
    pointers = (out.data_ptr(), lse.data_ptr(), o_partial, partial_sums)
    first_item, first_split = items.data_ptr(), splits.data_ptr()
    form, thread = prepared.form, _thread
    kernel = driver.function(device_index, form.file, form.name, form.shared_bytes)
    for piece in prepared.pieces:
        at_items = first_item + piece.items_offset
        thread.decode_bytes[: len(piece.decode)] = piece.decode
        addresses = (*pointers, at_items, first_split, block_table.data_ptr(), cache_seqlens.data_ptr())
        DECODE_ADDRESSES.pack_into(thread.decode, 2 * TENSOR_MAP_BYTES, *addresses)
        driver.launch(
            device_index, kernel, piece.grid, form.threads, form.shared_bytes, stream, thread.decode, programmatic=True
        )
        if piece.merge is not None:
            thread.combine_bytes[:] = piece.combine
            COMBINE_ADDRESSES.pack_into(thread.combine, 0, *pointers, at_items, first_split)
            merge = driver.function(device_index, "combine", piece.merge)
            driver.launch(
                device_index, merge, piece.merge_grid, piece.merge_threads, 0, stream, thread.combine, programmatic=True
            )
    return out, lse


def prepared_for(
    call: DecodeCall,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    slots: int,
    softmax_scale: float,
) -> _Prepared | None:
    """What every call over these tensors launches; None if there is nothing to launch or `q` would have to be copied.

    Args: as of `decode`; `slots` of the plans to come.
    """
    if call.batch == 0 or call.num_blocks == 0:
        return None
    rows = _walkable(q, call.h_kv)
    if rows.data_ptr() != q.data_ptr():
        return None
    return _prepare(call, rows, kv_cache, cache_seqlens.stride(0), slots, True, softmax_scale)


@dataclass(frozen=True)
class _Piece:
    """One launch and its merge: parameters whose addresses, those of the maps apart, are still 0."""

    decode: bytes
    grid: tuple[int, int, int]
    items_offset: int  # bytes
    merge: str | None = None
    combine: bytes = b""
    merge_grid: tuple[int, int, int] = (0, 0, 0)
    merge_threads: int = 0


@dataclass(frozen=True)
class _Prepared:
    """Everything of a call that the next one over the same tensors needs again: a decode step of one layer."""

    form: _Form
    pieces: list[_Piece]
    workspace_bytes: int  # 0: nothing can be cut
    sums_offset: int  # of the partial log-sums in the workspace, bytes


def _prepare(
    call: DecodeCall,
    rows: torch.Tensor,
    kv_cache: torch.Tensor,
    seqlens_stride: int,
    slots: int,
    may_cut: bool,
    softmax_scale: float,
) -> _Prepared:
    row_tiles, tiles = _tiles(call)
    box_rows = math.gcd(call.block_size, PLAN_BLOCK)
    form = _form(call)
    besides: tuple[Any, ...] = ()  # what the structs of FP8 rows and of rows fetched one by one have
    queries = (rows.data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2))
    if form.kv_tiles == 0:
        q_map = kv_map = b""
        if form.q_rows == ROW_TILE:
            q_map = _tensor_map(call, rows, ROW_TILE, -(-rows.shape[3] // TILE_COLUMNS))
        # The stride of a dimension of one element is never walked: it may be anything.
        in_steps = [kv_cache.stride(dim) * kv_cache.element_size() // 16 for dim in range(3)]
        strides = [steps if extent > 1 else 0 for steps, extent in zip(in_steps, kv_cache.shape, strict=False)]
        page_stride, row_stride, head_stride = strides
        num_places = call.num_blocks
        if call.sparse:
            num_places *= call.block_size
            if call.block_size == 1:  # pages of one row: they are as far apart as rows are
                row_stride = page_stride
        besides = (*queries, kv_cache.data_ptr(), row_stride, num_places, page_stride, head_stride)
    elif call.fp8:
        q_map, kv_map, scale_map = _fp8_maps(call, kv_cache, box_rows)
        besides = (scale_map, *queries)
    else:
        q_map = _tensor_map(call, rows, form.q_rows, -(-rows.shape[3] // TILE_COLUMNS))
        # Boxes of fewer rows than a unit's are one tile each, or tiles in shared memory would not be 64 rows apart.
        kv_map = _tensor_map(call, kv_cache, box_rows, form.kv_tiles if box_rows == PLAN_BLOCK else 1)
    may_cut = may_cut and slots > 1
    # Several launches only where one item per slot is asked for (a deterministic plan) and the batch is large.
    pieces = _pieces(call, slots) if may_cut else [(0, call.batch, 0, slots)]
    made = []
    for first_request, num_requests, first_slot, piece_slots in pieces:
        decode = DECODE.pack(
            q_map,
            kv_map,
            *(0,) * 8,
            *call.block_table_strides,
            seqlens_stride,
            softmax_scale * LOG2_E,
            call.batch,
            call.max_blocks,
            call.seqlen_q,
            call.num_heads,
            call.num_heads // call.h_kv,
            row_tiles,
            tiles,
            piece_slots,
            call.block_size,
            box_rows,
            call.causal and call.seqlen_q > 1,
        )
        if besides:
            decode = (FP8_DECODE if form.kv_tiles else GATHER).pack(decode, *besides)
        launch = (decode, (piece_slots * tiles, 1, 1), first_slot * 16)
        merge = _merge(call, form, num_requests, piece_slots, (first_request, first_slot)) if may_cut else ()
        made.append(_Piece(*launch, *merge))
    most = max(piece_slots for *_, piece_slots in pieces)
    size = workspace_bytes(call, most) if may_cut else 0
    return _Prepared(form, made, size, 2 * most * call.seqlen_q * call.num_heads * call.kv_lora_rank * 2)


def _pieces(call: DecodeCall, slots: int) -> list[tuple[int, int, int, int]]:
    """(first request, requests, first slot, slots) of each launch; one launch unless the workspace would be too large.

    A plan for this call and device never is: only a deterministic one has more slots than there is room for. Those
    belong to its requests in order, so it can be run in pieces, of one request at the least (which takes more than
    MAX_WORKSPACE from 4,049 query rows on at 512 columns). Any other plan was made for fewer query rows, and runs at
    once in the memory that it takes.
    """
    if not call.deterministic or slots != fixed_slots(call.batch) or workspace_bytes(call, slots) <= MAX_WORKSPACE:
        return [(0, call.batch, 0, slots)]
    per_request = slots // call.batch
    requests = max(1, MAX_WORKSPACE // workspace_bytes(call, per_request))
    return [
        (first, min(requests, call.batch - first), first * per_request, min(requests, call.batch - first) * per_request)
        for first in range(0, call.batch, requests)
    ]


def _merge(
    call: DecodeCall, form: _Form, num_requests: int, slots: int, offsets: tuple[int, int]
) -> tuple[str, bytes, tuple[int, int, int], int]:
    """Kernel, parameters without addresses, grid and threads of the merge of what was cut.

    CTAs are counted by requests or by slots, whichever is fewer. Offsets: first request, first slot.
    """
    rows = call.seqlen_q * call.num_heads
    by_slot = slots < num_requests
    groups = slots if by_slot else num_requests
    grid, threads = (groups, rows, 1), ROW_THREADS
    if call.deterministic or groups * rows > MERGED_BY_ROW:  # the others add the parts in other orders
        how = "warp"
        # In x alone: y ends at 65,535.
        grid, threads = (groups * -(-rows * 32 // WARP_THREADS), 1, 1), WARP_THREADS
    elif groups * rows <= MERGED_BY_64:
        how, grid = "columns64", (groups, rows, call.kv_lora_rank // 64)
    elif groups * rows <= MERGED_BY_128:
        how, grid = "columns128", (groups, rows, call.kv_lora_rank // 128)
    else:
        how = "row"
    combine = COMBINE.pack(*(0,) * 6, by_slot, *offsets, call.seqlen_q, call.num_heads, slots)
    return f"flash_fwd_mla_combine_kernel_{how}_{form.merge}", combine, grid, threads
