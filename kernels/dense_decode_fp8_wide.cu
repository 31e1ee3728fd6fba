// Decode attention over FP8 rows on Hopper for more than 32 query rows per latent head: tiles of 64 query rows, for
// which products take longer than loads. Codes become fp16 on their way into shared memory, and wgmma does the rest as
// in dense_decode.cu.
//
// A token's codes come times its scales over `ref`, a power of two of its own, and are rounded once more to fp16's 11
// bits; `ref` is 1/64 to 1/32 of the largest scale, so that the largest latent is below 2^15 and bits go down to 2^-24:
// columns whose scale is below 2^-19 of the token's largest lose one bit of 11 by each further power of two. Rotated
// keys are divided by `ref` too, in bf16, and a row of Q by a power of two that brings its largest magnitude to 2^14
// and more. All is put back in fp32:
//   S = (Q K^T) * ref * (what the row of Q was divided by)
//   P = 2^(S * softmax_scale_log2 + log2(ref) - m)            that is, times ref: what V was divided by
//   sum = P / ref, O = P V
//
// Four warpgroups, two units of 64 tokens in shared memory (72 KiB each, as in bf16):
//   convert  looks rows up, in pages or by index, and makes fp16 of them where they lie
//   score    makes fp16 of Q, computes S and P; P(j) overwrites the rotated keys of unit j
//   value    two of them: half of O's columns each; who has left its half of a slot asks for rows of the next unit
//   there
// Barriers, one phase per unit, or per item for Q:
//   raw[slot][w]  value -> warp w of convert    its 16 rows have arrived as they are (of units 0 and 1: convert itself)
//   full[slot]    convert -> score              the unit is fp16
//   p_full[slot]  score -> value                P is stored
//   q_full        score -> score                Q has arrived as it is
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock. (Over 600 lines: the roles and
// their barriers are one protocol, read together or not at all.)
#include "fp8_row.cuh"
#include "wide_rows.cuh"

constexpr int NUM_THREADS = 4 * WARPGROUP;
// 65,536 registers / 512 threads = 128 at launch: 512 per lane over the four warpgroups.
constexpr int SCORE_REGISTERS = 104;
constexpr int VALUE_REGISTERS = 160;
constexpr int CONVERT_REGISTERS = 88;
static_assert(SCORE_REGISTERS + 2 * VALUE_REGISTERS + CONVERT_REGISTERS <= 512);

constexpr int V_TILES = ROW_CODES / TILE_COLUMNS;
constexpr int TILES = V_TILES + 1;  // the last holds the rotated columns
constexpr int HALF_ROWS = WARP_ROWS / 2;
static_assert(HALF_ROWS == V_TILES && ROW_BYTES <= HALF_ROWS * 128);

// P times ref is at first 2^6 where it is largest, and stays below 2^14: fp16 has 11 bits down to 2^-14, which is 2^-20
// of that, and ends at 2^-24.
constexpr int P_HEADROOM = 6;
constexpr int REF_HEADROOM = 6;  // of a token's largest scale over its ref, log2
// `ref` is 2^-70 at the least: what rotated keys over it come to stays far from the end of fp32.
constexpr int LEAST_REF = 127 - 70;

struct Shared;

template <bool IS_SPARSE_>
struct Shape {
  static constexpr bool IS_SPARSE = IS_SPARSE_;  // rows are named by index
  using Memory = Shared;
  static constexpr int KV_LORA_RANK = ROW_CODES;
  static constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;  // of O, per value warpgroup
  static constexpr int STAGES = 2;
  static constexpr int TILE_ROWS = BLOCK_M;
  static constexpr bool IS_BF16 = true;  // of queries and results
};

using Tile = Shape<false>;  // for what does not depend on how rows are found

// Of two tokens side by side.
struct TokenPair {
  float ref[2];
  float log_ref[2];  // log2; NaN where a scale is not finite: so is every score then
};

// All units of all items, one after another; per warp, in shared memory because registers are short.
struct Walk {
  Item item;
  int unit;  // of the item, the next one
};

// What a warp's 16 rows of unit u are found by: noted after u - 3 and before u - 2 is announced, read by who leaves u -
// 2, and last by score of unit u.
struct Asked {
  uint32_t offset[WARP_ROWS];  // in the pool, in steps of 16 bytes
  uint32_t named;              // a bit per row
  uint32_t is_unit;            // 0: behind the last one
};
constexpr int NOTED = 8;  // units: convert notes n + 5 while score may read n + 1; and a power of two

struct alignas(1024) Shared {
  uint8_t ring[Tile::STAGES][TILES][TILE_BYTES];  // first: slot_address counts from the start
  uint8_t q[TILES][TILE_BYTES];
  alignas(16) TokenPair tokens[Tile::STAGES][BLOCK_N / 2];
  float inverse_sum[Tile::STAGES][BLOCK_M];  // of an item, beside its last unit
  uint64_t raw[Tile::STAGES][PRODUCER_WARPS];
  uint64_t q_full;
  uint64_t full[Tile::STAGES];
  uint64_t p_full[Tile::STAGES];
  uint8_t rise[Tile::STAGES][BLOCK_M];  // alpha = 2^-rise
  Asked asked[NOTED][PRODUCER_WARPS];
  Walk walk[PRODUCER_WARPS];
  Cta cta;
};

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Of ring slot `slot`, or Q behind the last one: made anew of the symbol each time, as in dense_decode.cu.
__device__ __forceinline__ uint32_t slot_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * (TILES * TILE_BYTES);
}

