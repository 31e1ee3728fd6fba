// What the kernels over FP8 rows for up to 32 query rows share besides their loads: how e4m3 stands on both sides of
// wgmma. Latents are never converted: their codes go to the tensor cores as they lie. Queries are bf16; 512 + 64
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
// A shape S has, besides what few_rows.cuh and fp8_units.cuh want: where a consumer's Q (q, q_rope) and P (p) are; how
// many products are under way at once (S_PARTS, V_PARTS); and the registers of a consumer's thread
// (CONSUMER_REGISTERS). ROWS are those that a consumer scores. (Over 400 lines: what the codes' order means to queries,
// scores and values is said in one place.)
#pragma once

#include "fp8_units.cuh"

constexpr float P_UNITS = 16.f;       // of 1, in what is split
constexpr float LOW_UNIT = 1.f / 16;  // of the low parts, in units of the high ones
// P may be 2^4 and a scale 1.75 of its unit before they are counted anew: 16 * 16 * 1.75 = 448, the end of e4m3.
constexpr float FP8_RESCALE_ABOVE = 4.f;
constexpr float SCALE_ABOVE = 1.75f * P_UNITS;

// --- consumers: queries ---------------------------------------------------------------------------------------------

// Four bf16 of two registers times `factor`, as their high and their low parts.
__device__ __forceinline__ void split_four(uint32_t a, uint32_t b, float factor, uint32_t& high, uint32_t& low) {
  split_e4m3(pack<false>(__int_as_float(a << 16) * factor, __int_as_float(a & 0xFFFF0000) * factor),
             pack<false>(__int_as_float(b << 16) * factor, __int_as_float(b & 0xFFFF0000) * factor), high, low);
}

__device__ __forceinline__ uint32_t times(uint32_t both, float factor) {
  return pack<true>(__int_as_float(both << 16) * factor, __int_as_float(both & 0xFFFF0000) * factor);
}

// What a lane has of a row of Q.
struct Query {
  uint4 columns[2];
  uint4 rotated;  // in the first eight lanes

  template <class Params>
  __device__ __forceinline__ void load(const Params& fp8, const Cta& cta, int request, int row) {
    const int lane = thread_index() % 32;
    const uint4* from = query_row(fp8, cta, request, row);
    columns[0] = columns[1] = rotated = make_uint4(0, 0, 0, 0);
    if (from == nullptr) return;
    columns[0] = from[2 * lane];
    columns[1] = from[2 * lane + 1];
    if (lane < 8) rotated = from[KV_LORA_RANK / 8 + lane];
  }
};

// Row `number` of the tile to shared memory, by a warp.
template <class S>
__device__ __forceinline__ void store_query(const DecodeParams& params, typename S::Memory& shared, int number,
                                            const Query& query) {
  const int lane = thread_index() % 32, consumer = number / S::ROWS, row = number % S::ROWS;
  int top = magnitude(max_abs_bf16x2(magnitudes(query.columns[0]), magnitudes(query.columns[1])));
  // Rotated columns only count where they are 2^40 times the others: they are to stay below the end of bf16.
  top = reduce_max(max(max(top, magnitude(magnitudes(query.rotated)) - (40 << 7)), 0));
  const int exponent = min(max(top >> 7, 20), 254);
  const float factor = __int_as_float((261 - exponent) << 23);  // 2^(7 - (exponent - 127)): to 128 and more
  uint4 high, low;
  split_four(query.columns[0].x, query.columns[0].y, factor, high.x, low.x);
  split_four(query.columns[0].z, query.columns[0].w, factor, high.y, low.y);
  split_four(query.columns[1].x, query.columns[1].y, factor, high.z, low.z);
  split_four(query.columns[1].z, query.columns[1].w, factor, high.w, low.w);
  const int chunk = (lane % 8 ^ (row & 7)) << 4;
  uint8_t* target = S::q(shared, consumer) + lane / 8 * S::Q_TILE_BYTES + row * 128 + chunk;
  *reinterpret_cast<uint4*>(target) = high;
  *reinterpret_cast<uint4*>(target + S::ROWS * 128) = low;
  // By turns both consumers score all rows.
  if (lane < CONSUMERS) {
    shared.from[lane][row] = {params.softmax_scale_log2 * __int_as_float((exponent - 7) << 23), 0.f};
  }
  if (lane < 8) {
    // What is not finite must not end at 448: a rotated column carries it into every score.
    const float own_factor = top >= 0x7F80 ? infinity() * 0.f : factor;
    *reinterpret_cast<uint4*>(S::q_rope(shared, consumer) + row * 128 + chunk) =
        make_uint4(times(query.rotated.x, own_factor), times(query.rotated.y, own_factor),
                   times(query.rotated.z, own_factor), times(query.rotated.w, own_factor));
  }
}

