// What the kernels over FP8 rows share: how e4m3 stands on both sides of wgmma, and how rows and queries come to shared
// memory. Latents are never converted: their codes go to the tensor cores as they lie. Queries are bf16; 512 + 64
// columns.
//
// A row of the pool is [512 e4m3 | 4 fp32 scales, of 128 columns each | 64 bf16]. Queries and P are split into two e4m3
// numbers of four bits each, x = high + low / 16: eight bits, as bf16 has. Per unit of 64 tokens and ROWS = 16 or 32
// query rows, with codes C, g = 0..3 the group of 128 columns, scale[token][g]:
//   S^T = sum_g scale[.][g] (C_g [high | low](Q_g)^T) + rotated keys x rotated queries    64 x ROWS
//   P^T = 2^(S^T * softmax_scale_log2 - m)                                                64 x ROWS
//   O_g^T = O_g^T * alpha + C_g^T [high | low](scale[.][g] P^T)                           128 x 64 . 64 x ROWS
// Products of codes are exact. The tensor cores add e4m3 products up in fewer bits than fp32 has (about 14), so S is
// taken from them per group and O per unit, and what is longer is added in fp32.
//
// Range. A row of Q is divided by a power of two that brings its largest magnitude to 128 or more, and so are its
// rotated columns, in bf16; high ends at 448, low has bits down to 2^-13. P counts in 1/16 and scales in a power of two
// above their maximum, so P times a scale has bits down to 2^-17 of 1. Where P comes to more than 16 times its
// reference, or a scale to 1.75 times its unit, both are counted anew, and O with them.
//
// Values stand on wgmma's 64-row side and must have tokens adjacent: `ldmatrix` transposes pairs of bytes, one `prmt`
// per four codes puts tokens side by side. P's tokens are stored in the same order.
//
// A shape S has, besides what few_rows.cuh wants: ROWS, the query rows that a consumer scores; TILE_ROWS, those of the
// CTA; whether consumers take units by turns (TURNS) or share each; whether rows are named by index (IS_SPARSE); and
// where a consumer's Q (q, q_rope) and P (p) are. (580 lines: what the codes' order means to loads, queries, scores and
// values is said in one place.)
#pragma once

#include "few_rows.cuh"

constexpr int GROUP_COLUMNS = 128;  // that share a scale; as codes, a tile of 128 bytes per token
constexpr int GROUPS = KV_LORA_RANK / GROUP_COLUMNS;
constexpr int GROUP_TILES = GROUP_COLUMNS / TILE_COLUMNS;  // of O^T
static_assert(GROUPS == 4);                                // of a float4

constexpr int CONSUMER_REGISTERS = 232;
constexpr int PRODUCER_REGISTERS = 40;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 504);
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr int PRODUCER_WARPS = WARPGROUP / 32;
constexpr int WARP_ROWS = BLOCK_N / PRODUCER_WARPS;  // that a warp copies
static_assert(WARP_ROWS == 16);

constexpr float P_UNITS = 16.f;       // of 1, in what is split
constexpr float LOW_UNIT = 1.f / 16;  // of the low parts, in units of the high ones
// P may be 2^4 and a scale 1.75 of its unit before they are counted anew: 16 * 16 * 1.75 = 448, the end of e4m3.
constexpr float FP8_RESCALE_ABOVE = 4.f;
constexpr float SCALE_ABOVE = 1.75f * P_UNITS;

struct alignas(1024) Unit {
  uint8_t latent[GROUPS][TILE_BYTES];  // 64 rows x 128 bytes, 128-byte swizzle
  uint8_t k_rope[TILE_BYTES];
  float4 scales[BLOCK_N];
};
constexpr int UNIT_BYTES = 64 * 656;
static_assert(sizeof(Unit) == UNIT_BYTES);

// What shapes of `ROWS` query rows per consumer have in common.
template <int ROWS_>
struct Codes {
  static constexpr int ROWS = ROWS_;  // wgmma's N is twice that
  static constexpr bool IS_BF16 = true;
  static constexpr bool ARE_PAIRS = true;                        // as load_values makes them
  static constexpr int COLUMNS = ROWS / 4;                       // query rows of which a thread has a part
  static constexpr int Q_TILE_BYTES = 2 * ROWS * GROUP_COLUMNS;  // rows of 128 columns, the high parts first
  static constexpr int Q_ROPE_BYTES = ROWS * TILE_COLUMNS * 2;
  static constexpr int P_TILE_BYTES = 2 * ROWS * BLOCK_N;  // rows of 64 tokens, the high parts first
  static_assert(ROWS % STAGED_ROWS == 0);
};

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Made anew of the symbol each time, for descriptors in uniform registers: see dense_decode.cu.
__device__ __forceinline__ uint32_t unit_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * UNIT_BYTES;
}