// Tile row `row`, 16-byte chunk `chunk` of its 128 bytes, 128-byte swizzle.
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// --- convert --------------------------------------------------------------------------------------------------------

// What the lane's row of a unit, row lane % 16 of its warp's 16, is found by: `number` of a page, or of a row of the
// pool that an index names; < 0: there is no such row.
struct Lookup {
  int number;
  uint32_t start;  // in the page, in steps of 16 bytes
};

// Of unit `unit` of an item; the answer is not waited for.
template <class S>
__device__ __forceinline__ Lookup look_up(const GatherParams& gather, const Cta& cta, const Item& item, int unit,
                                          int warp) {
  const DecodeParams& params = gather.decode;
  const int token = (item.first_unit + unit) * BLOCK_N + warp * WARP_ROWS + thread_index() % WARP_ROWS;
  if (token >= item.length) return {-1, 0};
  if (S::IS_SPARSE) return {ld_global_nc(params.block_table + item.request * params.table_stride_request + token), 0};
  const int row = params.block_size == BLOCK_N ? token % BLOCK_N : token % params.block_size;
  return {page_of(params, item.request, token), row * gather.row_stride + cta.kv_head * gather.head_stride};
}

// A warp's 16 rows of a unit.
struct Rows {
  bool is_unit;     // false: behind the last one
  uint32_t offset;  // of row lane % 16 in the pool, in steps of 16 bytes
  uint32_t named;   // a bit per row
};

// A unit as it was looked up; the answer is on its way.
struct Found {
  bool is_unit;  // false: behind the last one
  Lookup lookup;
};

// Looks up the next unit.
template <class S>
__device__ __forceinline__ Found next_unit(const GatherParams& gather, const Cta& cta, Walk& walk, int warp) {
  if (walk.item.request >= 0 && walk.unit == walk.item.num_units) {
    const Walk next = {item_with_units(gather.decode, walk.item.next), 0};
    __syncwarp();
    walk = next;
  }
  const int unit = walk.unit;
  if (walk.item.request < 0) return {false, {-1, 0}};
  const Lookup lookup = look_up<S>(gather, cta, walk.item, unit, warp);
  __syncwarp();
  walk.unit = unit + 1;
  return {true, lookup};
}

template <class S>
__device__ __forceinline__ Rows rows_of(const GatherParams& gather, const Found& found) {
  const int number = found.lookup.number;
  const bool is_row = number >= 0 && number < gather.num_places;
  const uint32_t stride = S::IS_SPARSE ? gather.row_stride : gather.page_stride;
  return {found.is_unit, (uint32_t)number * stride + found.lookup.start,
          __ballot_sync(0xFFFFFFFF, is_row) & ((1u << WARP_ROWS) - 1)};
}

// Where a row lies in a ring slot as it comes out of the pool: rows i and i + 8 of a warp in tile i, where rows 0 to 7
// and 8 to 15 of its 16 will lie as fp16. So half of a warp's rows are read, and then what they become is written over
// them.
__device__ __forceinline__ uint32_t raw_row(uint32_t tiles, uint32_t warp, uint32_t i) {
  return tiles + i % HALF_ROWS * TILE_BYTES + (warp * WARP_ROWS + i / HALF_ROWS * HALF_ROWS) * 128;
}