// An item's Q, by all warps of both consumers, which meet before and behind it. A loop, because it is shorter:
// unrolled, calls take as long.
template <class S, class Params>
__device__ __forceinline__ void take_queries(const Params& fp8, typename S::Memory& shared, const Cta& cta, int request,
                                             int consumer) {
  constexpr int WARP_QUERIES = S::TILE_ROWS / CONSUMER_WARPS;
  const int warp = consumer * (WARPGROUP / 32) + thread_index() % WARPGROUP / 32, first = warp * WARP_QUERIES;
  prefetch_queries<S, CONSUMER_WARPS>(fp8, cta, request, warp);
  Query next;
  next.load(fp8, cta, request, first);
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);  // both have stored the item before, whose results lay over Q
#pragma unroll 1
  for (int i = 0; i < WARP_QUERIES; ++i) {
    const Query query = next;
    if (i + 1 < WARP_QUERIES) next.load(fp8, cta, request, first + i + 1);
    store_query<S>(fp8.decode, shared, first + i, query);
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
__device__ __forceinline__ void fold(const typename S::Unit& unit, const float (&part)[S::ROWS], int group,
                                     float (&s)[S::ROWS / 2]) {
  const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
  const float scales[2] = {reinterpret_cast<const float*>(&unit.scales_of(token))[group],
                           reinterpret_cast<const float*>(&unit.scales_of(token + 8))[group]};
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    s[i] = __fmaf_rn(__fmaf_rn(part[S::ROWS / 2 + i], LOW_UNIT, part[i]), scales[i >> 1 & 1], s[i]);
  }
}

// Scores of a unit out of pages, times what rows of Q were divided by.
template <class S>
__device__ __forceinline__ void score_tiles(typename S::Memory& shared, int slot, int consumer,
                                            float (&s)[S::ROWS / 2]) {
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

// Four steps of a unit's rows for wgmma's 64-row side, the warp's 16 tokens: 32 bytes from `column` on, and those
// behind.
__device__ __forceinline__ void load_keys(uint32_t unit, int column, uint32_t (&a)[4][4]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const uint32_t at = unit + (warp * 16 + lane % 16) * ROW_BYTES + lane / 16 * 16 + column;
#pragma unroll
  for (int step = 0; step < 4; ++step) ldmatrix_x4(a[step], at + step * 32);
}

// The same of a unit of rows by index, whose pitch no descriptor has: keys come from registers.
template <class S>
__device__ __forceinline__ void score_rows(typename S::Memory& shared, int slot, int consumer,
                                           float (&s)[S::ROWS / 2]) {
  const uint64_t q = matrix_descriptor(shared_address(S::q(shared, consumer)), 0, 1024, Swizzle::B128);
  const uint64_t q_rope = matrix_descriptor(shared_address(S::q_rope(shared, consumer)), 0, 1024, Swizzle::B128);
  const uint32_t unit = unit_address(slot);
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) s[i] = 0.f;
  uint32_t keys[2][4][4];
  float part[S::ROWS];
  load_keys(unit, KV_LORA_RANK + 4 * GROUPS, keys[1]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64k16_narrow_registers(s, keys[1][step], advance(q_rope, step * 32));
  wgmma_commit_group();
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    if (group == 0) load_keys(unit, 0, keys[0]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma_m64k32_e4m3_registers(part, keys[group % 2][step], advance(q, group * S::Q_TILE_BYTES + step * 32),
                                  step > 0);
    }
    wgmma_commit_group();
    if (group + 1 < GROUPS) {
      wgmma_wait_group<1>();  // keys of the group before have been read
      load_keys(unit, (group + 1) * GROUP_COLUMNS, keys[(group + 1) % 2]);
    }
    wgmma_wait_group<0>();
    fold<S>(shared.ring[slot], part, group, s);
  }
}

template <class S>
__device__ __forceinline__ void score(typename S::Memory& shared, int slot, int consumer, float (&s)[S::ROWS / 2]) {
  if constexpr (S::IS_SPARSE) {
    score_rows<S>(shared, slot, consumer, s);
  } else {
    score_tiles<S>(shared, slot, consumer, s);
  }
}

