// Arithmetic of decode over FP8 rows in tiles of 64 query rows, for which products take longer than loads: codes become
// fp16 on their way into shared memory, and wgmma does the rest as in dense_decode.cu.
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
// Three roles are here, for a kernel that has the fourth, of who brings rows (convert):
//   score    makes fp16 of Q, computes S and P; P(j) overwrites the rotated keys of unit j
//   value    two of them: half of O's columns each
// Barriers, one phase per unit, or per item for Q:
//   full[slot]    convert -> score     the unit is fp16
//   p_full[slot]  score -> value       P is stored
//   q_full        score -> score       Q has arrived as it is
//
// A shape S is a WideShape and says whether another CTA stores here too (IS_PAIR), what registers the roles have
// (SCORE_REGISTERS, VALUE_REGISTERS, CONVERT_REGISTERS), and what is in shared memory: Memory begins with the ring, `q`
// behind it, and has `tokens`, `inverse_sum`, `rise`, `cta` and the barriers above.
#pragma once

#include "fp8_lookup.cuh"
#include "wide_rows.cuh"

constexpr int NUM_THREADS = 4 * WARPGROUP;
// 65,536 registers / 512 threads = 128 at launch: 512 per lane over the four warpgroups.
constexpr int REGISTERS = 512;

struct WideShape {
  static constexpr int KV_LORA_RANK = ROW_CODES;
  static constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;  // of O, per value warpgroup
  static constexpr int STAGES = 2;
  static constexpr int TILE_ROWS = BLOCK_M;
  static constexpr bool IS_BF16 = true;  // of queries and results
};

constexpr int V_TILES = ROW_CODES / TILE_COLUMNS;
constexpr int TILES = V_TILES + 1;  // the last holds the rotated columns
constexpr int SET_ROWS = 8;         // that a warp converts at once
static_assert(SET_ROWS == V_TILES && ROW_BYTES <= SET_ROWS * 128);

// P times ref is at first 2^6 where it is largest, and stays below 2^14: fp16 has 11 bits down to 2^-14, which is 2^-20
// of that, and ends at 2^-24.
constexpr int P_HEADROOM = 6;
constexpr int REF_HEADROOM = 6;  // of a token's largest scale over its ref, log2
// `ref` is 2^-70 at the least: what rotated keys over it come to stays far from the end of fp32.
constexpr int LEAST_REF = 127 - 70;