// Notes what a warp's rows of unit `number` are found by.
__device__ __forceinline__ void note(Shared& shared, uint32_t number, uint32_t warp, const Rows& rows) {
  Asked& asked = shared.asked[number % NOTED][warp];
  const uint32_t lane = thread_index() & 31;
  if (lane < WARP_ROWS) asked.offset[lane] = rows.offset;
  if (lane == 0) {
    asked.named = rows.named;
    asked.is_unit = rows.is_unit;
  }
  __syncwarp();
}

// Asks for those of the noted rows of unit `number`, 16 of a warp's, that will lie in tiles of half `half` of the
// columns. One thread asks for all of them, with addresses that the compiler sees to be the warp's: it makes a loop of
// ~75 clocks per copy out of lanes that ask for one each.
__device__ __forceinline__ void load_rows(const uint8_t* pool, Shared& shared, int slot, uint32_t number, uint32_t warp,
                                          uint32_t half) {
  const Asked& asked = shared.asked[number % NOTED][warp];
  if (!asked.is_unit) return;
  const uint32_t named = __shfl_sync(0xFFFFFFFF, asked.named, 0), lane = thread_index() & 31;
  const uint32_t mine = asked.offset[lane % WARP_ROWS];
  uint32_t offset[HALF_ROWS], row[HALF_ROWS];
#pragma unroll
  for (uint32_t i = 0; i < HALF_ROWS; ++i) {
    row[i] = i / 4 * HALF_ROWS + half * (HALF_ROWS / 2) + i % 4;
    offset[i] = __shfl_sync(0xFFFFFFFF, mine, row[i]);
  }
  const uint32_t tiles = slot_address(slot);
  uint64_t& raw = shared.raw[slot][warp];
  if (elect_one()) {
    mbarrier_arrive_expect_tx(raw, __popc(named & (half == 0 ? 0x0F0F : 0xF0F0)) * ROW_BYTES);
#pragma unroll
    for (uint32_t i = 0; i < HALF_ROWS; ++i) {
      if (named >> row[i] & 1) {
        bulk_load(raw_row(tiles, warp, row[i]), pool + (uint64_t)offset[i] * 16, ROW_BYTES, raw);
      }
    }
  }
  __syncwarp();
}

// Rows 8 * HALF to 8 * HALF + 7 of a warp's 16, which `named` names, to fp16.
template <int HALF>
__device__ __forceinline__ void convert_rows(Shared& shared, int slot, uint32_t warp, uint32_t named) {
  const uint32_t lane = thread_index() & 31, tiles = shared_address(shared.ring[slot]);
  const uint32_t first = warp * WARP_ROWS + HALF * HALF_ROWS;  // of the tile
  const uint32_t raw = raw_row(tiles, warp, HALF * HALF_ROWS);
  // Of row lane / 4, for 128 columns; then, as fp16 twice, over the row's ref.
  float scale = 1.f;
  if (named >> lane / 4 & 1) scale = ld_shared(raw + lane / 4 * TILE_BYTES + ROW_CODES + lane % 4 * 4);
  uint4 k_rope[2];                 // 8 columns of rows lane / 8 and 4 + lane / 8
  uint2 codes[HALF_ROWS][2] = {};  // a lane's 8 of each half of a row
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t row = 4 * i + lane / 8;
    k_rope[i] = make_uint4(0, 0, 0, 0);
    if (named >> row & 1) k_rope[i] = ld_shared_v4(raw + row * TILE_BYTES + K_ROPE_AT + lane % 8 * 16);
  }