// --- producers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_unit(const Fp8DecodeParams& fp8, const Cta& cta, const Item& item, Unit& target,
                                          uint64_t& full, int unit, const Place& place) {
  const DecodeParams& params = fp8.decode;
  if (params.box_rows == BLOCK_N) {
    mbarrier_arrive_expect_tx(full, UNIT_BYTES);
    tma_load_5d(target.scales, fp8.scale_map, full, 0, place.row, 0, cta.kv_head, place.page);
    tma_load_5d(target.k_rope, params.q_map, full, 0, place.row, 0, cta.kv_head, place.page);
    tma_load_5d(target.latent, params.kv_map, full, 0, place.row, 0, cta.kv_head, place.page);
    return;
  }
  const int token = (item.first_unit + unit) * BLOCK_N;
  // Boxes past the length are left out: their pages may not be looked up.
  const int boxes = min(BLOCK_N, item.length - token + params.box_rows - 1) / params.box_rows;
  mbarrier_arrive_expect_tx(full, boxes * params.box_rows * (UNIT_BYTES / BLOCK_N));
#pragma unroll 1
  for (int box = 0; box < boxes; ++box) {
    const int first = box * params.box_rows;
    const int page = page_of(params, item.request, token + first), row = (token + first) % params.block_size;
    tma_load_5d(target.scales + first, fp8.scale_map, full, 0, row, 0, cta.kv_head, page);
    tma_load_5d(target.k_rope + first * 128, params.q_map, full, 0, row, 0, cta.kv_head, page);
#pragma unroll 1
    for (int group = 0; group < GROUPS; ++group) {
      tma_load_5d(target.latent[group] + first * 128, params.kv_map, full, 0, row, group, cta.kv_head, page);
    }
  }
}

// All units of all items, as ring slots become free. By TMA: the first warp.
template <class S>
__device__ __forceinline__ void load_units(const Fp8DecodeParams& fp8, typename S::Memory& shared, const Cta& cta,
                                           int warp) {
  if (warp > 0) return;
  const DecodeParams& params = fp8.decode;
  const bool is_issuing = thread_index() % 32 == 0;
  Position<S> position;
  int consumer = 0;  // whose barrier it is
  Item item = item_with_units(params, cta.plan_slot);
  Place places = places_of(params, item, 0);
  while (item.request >= 0) {
    Item next;
    Place next_places;
    for (int unit = 0; unit < item.num_units; ++unit) {
      if (unit % 32 == 0 && unit > 0) places = places_of(params, item, unit);
      const Place place = {__shfl_sync(0xFFFFFFFF, places.page, unit % 32),
                           __shfl_sync(0xFFFFFFFF, places.row, unit % 32)};
      if (is_issuing) {
        mbarrier_wait(shared.empty[position.slot], position.phase ^ 1);
        load_unit(fp8, cta, item, shared.ring[position.slot], shared.full[consumer][position.slot], unit, place);
      }
      __syncwarp();
      position = position.after(1);
      if (S::TURNS) consumer ^= 1;
      // The next item's length and pages are looked up once the last unit of this one is on its
      // way: three loads, one after another.
      if (unit + 1 == item.num_units) {
        next = item_with_units(params, item.next);
        next_places = places_of(params, next, 0);
      }
    }
    item = next;
    places = next_places;
  }
}

// The row that the lane's token of unit `unit` names; < 0: none. (Lanes from WARP_ROWS on: as those before.)
__device__ __forceinline__ int index_of(const GatherParams& gather, const Item& item, int unit, int warp) {
  const int token = (item.first_unit + unit) * BLOCK_N + warp * WARP_ROWS + thread_index() % WARP_ROWS;
  if (item.request < 0 || token >= item.length) return -1;
  const int index = ld_global_nc(gather.decode.block_table + item.request * gather.decode.table_stride_request + token);
  return index < gather.num_rows ? index : -1;
}

