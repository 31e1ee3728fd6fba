"""The Triton device code: what one program of each kernel reads, computes and writes. `triton.py` decides the launches.

Decode, one program = BLOCK_M query rows that share a latent row x one item (a part of a request). Per BLOCK_N tokens:
  S = Q K^T * softmax_scale_log2     BLOCK_M x D_QK . D_QK x BLOCK_N              (K = the whole latent row)
  O = O * alpha + P V                BLOCK_M x BLOCK_N . BLOCK_N x KV_LORA_RANK   (V = its first KV_LORA_RANK columns)
K and V are the same tile in shared memory: a latent row is read from global memory once per row tile. Logarithms in
here are base 2 unless a name says natural.

A tile of FP8 rows (`codec.py`) becomes a tile of the queries' dtype when it arrives. Codes and bf16 are taken apart as
integers: Triton converts e4m3 from compute capability 8.9 on only. (Over 400 lines: helpers stand before the kernels
that inline them.)
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FORM_PLAIN", "FORM_ROWS", "FORM_SWAPPED", "append_kernel", "decode_kernel", "merge_kernel"]

# The cut point behind the last unit of a request: fractions in 2^-30, see contract.PLAN_WHOLE.
WHOLE = tl.constexpr(2**30)

# Columns of an FP8 row that share a scale, the largest code and the smallest scale: see codec.py.
COLUMNS_PER_SCALE = tl.constexpr(128)
LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-100)

# How the two products are written down, because Triton chooses instructions and order from that.
FORM_PLAIN = tl.constexpr(0)  # S and O as above, for mma.sync: any GPU, BLOCK_M 16 or 32
FORM_ROWS = tl.constexpr(1)  # the same for wgmma, whose smallest tile is 64 rows
FORM_SWAPPED = tl.constexpr(2)  # S^T = K Q^T and O^T = V^T P^T: tokens on the 64-row side, few query rows on the other

# Both wgmma forms hold their softmax and their P V in an `if` whose condition always holds. What that buys, measured on
# an H200 with Triton 3.6 (batch 132, 16384 tokens, 128 heads: 2362 -> 1849 us, with fewer registers on top):
# - Triton lays S out for a chained product, every warpgroup holding all of it, when it finds the second product among
#   the uses of the first. It does not look through an `if`: S is then shared out and computed once.
# - Its pipeliner puts an `if` behind the loads of the next tile, a product before them: so the tile after this one
#   travels during softmax and P V, with two tiles in shared memory where three do not fit.


@triton.jit
def softmax_step(scores, row_max, sums, TOKEN_AXIS: tl.constexpr):
    """One tile of the online softmax: probabilities, the factor of what came before, the new maximum and sums.

    `sums` has the shape of `scores`: it is added up over tokens after the last tile, not in every one, because that
    takes an exchange between warps.
    """
    new_max = tl.maximum(row_max, tl.max(scores, TOKEN_AXIS))
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    probability = tl.exp2(scores - tl.expand_dims(reference, TOKEN_AXIS))
    alpha = tl.exp2(row_max - reference)
    return probability, alpha, new_max, sums * tl.expand_dims(alpha, TOKEN_AXIS) + probability


@triton.jit
def times_scales(codes, scales, RANK: tl.constexpr):
    """fp32 `[N, RANK]` from codes uint8 `[N, RANK]` and scales fp32 `[N, RANK / 128]`."""
    # Four bits of exponent and three of mantissa in the places of fp16's, whose bias is 8 more: the value / 2^8, also
    # of a code without leading one. 0x7f is NaN in e4m3 and would be 480.
    bits = codes.to(tl.int16)
    magnitude = (bits & 0x7F) << 7
    half = (magnitude | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
    value = tl.where(magnitude == 0x3F80, float("nan"), half.to(tl.float32))
    GROUPS: tl.constexpr = RANK // COLUMNS_PER_SCALE
    grouped = tl.reshape(value, (codes.shape[0], GROUPS, COLUMNS_PER_SCALE)) * (scales * 256.0)[:, :, None]
    return tl.reshape(grouped, (codes.shape[0], RANK))


@triton.jit
def from_bf16(bits):
    """fp32 from the bits of bf16, int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(value):
    """The bits of bf16, int16, of fp32: nearest, ties to even; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def to_e4m3(value):
    """The bits of e4m3, uint8, of fp32: nearest, ties to even; 448 beyond it."""
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(value), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    # From 2^-6 on three bits of mantissa are kept, and the exponent's bias goes from 127 to 7. Below it a code counts
    # steps of 2^-9, the last bit of a number around 2^14: adding that much rounds.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(magnitude < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def share_beside(sink, log_sum):
    """What is left of a row beside one more entry of its softmax: exp(lse) / (exp(lse) + exp(sink)).

    `sink` is in natural log, `log_sum` in log2; -inf there (nothing is visible) leaves nothing.
    """
    weight = tl.exp2(sink * 1.4426950408889634 - log_sum)  # log2 e
    return tl.where(log_sum == float("-inf"), 0.0, 1.0 / (1.0 + weight))


@triton.jit
def decode_kernel(
    q,  # [batch, seqlen_q, num_heads, D_QK]; strides in elements, the last one is 1
    kv_cache,  # [num_blocks, block_size, h_kv, D_QK]; strides in elements, the last one is 1. FP8: rows of bytes
    kv_scales,  # FP8: the same memory as fp32
    kv_rope,  # FP8: the same memory as int16
    block_table,  # int32 [batch, max_blocks]. SPARSE: [batch, topk] rows of the pool, negative = none
    cache_seqlens,  # int32 [batch]
    sinks,  # HAS_SINKS: fp32 [num_heads], natural log
    largest,  # WANTS_MAX: fp32 [batch, num_heads, seqlen_q], the largest scaled score; of uncut requests
    items,  # int32 [num_slots + batch, 4]: request (-1 = unused), begin, end, next; the last is not used here
    splits,  # int32 [batch, 2]: slot of the first part, number of parts
    out,  # [batch, seqlen_q, num_heads, KV_LORA_RANK], contiguous
    lse,  # fp32 [batch, num_heads, seqlen_q], contiguous, natural log
    o_partial,  # fp32 [2 * num_slots, seqlen_q, num_heads, KV_LORA_RANK], contiguous; rows of cut requests only
    lse_partial,  # fp32 [2 * num_slots, seqlen_q, num_heads], contiguous, log2
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    kv_stride_block,
    kv_stride_head,
    table_stride_batch,
    table_stride_block,
    seqlens_stride,
    softmax_scale_log2,
    seqlen_q,
    num_heads,
    group,  # query heads per latent head
    row_tiles,  # programs per item and latent head
    tiles,  # programs per item
    num_slots,
    block_size,
    num_rows,  # SPARSE: rows of the pool
    KV_STRIDE_TOKEN: tl.constexpr,  # a constant, so that the rows of a tile share one address
    CAUSAL: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_PAGE: tl.constexpr,  # BLOCK_N tokens never straddle pages: one table entry per tile
    UNIT: tl.constexpr,  # tokens; a part is a whole number of units
    FORM: tl.constexpr,
    FP8: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WANTS_MAX: tl.constexpr,
):
    # The row tiles of one item run side by side, so that the second one finds the latents in L2.
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    request = tl.load(items + item * 4)
    if request < 0:
        return
    begin_cut = tl.load(items + item * 4 + 1)
    end_cut = tl.load(items + item * 4 + 2)
    length = tl.load(cache_seqlens + request.to(tl.int64) * seqlens_stride)

    # The token range comes from the length of now, not from the plan: parts cover the request whatever the plan saw.
    units = ((length + (UNIT - 1)) // UNIT).to(tl.int64)
    begin = ((units * begin_cut) >> 30).to(tl.int32) * UNIT
    end = tl.minimum(((units * end_cut) >> 30).to(tl.int32) * UNIT, length)

    kv_head = tile // row_tiles
    row = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < seqlen_q * group
    token_q = row // group
    head = kv_head * group + row % group
    column = tl.arange(0, KV_LORA_RANK)
    column_rope = tl.arange(0, QK_ROPE_HEAD_DIM)

    q_row = (
        q
        + request.to(tl.int64) * q_stride_batch
        + token_q.to(tl.int64)[:, None] * q_stride_token
        + head.to(tl.int64)[:, None] * q_stride_head
    )
    q_latent = tl.load(q_row + column[None, :], mask=is_row[:, None], other=0.0)
    q_rope = tl.load(q_row + KV_LORA_RANK + column_rope[None, :], mask=is_row[:, None], other=0.0)
    # Tokens before this one, per row: of the part, and of what a causal query sees.
    limit = tl.minimum(length - (seqlen_q - 1) + token_q, end)

    table = block_table + request.to(tl.int64) * table_stride_batch
    kv_base = kv_cache + kv_head.to(tl.int64) * kv_stride_head
    SCALES_AT: tl.constexpr = KV_LORA_RANK // 4  # in an FP8 row, in fp32
    ROPE_AT: tl.constexpr = (KV_LORA_RANK + KV_LORA_RANK // COLUMNS_PER_SCALE * 4) // 2  # likewise, in 2 bytes
    scale_column = tl.arange(0, KV_LORA_RANK // COLUMNS_PER_SCALE)
    offset = tl.arange(0, BLOCK_N)
    row_offset = (offset if KV_STRIDE_TOKEN * BLOCK_N < 2**31 else offset.to(tl.int64)) * KV_STRIDE_TOKEN
    tile_latent = row_offset[:, None] + column[None, :]
    tile_rope = row_offset[:, None] + (KV_LORA_RANK + column_rope[None, :])
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    TOKEN_AXIS: tl.constexpr = 0 if FORM == FORM_SWAPPED else 1
    ROW_AXIS: tl.constexpr = 1 - TOKEN_AXIS
    if FORM == FORM_SWAPPED:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        acc = tl.zeros([KV_LORA_RANK, BLOCK_M], tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_M, KV_LORA_RANK], tl.float32)

    if ONE_PAGE:
        # One tile ahead: a load that only addresses another load would take a pipeline stage of its own.
        page = tl.load(table + (begin // block_size).to(tl.int64) * table_stride_block, begin < end, other=0)
    for start in range(begin, end, BLOCK_N):
        token = start + offset
        is_token = token < end
        # page * stride overflows int32 from 4 GiB of bf16 cache on: widen before multiplying.
        # Rows past the length may hold NaN, and 0 * NaN is NaN: they arrive as zeros.
        if ONE_PAGE and not FP8:
            tile_row = (start % block_size).to(tl.int64) * KV_STRIDE_TOKEN
            tile_base = kv_base + (page.to(tl.int64) * kv_stride_block + tile_row)
            latent = tl.load(tile_base + tile_latent, mask=is_token[:, None], other=0.0)
            k_rope = tl.load(tile_base + tile_rope, mask=is_token[:, None], other=0.0)
            ahead = start + BLOCK_N
            page = tl.load(table + (ahead // block_size).to(tl.int64) * table_stride_block, ahead < end, other=0)
        else:
            # Where each row begins, behind kv_base.
            if ONE_PAGE:
                kv_row = page.to(tl.int64) * kv_stride_block + (start % block_size).to(tl.int64) * KV_STRIDE_TOKEN
                kv_row += row_offset
                ahead = start + BLOCK_N
                page = tl.load(table + (ahead // block_size).to(tl.int64) * table_stride_block, ahead < end, other=0)
            elif SPARSE:
                named = tl.load(table + token.to(tl.int64) * table_stride_block, mask=is_token, other=-1)
                is_token = is_token & (named >= 0) & (named < num_rows)
                named = tl.where(is_token, named, 0)
                kv_row = (named // block_size).to(tl.int64) * kv_stride_block
                kv_row += (named % block_size).to(tl.int64) * KV_STRIDE_TOKEN
            else:
                # Entries past the length are garbage by contract: they are not loaded, let alone followed.
                entry = (token // block_size).to(tl.int64) * table_stride_block
                pages = tl.load(table + entry, mask=is_token, other=0).to(tl.int64)
                kv_row = pages * kv_stride_block + (token % block_size).to(tl.int64) * KV_STRIDE_TOKEN
            is_row_of = is_token[:, None]
            if FP8:
                byte = (kv_head.to(tl.int64) * kv_stride_head + kv_row)[:, None]
                codes = tl.load(kv_cache + byte + column[None, :], mask=is_row_of, other=0)
                scales = tl.load(kv_scales + byte // 4 + SCALES_AT + scale_column[None, :], mask=is_row_of, other=0.0)
                rope = tl.load(kv_rope + byte // 2 + ROPE_AT + column_rope[None, :], mask=is_row_of, other=0)
                latent = times_scales(codes, scales, KV_LORA_RANK).to(q.dtype.element_ty)
                k_rope = from_bf16(rope).to(q.dtype.element_ty)
            else:
                kv_row = kv_base + kv_row[:, None]
                latent = tl.load(kv_row + column[None, :], mask=is_row_of, other=0.0)
                k_rope = tl.load(kv_row + KV_LORA_RANK + column_rope[None, :], mask=is_row_of, other=0.0)
        if CAUSAL:
            is_visible = tl.expand_dims(token, ROW_AXIS) < tl.expand_dims(limit, TOKEN_AXIS)
        else:
            is_visible = tl.expand_dims(is_token, ROW_AXIS)

        if FORM == FORM_PLAIN:
            scores = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q_latent, tl.trans(latent))) * softmax_scale_log2
            scores = tl.where(is_visible, scores, float("-inf"))
            probability, alpha, row_max, sums = softmax_step(scores, row_max, sums, TOKEN_AXIS)
            acc = tl.dot(probability.to(latent.dtype), latent, acc * alpha[:, None])
        else:
            # Scaled one by one: as a plain sum Triton would fuse the two into a chained product.
            if FORM == FORM_SWAPPED:
                scores = tl.dot(latent, tl.trans(q_latent)) * softmax_scale_log2
                scores += tl.dot(k_rope, tl.trans(q_rope)) * softmax_scale_log2
            else:
                scores = tl.dot(q_latent, tl.trans(latent)) * softmax_scale_log2
                scores += tl.dot(q_rope, tl.trans(k_rope)) * softmax_scale_log2
            if start < end:  # always
                scores = tl.where(is_visible, scores, float("-inf"))
                probability, alpha, row_max, sums = softmax_step(scores, row_max, sums, TOKEN_AXIS)
                p = probability.to(latent.dtype)
            else:
                alpha = row_max
                p = scores.to(latent.dtype)
            if length > 0:  # always; another condition than above, or the two would be merged
                if FORM == FORM_SWAPPED:
                    acc = tl.dot(tl.trans(latent), p, acc * alpha[None, :])
                else:
                    acc = tl.dot(p, latent, acc * alpha[:, None])

    row_sum = tl.sum(sums, TOKEN_AXIS)
    if FORM == FORM_SWAPPED:
        acc = tl.trans(acc)
    seen = row_sum > 0.0
    acc = acc * tl.where(seen, 1.0 / tl.where(seen, row_sum, 1.0), 0.0)[:, None]
    log_sum = row_max + tl.log2(tl.where(seen, row_sum, 1.0))  # log2; -inf where nothing is visible
    if HAS_SINKS and end_cut - begin_cut == WHOLE:
        acc = acc * share_beside(tl.load(sinks + head, is_row, other=0.0), log_sum)[:, None]
    if end_cut - begin_cut == WHOLE:
        out_row = (request.to(tl.int64) * seqlen_q + token_q) * num_heads + head
        tl.store(out + out_row[:, None] * KV_LORA_RANK + column[None, :], acc.to(out.dtype.element_ty), is_row[:, None])
        lse_row = (request.to(tl.int64) * num_heads + head) * seqlen_q + token_q
        natural = log_sum * 0.6931471805599453  # ln 2
        tl.store(lse + lse_row, tl.where(seen, natural, float("inf")), is_row)
        if WANTS_MAX:
            tl.store(largest + lse_row, row_max * 0.6931471805599453, is_row)
    else:
        # A later part is the first item of its slot; the first part may share that slot with a later part of another.
        partial = item
        if begin_cut == 0:
            partial = num_slots + tl.load(splits + request * 2)
        partial_row = (partial.to(tl.int64) * seqlen_q + token_q) * num_heads + head
        tl.store(o_partial + partial_row[:, None] * KV_LORA_RANK + column[None, :], acc, is_row[:, None])
        tl.store(lse_partial + partial_row, log_sum, is_row)


@triton.jit
def merge_kernel(
    splits,  # int32 [batch, 2]: slot of the first part, number of parts
    out,  # [batch, seqlen_q, num_heads, KV_LORA_RANK], contiguous
    lse,  # fp32 [batch, num_heads, seqlen_q], contiguous, natural log
    o_partial,  # fp32 [2 * num_slots, seqlen_q, num_heads, KV_LORA_RANK]
    lse_partial,  # fp32 [2 * num_slots, seqlen_q, num_heads], log2
    sinks,  # HAS_SINKS: fp32 [num_heads], natural log
    seqlen_q,
    num_heads,
    num_slots,
    HAS_SINKS: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # query rows (token, head) of one request per program
    BLOCK_D: tl.constexpr,  # columns per program
    BLOCK_PARTS: tl.constexpr,  # parts in flight at once
):
    """out = sum_i 2**(lse_i - lse) * o_i over the parts of a request; requests of one part are done already."""
    rows = seqlen_q * num_heads
    chunks = tl.cdiv(rows, BLOCK_ROWS)
    column_chunks = KV_LORA_RANK // BLOCK_D
    request = tl.program_id(0) // (chunks * column_chunks)
    chunk = tl.program_id(0) // column_chunks % chunks
    column_chunk = tl.program_id(0) % column_chunks
    column = column_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(splits + request * 2)
    num_parts = tl.load(splits + request * 2 + 1)
    if num_parts > 1:
        row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < rows
        row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        for start in range(0, num_parts, BLOCK_PARTS):
            part = start + tl.arange(0, BLOCK_PARTS)
            partial = first + part + tl.where(part == 0, num_slots, 0)
            partial_row = partial.to(tl.int64)[:, None] * rows + row[None, :]
            is_part = (part < num_parts)[:, None] & is_row[None, :]
            part_lse = tl.load(lse_partial + partial_row, is_part, other=float("-inf"))  # [BLOCK_PARTS, BLOCK_ROWS]
            o_row = o_partial + partial_row[:, :, None] * KV_LORA_RANK + column[None, None, :]
            part_o = tl.load(o_row, is_part[:, :, None], other=0.0)
            new_max = tl.maximum(row_max, tl.max(part_lse, 0))
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(part_lse - reference[None, :])
            alpha = tl.exp2(row_max - reference)
            row_sum = row_sum * alpha + tl.sum(weight, 0)
            acc = acc * alpha[:, None] + tl.sum(part_o * weight[:, :, None], 0)
            row_max = new_max
        seen = row_sum > 0.0
        acc = acc * tl.where(seen, 1.0 / tl.where(seen, row_sum, 1.0), 0.0)[:, None]
        log_sum = row_max + tl.log2(tl.where(seen, row_sum, 1.0))
        if HAS_SINKS:
            acc = acc * share_beside(tl.load(sinks + row % num_heads, is_row, other=0.0), log_sum)[:, None]
        out_row = request.to(tl.int64) * rows + row
        tl.store(out + out_row[:, None] * KV_LORA_RANK + column[None, :], acc.to(out.dtype.element_ty), is_row[:, None])
        natural = log_sum * 0.6931471805599453  # ln 2
        lse_row = (request.to(tl.int64) * num_heads + row % num_heads) * seqlen_q + row // num_heads
        if column_chunk == 0:  # every column chunk computes it, one stores it
            tl.store(lse + lse_row, tl.where(seen, natural, float("inf")), is_row)


@triton.jit
def append_kernel(
    kv_cache,  # [num_blocks, block_size, h_kv, D_QK]; strides in elements. FP8: rows of bytes
    kv_scales,  # FP8: the same memory as fp32
    kv_rope,  # FP8: the same memory as int16
    latent,  # [batch, seqlen_q, h_kv, KV_LORA_RANK]
    k_rope,  # [batch, seqlen_q, h_kv, QK_ROPE_HEAD_DIM]
    slots,  # int64 [batch, seqlen_q]
    q,  # [batch, seqlen_q, num_heads, D_QK], whose last columns become q_rope
    q_rope,  # [batch, seqlen_q, num_heads, QK_ROPE_HEAD_DIM]
    kv_stride_block,
    kv_stride_token,
    kv_stride_head,
    latent_stride_batch,
    latent_stride_token,
    latent_stride_head,
    latent_stride_column,
    rope_stride_batch,
    rope_stride_token,
    rope_stride_head,
    rope_stride_column,
    slots_stride_batch,
    slots_stride_token,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    q_stride_column,
    q_rope_stride_batch,
    q_rope_stride_token,
    q_rope_stride_head,
    q_rope_stride_column,
    num_rows,  # batch * seqlen_q * h_kv
    q_rows,  # batch * seqlen_q * num_heads
    append_programs,  # programs past these place queries
    seqlen_q,
    h_kv,
    num_heads,
    block_size,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PLACED_ROWS: tl.constexpr,
    FP8: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program < append_programs:
        row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < num_rows
        head = row % h_kv
        token = row // h_kv % seqlen_q
        request = row // h_kv // seqlen_q
        slot = tl.load(slots + request * slots_stride_batch + token * slots_stride_token, is_row, other=0)
        # Behind the beginning of the pool, in its elements.
        target = slot // block_size * kv_stride_block + slot % block_size * kv_stride_token
        target = (target + head * kv_stride_head)[:, None]
        column = tl.arange(0, KV_LORA_RANK)[None, :]
        source = latent + request * latent_stride_batch + token * latent_stride_token + head * latent_stride_head
        value = tl.load(source[:, None] + column * latent_stride_column, is_row[:, None])
        rope_column = tl.arange(0, QK_ROPE_HEAD_DIM)[None, :]
        source = k_rope + request * rope_stride_batch + token * rope_stride_token + head * rope_stride_head
        rotated = tl.load(source[:, None] + rope_column * rope_stride_column, is_row[:, None])
        if FP8:
            GROUPS: tl.constexpr = KV_LORA_RANK // COLUMNS_PER_SCALE
            grouped = tl.reshape(value.to(tl.float32), (BLOCK_ROWS, GROUPS, COLUMNS_PER_SCALE))
            magnitude = tl.abs(grouped)
            # A maximum may pass over NaN: what is not finite is counted by itself.
            is_finite = tl.max(tl.where(magnitude < float("inf"), 0, 1), 2) == 0
            scale = tl.maximum(tl.div_rn(tl.max(magnitude, 2), LARGEST), SMALLEST_SCALE)
            scale = tl.where(is_finite, scale, float("nan"))
            scaled = tl.div_rn(grouped, tl.broadcast_to(scale[:, :, None], (BLOCK_ROWS, GROUPS, COLUMNS_PER_SCALE)))
            codes = tl.reshape(to_e4m3(scaled), (BLOCK_ROWS, KV_LORA_RANK))
            tl.store(kv_cache + target + column, codes, is_row[:, None])
            scale_column = tl.arange(0, GROUPS)[None, :]
            tl.store(kv_scales + target // 4 + KV_LORA_RANK // 4 + scale_column, scale, is_row[:, None])
            ROPE_AT: tl.constexpr = (KV_LORA_RANK + GROUPS * 4) // 2
            tl.store(kv_rope + target // 2 + ROPE_AT + rope_column, to_bf16(rotated.to(tl.float32)), is_row[:, None])
        else:
            tl.store(kv_cache + target + column, value, is_row[:, None])
            tl.store(kv_cache + target + KV_LORA_RANK + rope_column, rotated, is_row[:, None])
    else:  # other names: a variable of both branches must have one type
        query = (program - append_programs) * PLACED_ROWS + tl.arange(0, PLACED_ROWS)
        is_query = query < q_rows
        q_head = query % num_heads
        q_token = query // num_heads % seqlen_q
        q_request = query // num_heads // seqlen_q
        q_column = tl.arange(0, QK_ROPE_HEAD_DIM)[None, :]
        q_source = q_rope + q_request * q_rope_stride_batch + q_token * q_rope_stride_token
        q_source = (q_source + q_head * q_rope_stride_head)[:, None] + q_column * q_rope_stride_column
        q_target = q + q_request * q_stride_batch + q_token * q_stride_token + q_head * q_stride_head
        q_target = q_target[:, None] + (KV_LORA_RANK + q_column) * q_stride_column
        tl.store(q_target, tl.load(q_source, is_query[:, None]), is_query[:, None])