#pragma unroll
  for (int i = 0; i < HALF_ROWS; ++i) {
    if (named >> i & 1) {
      codes[i][0] = ld_shared_v2(raw + i * TILE_BYTES + lane * 8);
      codes[i][1] = ld_shared_v2(raw + i * TILE_BYTES + ROW_CODES / 2 + lane * 8);
    }
  }
  __syncwarp();  // all have read, and now it is written over

  float top = fmaxf(fabsf(scale), __shfl_xor_sync(0xFFFFFFFF, fabsf(scale), 1));
  top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
  const uint32_t finite = __ballot_sync(0xFFFFFFFF, fabsf(scale) < infinity());
  const int ref = max((__float_as_int(top) >> 23) + 1 - REF_HEADROOM, LEAST_REF);  // its exponent, as fp32 has it
  const float inverse = __int_as_float((254 - ref) << 23);
  const uint32_t ratios = pack<false>(scale * inverse, scale * inverse), inverses = pack<true>(inverse, inverse);
  if (lane % 4 == 0) {
    const uint32_t token = first + lane / 4;
    TokenPair& pair = shared.tokens[slot][token / 2];
    pair.ref[token % 2] = __int_as_float(ref << 23);
    pair.log_ref[token % 2] = (finite >> lane & 0xF) == 0xF ? ref - 127.f : infinity() * 0.f;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t row = 4 * i + lane / 8, by = __shfl_sync(0xFFFFFFFF, inverses, row * 4);
    st_shared_v4(tiles + V_TILES * TILE_BYTES + chunk_offset(first + row, lane % 8),
                 make_uint4(mul_bf16x2(k_rope[i].x, by), mul_bf16x2(k_rope[i].y, by), mul_bf16x2(k_rope[i].z, by),
                            mul_bf16x2(k_rope[i].w, by)));
  }
#pragma unroll
  for (int i = 0; i < HALF_ROWS; ++i) {
    const uint32_t target = tiles + lane / 8 * TILE_BYTES + first * 128 + i * 128 + ((lane % 8 ^ i) << 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t by = __shfl_sync(0xFFFFFFFF, ratios, i * 4 + half * 2 + lane / 16);
      uint4 value;
      fp16_of(codes[i][half].x, value.x, value.y);
      fp16_of(codes[i][half].y, value.z, value.w);
      st_shared_v4(
          target + half * (V_TILES / 2 * TILE_BYTES),
          make_uint4(mul_f16x2(value.x, by), mul_f16x2(value.y, by), mul_f16x2(value.z, by), mul_f16x2(value.w, by)));
    }
  }
}

template <class S>
__device__ __forceinline__ void convert_role(const GatherParams& gather, Shared& shared) {
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS;
  Walk& walk = shared.walk[warp];
  walk = {item_with_units(gather.decode, shared.cta.plan_slot), 0};
  // The first units are asked for here, as long as slots are new; the others by who leaves a slot.
  Found first[Tile::STAGES + 1];
#pragma unroll
  for (int unit = 0; unit <= Tile::STAGES; ++unit) first[unit] = next_unit<S>(gather, shared.cta, walk, warp);
#pragma unroll
  for (int unit = 0; unit <= Tile::STAGES; ++unit) {
    note(shared, unit, warp, rows_of<S>(gather, first[unit]));
    if (unit == Tile::STAGES) break;
    for (int half = 0; half < 2; ++half) load_rows(gather.pool, shared, unit, unit, warp, half);
  }
  Position<S> position;
  for (uint32_t number = 0; shared.asked[number % NOTED][warp].is_unit; ++number) {
    const int slot = position.slot();
    // Used in this turn of the loop: from one to the next it would be copied, and so waited for.
    const Found found = next_unit<S>(gather, shared.cta, walk, warp);
    mbarrier_wait(shared.raw[slot][warp], position.phase());
    const uint32_t named = shared.asked[number % NOTED][warp].named;
    convert_rows<0>(shared, slot, warp, named);
    convert_rows<1>(shared, slot, warp, named >> HALF_ROWS);
    // wgmma reads through the async proxy what was stored here.
    fence_proxy_async();
    __syncwarp();
    if ((thread_index() & 31) == 0) mbarrier_arrive(shared.full[slot]);
    // Now, while nobody waits for this warp.
    note(shared, number + Tile::STAGES + 1, warp, rows_of<S>(gather, found));
    position.advance();
  }
}

// --- score ----------------------------------------------------------------------------------------------------------

// Two of bf16, times `factor`: to bf16, or to fp16.
template <bool IS_BF16>
__device__ __forceinline__ uint32_t times(uint32_t both, float factor) {
  return pack<IS_BF16>(__int_as_float(both << 16) * factor, __int_as_float(both & 0xFFFF0000) * factor);
}

template <bool IS_BF16>
__device__ __forceinline__ uint4 times(const uint4& eight, float factor) {
  return make_uint4(times<IS_BF16>(eight.x, factor), times<IS_BF16>(eight.y, factor), times<IS_BF16>(eight.z, factor),
                    times<IS_BF16>(eight.w, factor));
}