// Begins to copy the warp's rows of a unit: 16 bytes per lane, eight lanes per row; zeros for rows that are not named.
template <class S>
__device__ __forceinline__ void copy_rows(const GatherParams& gather, typename S::Memory& shared, int slot, int index,
                                          int warp) {
  const int lane = thread_index() % 32, chunk = lane % 8;
  Unit& unit = shared.ring[slot];
  const uint4* pool = reinterpret_cast<const uint4*>(gather.pool);
  const uint32_t start = shared_address(&unit);
#pragma unroll
  for (int first = 0; first < WARP_ROWS; first += 4) {
    const int in_warp = first + lane / 8;
    const int named = __shfl_sync(0xFFFFFFFF, index, in_warp);
    const int bytes = named < 0 ? 0 : 16, row = warp * WARP_ROWS + in_warp;
    const uint4* from = pool + (named < 0 ? 0 : (uint32_t)named * gather.row_stride) + chunk;
    const uint32_t to = start + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      cp_async_16(to + group * TILE_BYTES, from + group * (GROUP_COLUMNS / 16), bytes);
    }
    cp_async_16(to + GROUPS * TILE_BYTES, from + (KV_LORA_RANK + 4 * GROUPS) / 16, bytes);
  }
  if (lane < WARP_ROWS) {
    const uint4* from = pool + (index < 0 ? 0 : (uint32_t)index * gather.row_stride) + KV_LORA_RANK / 16;
    cp_async_16(shared_address(&unit.scales[warp * WARP_ROWS + lane]), from, index < 0 ? 0 : 16);
  }
}

// The same of rows that are named by index: all warps, 16 rows each.
template <class S>
__device__ __forceinline__ void load_units(const GatherParams& gather, typename S::Memory& shared, const Cta& cta,
                                           int warp) {
  const DecodeParams& params = gather.decode;
  Position<S> position;
  int consumer = 0;
  Item item = item_with_units(params, cta.plan_slot);
  int index = index_of(gather, item, 0, warp);
  while (item.request >= 0) {
    Item next = item;
    for (int unit = 0; unit < item.num_units; ++unit) {
      // Looked up one unit ahead.
      int next_index;
      if (unit + 1 < item.num_units) {
        next_index = index_of(gather, item, unit + 1, warp);
      } else {
        next = item_with_units(params, item.next);
        next_index = index_of(gather, next, 0, warp);
      }
      mbarrier_wait(shared.empty[position.slot], position.phase ^ 1);
      copy_rows<S>(gather, shared, position.slot, index, warp);
      uint64_t& full = shared.full[consumer][position.slot];
      cp_async_mbarrier_arrive(full);
      const uint32_t named = __ballot_sync(0xFFFFFFFF, index >= 0);
      if (thread_index() % 32 == 0) {
        shared.named[position.slot][warp] = (uint16_t)named;
        mbarrier_arrive(full);
      }
      position = position.after(1);
      if (S::TURNS) consumer ^= 1;
      index = next_index;
    }
    item = next;
  }
}

// --- consumers: queries ---------------------------------------------------------------------------------------------

// The larger magnitude of two bf16, as the 15 bits that order them.
__device__ __forceinline__ int magnitude(uint32_t both) {
  return max((int)(both & 0x7FFF), (int)(both >> 16 & 0x7FFF));
}

__device__ __forceinline__ int magnitude(const uint4& eight) {
  return max(max(magnitude(eight.x), magnitude(eight.y)), max(magnitude(eight.z), magnitude(eight.w)));
}

// Four bf16 of two registers times `factor`, as their high and their low parts.
__device__ __forceinline__ void split_four(uint32_t a, uint32_t b, float factor, uint32_t& high, uint32_t& low) {
  split_e4m3(pack<false>(__int_as_float(a << 16) * factor, __int_as_float(a & 0xFFFF0000) * factor),
             pack<false>(__int_as_float(b << 16) * factor, __int_as_float(b & 0xFFFF0000) * factor), high, low);
}

__device__ __forceinline__ uint32_t times(uint32_t both, float factor) {
  return pack<true>(__int_as_float(both << 16) * factor, __int_as_float(both & 0xFFFF0000) * factor);
}

