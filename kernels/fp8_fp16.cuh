// FP8 rows as fp16, for tiles of 64 query rows, for which products take longer than loads: codes are converted on their
// way into shared memory, and wgmma does the rest as in dense_decode.cu.
//
// A token's codes come times its scales over `ref`, a power of two of its own, and are rounded once more to fp16's 11
// bits; `ref` is 1/64 to 1/32 of the largest scale, so that the largest latent is below 2^15 and bits go down to 2^-24:
// columns whose scale is below 2^-19 of the token's largest lose one bit of 11 by each further power of two. Rotated
// keys are divided by `ref` too, in bf16, and a row of Q by a power of two that brings its largest magnitude to 2^14
// and more. All is put back in fp32:
//   S = (Q K^T) * ref * (what the row of Q was divided by)
//   P = 2^(S * softmax_scale_log2 + log2(ref) - m)            that is, times ref: what V was divided by
//   sum = P / ref, O = P V
#pragma once

#include "fp8_row.cuh"
#include "wide_rows.cuh"

constexpr int CODE_TILES = ROW_CODES / TILE_COLUMNS;  // of a row as fp16; its rotated keys are one more
constexpr int SET_ROWS = 8;                           // that a warp converts at once
static_assert(ROW_BYTES <= SET_ROWS * 128);

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
    stores.v4(tiles + CODE_TILES * TILE_BYTES + chunk_offset(first + row, lane % 8),
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
      stores.v4(
          target + half * (CODE_TILES / 2 * TILE_BYTES),
          make_uint4(mul_f16x2(value.x, by), mul_f16x2(value.y, by), mul_f16x2(value.z, by), mul_f16x2(value.w, by)));
    }
  }
}

// --- Q --------------------------------------------------------------------------------------------------------------

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
      if (lane < 8) query[i][2] = ld_shared_v4(at[i] + CODE_TILES * TILE_BYTES);
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
      if (lane < 8) st_shared_v4(at[i] + CODE_TILES * TILE_BYTES, times<true>(query[i][2], by));
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