// Asks for an item's Q, by one thread, as soon as nobody reads the one before.
__device__ __forceinline__ void load_queries(const DecodeParams& params, Shared& shared, int request) {
  const Cta cta = shared.cta;
  mbarrier_arrive_expect_tx(shared.q_full, TILES * TILE_BYTES);
  tma_load_5d(shared.q, params.q_map, shared.q_full, 0, cta.first_row, 0, cta.kv_head, request);
}

// Makes fp16 of Q's latent columns where they lie, a warp of its own 16 rows; `factor` of the thread's two rows, for
// their scores: what they were divided by, NaN where they are not finite.
__device__ __forceinline__ void take_queries(float softmax_scale_log2, Shared& shared, float (&factor)[2]) {
  constexpr int AT_ONCE = 4;  // rows
  const uint32_t lane = thread_index() & 31, warp = thread_index() >> 5;
  const uint32_t tiles = shared_address(shared.q) + lane / 8 * TILE_BYTES;
#pragma unroll 1  // run once per item: what is not fetched costs more than what loops cost
  for (int first = 0; first < WARP_ROWS; first += AT_ONCE) {
    uint4 query[AT_ONCE][3];  // chunks of 8 columns: lane, lane + 32, and in the first eight lanes rotated ones
    uint32_t at[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      at[i] = tiles + chunk_offset(warp * WARP_ROWS + first + i, lane % 8);
#pragma unroll
      for (int part = 0; part < 2; ++part) query[i][part] = ld_shared_v4(at[i] + part * (4 * TILE_BYTES));
      query[i][2] = make_uint4(0, 0, 0, 0);
      if (lane < 8) query[i][2] = ld_shared_v4(at[i] + V_TILES * TILE_BYTES);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int latent = magnitude(max_abs_bf16x2(magnitudes(query[i][0]), magnitudes(query[i][1])));
      // Rotated columns, which stay bf16, count where they are 2^24 times the others: up to there no product of theirs
      // comes to the end of fp32.
      const int top = reduce_max(max(max(latent, magnitude(magnitudes(query[i][2])) - (24 << 7)), 0));
      const int exponent = min(max(top >> 7, 28), 254);  // the row's largest number comes to 2^14 and more
      const float by = __int_as_float((254 + 14 - exponent) << 23);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        st_shared_v4(at[i] + part * (4 * TILE_BYTES), times<false>(query[i][part], by));
      }
      if (lane < 8) st_shared_v4(at[i] + V_TILES * TILE_BYTES, times<true>(query[i][2], by));
      const bool is_finite = latent < 0x7F80 && magnitude(magnitudes(query[i][2])) < 0x7F80;
      const float divisor =
          !__all_sync(0xFFFFFFFF, is_finite) ? infinity() * 0.f : __int_as_float((exponent - 14) << 23);
      if ((first + i) % 8 == lane / 4) (first < 8 ? factor[0] : factor[1]) = divisor * softmax_scale_log2;
    }
  }
  // wgmma reads through the async proxy what was stored here.
  fence_proxy_async();
  bar_sync(BARRIER_SCORE, WARPGROUP);
}

// S of a unit, over ref and over what Q was divided by.
__device__ __forceinline__ void score_unit(int slot, float (&s)[32]) {
  const uint64_t keys = matrix_descriptor(slot_address(slot), 0, 1024, Swizzle::B128);
  const uint64_t queries = matrix_descriptor(slot_address(Tile::STAGES), 0, 1024, Swizzle::B128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int at = V_TILES * TILE_BYTES + step * 32;
    wgmma_m64n64k16_shared<true>(s, advance(queries, at), advance(keys, at), step > 0);
  }
#pragma unroll
  for (int step = 0; step < 4 * V_TILES; ++step) {
    const int at = step / 4 * TILE_BYTES + step % 4 * 32;
    wgmma_m64n64k16_shared<false>(s, advance(queries, at), advance(keys, at), true);
  }
  wgmma_commit_group();
}

// Scores of tokens that a row does not see, or that are not named, are none; `stored` tokens of the request from the
// unit's first one on.
__device__ __forceinline__ void hide(const DecodeParams& params, const Cta& tile, uint64_t named, int stored,
                                     float (&s)[32]) {
  const int row = tile.first_row + accumulator_row();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int visible = visible_tokens(params, stored, row + 8 * half);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = (i >> 1) * 8 + thread_index() % 4 * 2 + (i & 1);
      float& score = s[(i >> 1) * 4 + half * 2 + (i & 1)];
      score = column < visible && (named >> column & 1) ? score : -infinity();
    }
  }
}