// Up to four rows of an item's Q from row `first` of the tile on, by a warp.
template <class S, class Params, int NUM_ROWS>
__device__ __forceinline__ void take_rows(const Params& fp8, typename S::Memory& shared, const Cta& cta, int request,
                                          int first) {
  static_assert(NUM_ROWS <= 4);
  const DecodeParams& params = fp8.decode;
  const int lane = thread_index() % 32;
  const uint16_t* start = fp8.q + request * fp8.q_stride_request + cta.kv_head * fp8.q_stride_head;
  uint4 columns[NUM_ROWS][2];
  uint4 rotated = make_uint4(0, 0, 0, 0);  // eight lanes per row
#pragma unroll
  for (int i = 0; i < NUM_ROWS; ++i) {
    const int row = cta.first_row + first + i;
    const bool is_row = row < params.seqlen_q * params.group;
    const uint4* from = reinterpret_cast<const uint4*>(start + row * fp8.q_stride_row);
#pragma unroll
    for (int part = 0; part < 2; ++part) columns[i][part] = is_row ? from[2 * lane + part] : make_uint4(0, 0, 0, 0);
    if (is_row && lane / 8 == i) rotated = from[KV_LORA_RANK / 8 + lane % 8];
  }
  float own_factor = 0.f;  // of the row whose rotated columns the lane has
#pragma unroll
  for (int i = 0; i < NUM_ROWS; ++i) {
    const int consumer = (first + i) / S::ROWS, row = (first + i) % S::ROWS;
    int top = max(magnitude(columns[i][0]), magnitude(columns[i][1]));
    // Rotated columns only count where they are 2^40 times the others: they are to stay below the end of bf16.
    if (lane / 8 == i) top = max(top, magnitude(rotated) - (40 << 7));
    top = reduce_max(max(top, 0));
    const int exponent = min(max(top >> 7, 20), 254);
    const float factor = __int_as_float((261 - exponent) << 23);  // 2^(7 - (exponent - 127)): to 128 and more
    // What is not finite must not end at 448: a rotated column carries it into every score.
    if (lane / 8 == i) own_factor = top >= 0x7F80 ? infinity() * 0.f : factor;
    uint4 high, low;
    split_four(columns[i][0].x, columns[i][0].y, factor, high.x, low.x);
    split_four(columns[i][0].z, columns[i][0].w, factor, high.y, low.y);
    split_four(columns[i][1].x, columns[i][1].y, factor, high.z, low.z);
    split_four(columns[i][1].z, columns[i][1].w, factor, high.w, low.w);
    uint8_t* target = S::q(shared, consumer) + lane / 8 * S::Q_TILE_BYTES + row * 128 + ((lane % 8 ^ (row & 7)) << 4);
    *reinterpret_cast<uint4*>(target) = high;
    *reinterpret_cast<uint4*>(target + S::ROWS * 128) = low;
    // By turns both consumers score all rows.
    if (lane == consumer || (S::TURNS && lane < CONSUMERS)) {
      shared.from[lane][row] = {params.softmax_scale_log2 * __int_as_float((exponent - 7) << 23), 0.f};
    }
  }
  if (lane / 8 < NUM_ROWS) {
    const int consumer = (first + lane / 8) / S::ROWS, row = (first + lane / 8) % S::ROWS;
    *reinterpret_cast<uint4*>(S::q_rope(shared, consumer) + row * 128 + ((lane % 8 ^ (row & 7)) << 4)) =
        make_uint4(times(rotated.x, own_factor), times(rotated.y, own_factor), times(rotated.z, own_factor),
                   times(rotated.w, own_factor));
  }
}

// An item's Q, by all warps of both consumers, which meet at its end.
template <class S, class Params>
__device__ __forceinline__ void take_queries(const Params& fp8, typename S::Memory& shared, const Cta& cta, int request,
                                             int consumer) {
  constexpr int WARP_QUERIES = S::TILE_ROWS / CONSUMER_WARPS, AT_ONCE = WARP_QUERIES < 4 ? WARP_QUERIES : 4;
  const int warp = consumer * (WARPGROUP / 32) + thread_index() % WARPGROUP / 32;
#pragma unroll 1
  for (int first = 0; first < WARP_QUERIES; first += AT_ONCE) {
    take_rows<S, Params, AT_ONCE>(fp8, shared, cta, request, warp * WARP_QUERIES + first);
  }
  if (thread_index() % WARPGROUP == 0) shared.inverse[consumer] = make_float4(0.f, 0.f, 0.f, 0.f);
  // wgmma reads through the async proxy what was stored here.
  fence_proxy_async();
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
}