// Of two tokens side by side.
struct TokenPair {
  float ref[2];
  float log_ref[2];  // log2; NaN where a scale is not finite: so is every score then
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

// A set of rows as they are in the pool, over a warp's lanes; zeros, but for the scale, where none is named.
struct Raw {
  float scale;               // of row lane / 4, for columns 128 * (lane % 4) on
  uint4 k_rope[2];           // 8 columns of rows lane / 8 and 4 + lane / 8
  uint2 codes[SET_ROWS][2];  // a lane's 8 of each half of a row
};

// To fp16, in rows `first` on of a slot's tiles, by a warp.
template <class S, class Stores>
__device__ __forceinline__ void convert_set(typename S::Memory& shared, int slot, uint32_t first, const Raw& raw,
                                            const Stores& stores) {
  const uint32_t lane = thread_index() & 31, tiles = shared_address(shared.ring[slot]);
  float top = fmaxf(fabsf(raw.scale), __shfl_xor_sync(0xFFFFFFFF, fabsf(raw.scale), 1));
  top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
  const uint32_t finite = __ballot_sync(0xFFFFFFFF, fabsf(raw.scale) < infinity());
  const int ref = max((__float_as_int(top) >> 23) + 1 - REF_HEADROOM, LEAST_REF);  // its exponent, as fp32 has it
  const float inverse = __int_as_float((254 - ref) << 23);
  const uint32_t ratios = pack<false>(raw.scale * inverse, raw.scale * inverse),
                 inverses = pack<true>(inverse, inverse);
  const float log_ref = (finite >> lane & 0xF) == 0xF ? ref - 127.f : infinity() * 0.f;
  stores.token(shared.tokens[slot], first + lane / 4, __int_as_float(ref << 23), log_ref);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t row = 4 * i + lane / 8, by = __shfl_sync(0xFFFFFFFF, inverses, row * 4);
    stores.v4(tiles + V_TILES * TILE_BYTES + chunk_offset(first + row, lane % 8),
              make_uint4(mul_bf16x2(raw.k_rope[i].x, by), mul_bf16x2(raw.k_rope[i].y, by),
                         mul_bf16x2(raw.k_rope[i].z, by), mul_bf16x2(raw.k_rope[i].w, by)));
  }
#pragma unroll
  for (int i = 0; i < SET_ROWS; ++i) {
    const uint32_t target = tiles + lane / 8 * TILE_BYTES + first * 128 + i * 128 + ((lane % 8 ^ i) << 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t by = __shfl_sync(0xFFFFFFFF, ratios, i * 4 + half * 2 + lane / 16);
      uint4 value;
      fp16_of(raw.codes[i][half].x, value.x, value.y);
      fp16_of(raw.codes[i][half].y, value.z, value.w);
      stores.v4(target + half * (V_TILES / 2 * TILE_BYTES), make_uint4(mul_f16x2(value.x, by), mul_f16x2(value.y, by),
                                                                       mul_f16x2(value.z, by), mul_f16x2(value.w, by)));
    }
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
template <class Memory>
__device__ __forceinline__ void load_queries(const DecodeParams& params, Memory& shared, int request) {
  const Cta cta = shared.cta;
  mbarrier_arrive_expect_tx(shared.q_full, TILES * TILE_BYTES);
  tma_load_5d(shared.q, params.q_map, shared.q_full, 0, cta.first_row, 0, cta.kv_head, request);
}

// Makes fp16 of Q's latent columns where they lie, a warp of its own 16 rows; `factor` of the thread's two rows, for
// their scores: what they were divided by, NaN where they are not finite.
template <class Memory>
__device__ __forceinline__ void take_queries(float softmax_scale_log2, Memory& shared, float (&factor)[2]) {
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
template <class S>
__device__ __forceinline__ void score_unit(int slot, float (&s)[32]) {
  const uint64_t keys = matrix_descriptor(slot_address(slot), 0, 1024, Swizzle::B128);
  const uint64_t queries = matrix_descriptor(slot_address(S::STAGES), 0, 1024, Swizzle::B128);
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

// `named_of`: which tokens of the unit in a slot, of this number among all of the CTA, are named, a bit each.
template <class S, class NamedOf>
__device__ __forceinline__ void score_role(const DecodeParams& params, typename S::Memory& shared,
                                           const NamedOf& named_of) {
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
      if constexpr (S::IS_PAIR) fence_proxy_async();  // between the other CTA's stores and wgmma
      score_unit<S>(slot, s);
      // What the scores will be put together with comes while they are multiplied.
      TokenPair pairs[BLOCK_N / 8];
#pragma unroll
      for (int n8 = 0; n8 < BLOCK_N / 8; ++n8) pairs[n8] = shared.tokens[slot][4 * n8 + thread_index() % 4];
      const uint64_t named = named_of(slot, number);
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

// `leave`: what a warp does when it has read its half of the columns of a slot's unit, the `number`th of the CTA.
template <class S, int HALF, class Leave>
__device__ __forceinline__ void value_role(const DecodeParams& params, typename S::Memory& shared, const Leave& leave) {
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
    float o[S::HALF_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < S::HALF_COLUMNS / 2; ++i) o[i] = 0.f;
    float scale[2] = {0.f, 0.f};
    for (; units_left > 0; --units_left) {
      const int slot = position.slot();
      // What another CTA stored wgmma may read as well: score's fences stand between that and this barrier.
      mbarrier_wait(shared.p_full[slot], position.phase());
      lower<S>(shared.rise[slot], o);
      const uint32_t tiles = slot_address(slot);
      const uint64_t p = matrix_descriptor(tiles + V_TILES * TILE_BYTES, 0, 1024, Swizzle::B128);
      const uint64_t v = matrix_descriptor(tiles + HALF * V_TILES / 2 * TILE_BYTES, TILE_BYTES, 1024, Swizzle::B128);
      float (&left)[S::HALF_COLUMNS / 4] = reinterpret_cast<float (&)[S::HALF_COLUMNS / 4]>(o[0]);
      float (&right)[S::HALF_COLUMNS / 4] = reinterpret_cast<float (&)[S::HALF_COLUMNS / 4]>(o[S::HALF_COLUMNS / 4]);
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
      leave(slot, number, warp, HALF);
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

__device__ __forceinline__ Cta this_cta(const DecodeParams& params) {
  const int tile = blockIdx.x % params.tiles;
  return {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * BLOCK_M};
}

// The role of each warpgroup; the last one's is `convert`, and for the others see score_role and value_role.
template <class S, class NamedOf, class Leave, class Convert>
__device__ __forceinline__ void run_roles(const DecodeParams& params, typename S::Memory& shared,
                                          const NamedOf& named_of, const Leave& leave, const Convert& convert) {
  static_assert(sizeof(typename S::Memory) <= SHARED_LIMIT);
  static_assert(S::SCORE_REGISTERS + 2 * S::VALUE_REGISTERS + S::CONVERT_REGISTERS <= REGISTERS);
  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<S::SCORE_REGISTERS>();
    score_role<S>(params, shared, named_of);
  } else if (warpgroup == 1) {
    setmaxnreg_inc<S::VALUE_REGISTERS>();
    value_role<S, 0>(params, shared, leave);
  } else if (warpgroup == 2) {
    setmaxnreg_inc<S::VALUE_REGISTERS>();
    value_role<S, 1>(params, shared, leave);
  } else {
    setmaxnreg_dec<S::CONVERT_REGISTERS>();
    convert();
  }
}