template <class S>
__device__ __forceinline__ void score_role(const GatherParams& gather, Shared& shared) {
  const DecodeParams& params = gather.decode;
  Position<S> position;
  uint32_t q_phase = 0, number = 0;  // of the next unit, among all of the CTA
  if (thread_index() == 0) {
    const Item item = item_with_units(params, shared.cta.plan_slot);
    if (item.request >= 0) load_queries(params, shared, item.request);
  }
  __syncwarp();
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    float reference[2] = {0.f, 0.f};  // of the maxima, log2; rises by whole numbers, so that alpha is exact
    float sum[2] = {0.f, 0.f};        // of this thread's columns
    float factor[2];                  // of the thread's rows: S comes divided by it
    int units_left, stored;           // tokens of the request from the current unit on
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
      stored = item.length - item.first_unit * BLOCK_N;
    }
    if (units_left > 0) {
      mbarrier_wait(shared.q_full, q_phase);
      q_phase ^= 1;
      take_queries(params.softmax_scale_log2, shared, factor);
    }
    bool is_first = true;
    for (; units_left > 0; --units_left) {
      const int slot = position.slot();
      float s[32];
      mbarrier_wait(shared.full[slot], position.phase());
      score_unit(slot, s);
      // What the scores will be put together with comes while they are multiplied.
      TokenPair pairs[BLOCK_N / 8];
#pragma unroll
      for (int n8 = 0; n8 < BLOCK_N / 8; ++n8) pairs[n8] = shared.tokens[slot][4 * n8 + thread_index() % 4];
      uint64_t named = 0;  // a bit per token
#pragma unroll
      for (int warp = 0; warp < PRODUCER_WARPS; ++warp) {
        named |= (uint64_t)shared.asked[number % NOTED][warp].named << warp * WARP_ROWS;
      }
      ++number;
      position.advance();
      wgmma_wait_group<0>();

      const int lane = thread_index() % 32;
#pragma unroll
      for (int n8 = 0; n8 < 8; ++n8) {
        const TokenPair& pair = pairs[n8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[4 * n8 + i] =
              __fmaf_rn(s[4 * n8 + i], pair.ref[i & 1] * factor[i >> 1], pair.log_ref[i & 1] - reference[i >> 1]);
        }
      }
      if (named != ~0ull || visible_tokens(params, stored, shared.cta.first_row) < BLOCK_N) {
        hide(params, shared.cta, named, stored, s);
      }
      stored -= BLOCK_N;
      const uint32_t rises = raise<P_HEADROOM>(s, is_first, reference, sum);
      is_first = is_first && named == 0;
#pragma unroll
      for (int n8 = 0; n8 < 8; ++n8) {
        const TokenPair& pair = pairs[n8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[4 * n8 + i] = ex2(s[4 * n8 + i]);
          // Times one over ref, a power of two.
          const float inverse = __int_as_float(0x7F000000 - __float_as_int(pair.ref[i & 1]));
          sum[i >> 1] = __fmaf_rn(s[4 * n8 + i], inverse, sum[i >> 1]);
        }
      }

      // All warps have finished S(j), which reads the rotated keys that P overwrites.
      bar_sync(BARRIER_SCORE, WARPGROUP);
      // And with an item's last one they have left Q.
      if (units_left == 1 && thread_index() == 0) {
        const Item next = item_with_units(params, load_item(params, plan_row).next);
        if (next.request >= 0) load_queries(params, shared, next.request);
      }
      __syncwarp();
      store_p<false>(shared.ring[slot][V_TILES], s);
      const int sum_row = accumulator_row();
      if (lane % 4 == 0) {
        shared.rise[slot][sum_row] = rises;
        shared.rise[slot][sum_row + 8] = rises >> 8;
      }
      if (units_left == 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 1);
          sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 2);
          // Not `> 0`: NaN stays NaN.
          if (lane % 4 == 0) shared.inverse_sum[slot][sum_row + 8 * half] = sum[half] == 0.f ? 0.f : 1.f / sum[half];
        }
      }
      // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence the
      // tensor core may read stale bytes: wrong numbers, no error.
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.p_full[slot]);
    }
    const Item item = load_item(params, plan_row);
    store_log_sums(params, item, shared.cta, reference, sum);
    plan_row = item.next;
  }
}