// --- consumers: a unit ----------------------------------------------------------------------------------------------

// One over a power of two.
__device__ __forceinline__ float inverse_of(float power) { return __int_as_float(0x7F000000 - __float_as_int(power)); }

// What O counts in, in a group of which `inverse` is noted; 0 as long as no unit has had a visible token.
__device__ __forceinline__ float unit_of(float inverse) { return inverse == 0.f ? 0.f : inverse_of(inverse); }

// P_UNITS over a power of two above `scale`.
__device__ __forceinline__ float inverse_unit(float scale) {
  const int exponent = min(max(__float_as_int(scale) >> 23 & 255, 20), 240);
  return __int_as_float((254 - exponent + 3) << 23);
}

// The same of the largest scales of a unit's tokens, by group; in all threads of the warpgroup, which meet.
template <class S>
__device__ __forceinline__ void scale_units(typename S::Memory& shared, int consumer, const float (&scales)[2][GROUPS],
                                            float (&inverse)[GROUPS]) {
  const int thread = thread_index() % WARPGROUP;
  float top[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    top[group] = fmaxf(fabsf(scales[0][group]), fabsf(scales[1][group]));
    top[group] = fmaxf(top[group], __shfl_xor_sync(0xFFFFFFFF, top[group], 4));
    top[group] = fmaxf(top[group], __shfl_xor_sync(0xFFFFFFFF, top[group], 8));
    top[group] = fmaxf(top[group], __shfl_xor_sync(0xFFFFFFFF, top[group], 16));
  }
  if (thread % 32 == 0) shared.top_scale[consumer][thread / 32] = make_float4(top[0], top[1], top[2], top[3]);
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float all = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPGROUP / 32; ++warp) {
      all = fmaxf(all, reinterpret_cast<const float*>(&shared.top_scale[consumer][warp])[group]);
    }
    inverse[group] = inverse_unit(all);
  }
}

// Adds products of codes and queries, times their group's scales, to the scores. (Tokens that there are not may have
// any scale: their scores are dropped.)
template <class S>
__device__ __forceinline__ void fold(const Unit& unit, const float (&part)[S::ROWS], int group,
                                     float (&s)[S::ROWS / 2]) {
  const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
  const float* first = reinterpret_cast<const float*>(&unit.scales[token]) + group;
  const float scales[2] = {first[0], first[8 * GROUPS]};
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    s[i] = __fmaf_rn(__fmaf_rn(part[S::ROWS / 2 + i], LOW_UNIT, part[i]), scales[i >> 1 & 1], s[i]);
  }
}

// Scores of a unit, times what rows of Q were divided by.
template <class S>
__device__ __forceinline__ void score(typename S::Memory& shared, int slot, int consumer, float (&s)[S::ROWS / 2]) {
  const uint64_t q = matrix_descriptor(shared_address(S::q(shared, consumer)), 0, 1024, Swizzle::B128);
  const uint64_t q_rope = matrix_descriptor(shared_address(S::q_rope(shared, consumer)), 0, 1024, Swizzle::B128);
  const uint64_t keys = matrix_descriptor(unit_address(slot), 0, 1024, Swizzle::B128);
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) s[i] = 0.f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < TILE_COLUMNS / 16; ++step) {
    wgmma_m64k16_narrow<true, false>(s, advance(keys, GROUPS * TILE_BYTES + step * 32), advance(q_rope, step * 32));
  }
  wgmma_commit_group();
  float part[S::S_PARTS][S::ROWS];
#pragma unroll
  for (int group = 0; group < GROUPS + S::S_PARTS - 1; ++group) {
    if (group < GROUPS) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < GROUP_COLUMNS / 32; ++step) {
        wgmma_m64k32_e4m3(part[group % S::S_PARTS], advance(keys, group * TILE_BYTES + step * 32),
                          advance(q, group * S::Q_TILE_BYTES + step * 32), step > 0);
      }
      wgmma_commit_group();
    }
    const int done = group - (S::S_PARTS - 1);  // the last group that is waited for; those behind it are under way
    if (done < 0) continue;
    if (group < GROUPS) {
      wgmma_wait_group<S::S_PARTS - 1>();
    } else if (S::S_PARTS > 2 && GROUPS - 1 - done == 2) {
      wgmma_wait_group<2>();
    } else if (S::S_PARTS > 1 && GROUPS - 1 - done == 1) {
      wgmma_wait_group<1>();
    } else {
      wgmma_wait_group<0>();
    }
    fold<S>(shared.ring[slot], part[done % S::S_PARTS], done, s);
  }
}