// P of the scores, which count from the references: times each group's scales to shared memory, in two parts; and added
// to the sums over the thread's tokens.
template <class S>
__device__ __forceinline__ void store_p(typename S::Memory& shared, int slot, int consumer,
                                        const float (&s)[S::ROWS / 2], const float (&scales)[2][GROUPS],
                                        const float (&inverse)[GROUPS], float (&sum)[S::COLUMNS]) {
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
        shared_address(S::p(shared, slot, consumer, group)) + lane * BLOCK_N + ((warp ^ (lane >> 1 & 3)) << 4);
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
  // Maxima first: comparisons would wait for each other.
  float top[4], scale[GROUPS];
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = s[i];
#pragma unroll
  for (int i = 4; i < S::ROWS / 2; ++i) top[i % 4] = fmaxf(top[i % 4], s[i]);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    scale[group] = fmaxf(fabsf(scales[0][group]), fabsf(scales[1][group])) * inverse[group];
  }
  return fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])) > FP8_RESCALE_ABOVE ||
         fmaxf(fmaxf(scale[0], scale[1]), fmaxf(scale[2], scale[3])) > SCALE_ABOVE;
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
template <class Unit>
__device__ __forceinline__ void load_values(uint32_t unit, int tile, uint32_t (&a)[2][4]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  int chunk = tile % GROUP_TILES * 4 + warp;                         // of 16 codes
  if constexpr (Unit::PITCH == TILE_COLUMNS * 2) chunk ^= lane & 7;  // swizzled
  const uint32_t at = unit + tile / GROUP_TILES * Unit::GROUP_BYTES + lane * Unit::PITCH + (chunk << 4);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t codes[4];
    ldmatrix_x4_trans(codes, at + step * 32 * Unit::PITCH);
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

// Adds a unit's values times P to tiles of O, those of the codes from `unit` on. Of each tile every ROWS / 2
// accumulators are multiplied by high parts of P, then by low ones, and V_PARTS are under way at once. The P that
// belongs to tiles of group g, counted from the first tile's, lies in that order from `p_of(g)` on.
template <class S, int TILES, int ACCUMULATORS, class PlaceOf>
__device__ __forceinline__ void add_parts(uint32_t unit, const PlaceOf& p_of, float (&o)[TILES][ACCUMULATORS]) {
  constexpr int TILE_PARTS = ACCUMULATORS / (S::ROWS / 2) * 2, PARTS = TILES * TILE_PARTS, UNDER_WAY = S::V_PARTS;
  static_assert(UNDER_WAY == 2 || UNDER_WAY == 3);
  static_assert(UNDER_WAY <= TILE_PARTS + 1);  // or codes would be overwritten while they are read
  float part[UNDER_WAY][S::ROWS / 2];
  uint32_t codes[2][2][4];
  // Only inlined are indices of registers known.
  const auto load = [&](int i) {
    if (i < PARTS && i % TILE_PARTS == 0)
      load_values<typename S::Unit>(unit, i / TILE_PARTS, codes[i / TILE_PARTS % 2]);
  };
  const auto begin = [&](int i) {
    if (i >= PARTS) return;
    const int tile = i / TILE_PARTS;
    begin_part(part[i % UNDER_WAY], codes[tile % 2],
               advance(p_of(tile / GROUP_TILES), i % TILE_PARTS * (S::P_TILE_BYTES / 2)));
  };
#pragma unroll
  for (int i = 0; i < UNDER_WAY; ++i) {
    load(i);
    begin(i);
  }
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int behind = PARTS - 1 - i;  // parts behind this one: of them UNDER_WAY - 1 have begun, or all
    if (behind >= UNDER_WAY - 1) {
      wgmma_wait_group<UNDER_WAY - 1>();
    } else if (UNDER_WAY > 2 && behind == 1) {
      wgmma_wait_group<1>();
    } else {
      wgmma_wait_group<0>();
    }
    load(i + UNDER_WAY);  // what this part read may be overwritten
#pragma unroll
    for (int k = 0; k < S::ROWS / 2; ++k) {
      float& target = o[i / TILE_PARTS][i % TILE_PARTS / 2 * (S::ROWS / 2) + k];
      target = i % 2 == 0 ? target + part[i % UNDER_WAY][k] : __fmaf_rn(part[i % UNDER_WAY][k], LOW_UNIT, target);
    }
    begin(i + UNDER_WAY);
  }
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
      const uint2 all = *reinterpret_cast<const uint2*>(shared.named[slot]);
      is_nothing = (all.x | all.y) == 0;
      const uint32_t names = shared.named[slot][token / 16];
      are_seen[0] = names >> token % 16 & 1;
      are_seen[1] = names >> (token + 8) % 16 & 1;
    }
  }

  __device__ __forceinline__ void load_scales(const typename S::Unit& unit, float (&scales)[2][GROUPS]) const {
    const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // What lies past the length may be anything, and 0 * NaN is NaN.
      float4 all = unit.scales_of(token + 8 * i);
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
    hide<S>(shared, stored, s);
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
    setmaxnreg_dec<REGISTERS - CONSUMERS * S::CONSUMER_REGISTERS>();
    load_units<S>(fp8, shared, cta, __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS);
  } else {
    setmaxnreg_inc<S::CONSUMER_REGISTERS>();
    consumer_role(shared, warpgroup);
  }
}