// --- value ----------------------------------------------------------------------------------------------------------

template <class S, int HALF>
__device__ __forceinline__ void value_role(const GatherParams& gather, Shared& shared) {
  const DecodeParams& params = gather.decode;
  const uint32_t warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % 4;
  uint32_t number = 0;  // of the next unit, among all of the CTA
  Position<S> position;
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    int units_left;
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
    }
    float o[Tile::HALF_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < Tile::HALF_COLUMNS / 2; ++i) o[i] = 0.f;
    float scale[2] = {0.f, 0.f};
    for (; units_left > 0; --units_left) {
      const int slot = position.slot();
      mbarrier_wait(shared.p_full[slot], position.phase());
      lower<S>(shared.rise[slot], o);
      const uint32_t tiles = slot_address(slot);
      const uint64_t p = matrix_descriptor(tiles + V_TILES * TILE_BYTES, 0, 1024, Swizzle::B128);
      const uint64_t v = matrix_descriptor(tiles + HALF * V_TILES / 2 * TILE_BYTES, TILE_BYTES, 1024, Swizzle::B128);
      float (&left)[Tile::HALF_COLUMNS / 4] = reinterpret_cast<float (&)[Tile::HALF_COLUMNS / 4]>(o[0]);
      float (&right)[Tile::HALF_COLUMNS / 4] =
          reinterpret_cast<float (&)[Tile::HALF_COLUMNS / 4]>(o[Tile::HALF_COLUMNS / 4]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < BLOCK_N / 16; ++step) {
        wgmma_m64k16_transposed<false>(left, advance(p, step * 32), advance(v, step * 2048), true);
        wgmma_m64k16_transposed<false>(right, advance(p, step * 32), advance(v, 2 * TILE_BYTES + step * 2048), true);
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
      if (units_left == 1) {
        const int row = accumulator_row();
        scale[0] = shared.inverse_sum[slot][row];
        scale[1] = shared.inverse_sum[slot][row + 8];
      }
      // All four warps have left this half of the unit's columns: rows of the next unit of this slot may come.
      bar_sync(BARRIER_VALUE + HALF, WARPGROUP);
      load_rows(gather.pool, shared, slot, number + Tile::STAGES, warp, HALF);
      ++number;
      position.advance();
    }
    const Item item = load_item(params, plan_row);
    store_row<S, 0>(params, shared.cta, item, HALF, o, scale[0]);
    store_row<S, 1>(params, shared.cta, item, HALF, o, scale[1]);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S, class Params>
__device__ __forceinline__ void decode(const GatherParams& gather) {
  static_assert(sizeof(typename S::Memory) <= SHARED_LIMIT);
  const DecodeParams& params = gather.decode;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) {
    mbarrier_init(shared.q_full, 1);
    for (int slot = 0; slot < Tile::STAGES; ++slot) {
      for (int warp = 0; warp < PRODUCER_WARPS; ++warp) mbarrier_init(shared.raw[slot][warp], 2);
      mbarrier_init(shared.full[slot], PRODUCER_WARPS);
      mbarrier_init(shared.p_full[slot], 4);  // warps of the score warpgroup
    }
    fence_mbarrier_init();
    const int tile = blockIdx.x % params.tiles;
    shared.cta = {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * BLOCK_M};
  }
  begin_launch(params, shared.cta, 1);

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<SCORE_REGISTERS>();
    score_role<S>(gather, shared);
  } else if (warpgroup == 1) {
    setmaxnreg_inc<VALUE_REGISTERS>();
    value_role<S, 0>(gather, shared);
  } else if (warpgroup == 2) {
    setmaxnreg_inc<VALUE_REGISTERS>();
    value_role<S, 1>(gather, shared);
  } else {
    setmaxnreg_dec<CONVERT_REGISTERS>();
    convert_role<S>(gather, shared);
  }
}

#define DECODE_KERNEL(NAME, PARAMS, IS_SPARSE)                                         \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                         \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ PARAMS params) { \
    decode<Shape<IS_SPARSE>, PARAMS>(params);                                          \
  }

DECODE_KERNEL(bf16_512_64, GatherParams, false)
DECODE_KERNEL(sparse_bf16_512_64, GatherParams, true)