// P of the scores, which count from the references: times each group's scales to shared memory, in two parts; and added
// to the sums over the thread's tokens.
template <class S>
__device__ __forceinline__ void store_p(typename S::Memory& shared, int consumer, const float (&s)[S::ROWS / 2],
                                        const float (&scales)[2][GROUPS], const float (&inverse)[GROUPS],
                                        float (&sum)[S::COLUMNS]) {
  uint32_t p[S::COLUMNS];  // of the thread's two tokens
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    const float first = ex2(s[i / 2 * 4 + i % 2]), second = ex2(s[i / 2 * 4 + i % 2 + 2]);
    sum[i] += first + second;
    p[i] = pack<false>(first, second);
  }
  // Matrix m of a stmatrix is query rows 8 m.. and all of the warp's 16 tokens: an element is two of them, 8 apart.
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const uint32_t both = pack<false>(scales[0][group] * inverse[group], scales[1][group] * inverse[group]);
    uint32_t high[S::ROWS / 8], low[S::ROWS / 8];
#pragma unroll
    for (int i = 0; i < S::ROWS / 8; ++i) {
      split_e4m3(mul_f16x2(p[2 * i], both), mul_f16x2(p[2 * i + 1], both), high[i], low[i]);
    }
    const uint32_t at =
        shared_address(S::p(shared, consumer, group)) + lane * BLOCK_N + ((warp ^ (lane >> 1 & 3)) << 4);
    if constexpr (S::ROWS == 16) {
      stmatrix_x4_trans(at, high[0], high[1], low[0], low[1]);
    } else {
      stmatrix_x4_trans(at, high[0], high[1], high[2], high[3]);
      stmatrix_x4_trans(at + S::P_TILE_BYTES / 2, low[0], low[1], low[2], low[3]);
    }
  }
}

// Whether a score or a scale is further above what P and O count in than e4m3 reaches.
template <class S>
__device__ __forceinline__ bool exceeds(const float (&s)[S::ROWS / 2], const float (&scales)[2][GROUPS],
                                        const float (&inverse)[GROUPS]) {
  bool is_above = false;
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) is_above |= s[i] > FP8_RESCALE_ABOVE;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    is_above |= fmaxf(fabsf(scales[0][group]), fabsf(scales[1][group])) * inverse[group] > SCALE_ABOVE;
  }
  return is_above;
}

// The larger score of the thread's two tokens, of each of its columns.
template <class S>
__device__ __forceinline__ void tops(const float (&s)[S::ROWS / 2], float (&top)[S::COLUMNS]) {
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) top[i] = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + i % 2 + 2]);
}

// Codes of a unit's tokens, of the warp's 16 of 64 columns, tile `tile` from `unit` on: two k-steps. Transposed by
// ldmatrix a lane has two adjacent columns of two adjacent tokens, of each of four times 8 tokens: row r of a fragment
// is column 2 r, row r + 8 column 2 r + 1, and tokens t and t + 8 stand side by side.
__device__ __forceinline__ void load_values(uint32_t unit, int tile, uint32_t (&a)[2][4]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const uint32_t at =
      unit + tile / GROUP_TILES * TILE_BYTES + lane * 128 + (((tile % GROUP_TILES * 4 + warp) ^ (lane & 7)) << 4);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t codes[4];
    ldmatrix_x4_trans(codes, at + step * 32 * 128);
    a[step][0] = byte_perm(codes[0], codes[1], 0x6240);
    a[step][1] = byte_perm(codes[0], codes[1], 0x7351);
    a[step][2] = byte_perm(codes[2], codes[3], 0x6240);
    a[step][3] = byte_perm(codes[2], codes[3], 0x7351);
  }
}

// Begins to multiply a tile's codes by the high or the low parts of P of a consumer's rows.
template <int REGISTERS>
__device__ __forceinline__ void begin_part(float (&part)[REGISTERS], const uint32_t (&codes)[2][4], uint64_t p) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    wgmma_m64k32_e4m3_registers(part, codes[step], advance(p, step * 32), step > 0);
  }
  wgmma_commit_group();
}

// Codes past the length are multiplied by P = 0, but they may be NaN: overwrites those of NUM_GROUPS groups by zeros.
template <int NUM_GROUPS>
__device__ __forceinline__ void clear_rows(Unit& unit, int first_group, int first_row) {
  const int chunks = (BLOCK_N - first_row) * 8;  // of 16 bytes, per group; swizzling stays within a row
#pragma unroll 1
  for (int group = 0; group < NUM_GROUPS; ++group) {
    uint8_t* rows = unit.latent[first_group + group] + first_row * 128;
    for (int chunk = thread_index() % WARPGROUP; chunk < chunks; chunk += WARPGROUP) {
      reinterpret_cast<uint4*>(rows)[chunk] = make_uint4(0, 0, 0, 0);
    }
  }
}

// What a thread of a consumer knows of a unit before it is scored: which of its two tokens there are.
template <class S>
struct Tokens {
  bool are_seen[2];
  bool is_nothing = false;  // no token of the unit

  // `stored` tokens of the request from the unit's first one on.
  __device__ __forceinline__ Tokens(typename S::Memory& shared, int slot, int stored) {
    const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
    are_seen[0] = token < stored;
    are_seen[1] = token + 8 < stored;
    if constexpr (S::IS_SPARSE) {
      fence_proxy_async();  // rows were copied through the generic proxy
      const uint2 all = *reinterpret_cast<const uint2*>(shared.named[slot]);
      is_nothing = (all.x | all.y) == 0;
      const uint32_t names = shared.named[slot][token / 16];
      are_seen[0] = names >> token % 16 & 1;
      are_seen[1] = names >> (token + 8) % 16 & 1;
    }
  }

  __device__ __forceinline__ void load_scales(const Unit& unit, float (&scales)[2][GROUPS]) const {
    const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // What lies past the length may be anything, and 0 * NaN is NaN.
      float4 all = unit.scales[token + 8 * i];
      if (!are_seen[i]) all = make_float4(0.f, 0.f, 0.f, 0.f);
      scales[i][0] = all.x;
      scales[i][1] = all.y;
      scales[i][2] = all.z;
      scales[i][3] = all.w;
    }
  }
};

// Scores, which count from the references; of tokens that a row does not see, none.
template <class S>
__device__ __forceinline__ void count_scores(typename S::Memory& shared, int consumer, int stored,
                                             const Tokens<S>& tokens, float (&s)[S::ROWS / 2]) {
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    const float2 from = shared.from[consumer][column_row(i)];
    const int at = i / 2 * 4 + i % 2;  // and, 8 tokens further on, at + 2
    s[at] = __fmaf_rn(s[at], from.x, -from.y);
    s[at + 2] = __fmaf_rn(s[at + 2], from.x, -from.y);
  }
  if constexpr (S::IS_SPARSE) {
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) s[i] = tokens.are_seen[i >> 1 & 1] ? s[i] : -infinity();
  } else {
    hide<S>(shared, S::TURNS ? 0 : consumer * S::ROWS, stored, s);
  }
}

// Read anew: registers are short.
template <class Memory>
__device__ __forceinline__ Cta now(const Memory& shared) {
  const volatile Cta& cta = shared.cta;
  return {cta.plan_slot, cta.kv_head, cta.first_row};
}

// A CTA of a kernel: what CONSUMER_ROLE does for both consumers.
template <class S, class Params, class Role>
__device__ __forceinline__ void decode_tile(const Params& fp8, const Role& consumer_role) {
  static_assert(sizeof(typename S::Memory) <= SHARED_LIMIT);
  const DecodeParams& params = fp8.decode;
  typename S::Memory& shared = *reinterpret_cast<typename S::Memory*>(dynamic_shared);
  const int tile = blockIdx.x % params.tiles;
  const Cta cta = {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * S::TILE_ROWS};
  if (threadIdx.x == 0) shared.cta = cta;
  begin_cta<S>(params, shared, cta);

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == CONSUMERS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    load_units<S>(fp8, shared, cta, __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consumer_role(shared, warpgroup);
  }
}
