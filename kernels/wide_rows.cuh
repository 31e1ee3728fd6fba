// What kernels share that stand query rows on wgmma's 64-row side: 64 of them per CTA, S and P computed by one
// warpgroup, half of O's columns added up by each of two others.
//
// A shape S says how many columns there are (KV_LORA_RANK, HALF_COLUMNS = half of it), how results are rounded
// (IS_BF16), and how many ring slots there are (STAGES).
#pragma once

#include "item.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 64;  // query rows

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int { BARRIER_SCORE = 1, BARRIER_VALUE = 2 };  // and BARRIER_VALUE + 1

// Tile row `row`, 16-byte chunk `chunk` of its 128 bytes, 128-byte swizzle.
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Position in the ring and the parity of the barriers' phase that belongs to the entry, in one register.
template <class S>
struct Position {
  int packed = 0;  // 2 * slot + parity
  __device__ __forceinline__ int slot() const { return packed >> 1; }
  __device__ __forceinline__ uint32_t phase() const { return packed & 1; }
  __device__ __forceinline__ void advance() {
    packed += 2;
    if (packed >= 2 * S::STAGES) packed = (packed & 1) ^ 1;
  }
};

// Row of the tile of a thread's first accumulators; its others are 8 further down.
__device__ __forceinline__ int accumulator_row() {
  const int thread = thread_index() % WARPGROUP;
  return thread / 32 * 16 + thread % 32 / 4;
}

// Raises the references of a thread's two rows to a unit's scores `s`, which count from them: at first to 2^-HEADROOM
// of the maximum, later where P would come above 2^(RESCALE_ABOVE + HEADROOM), by whole numbers. Returns by how much, a
// byte each, for O to be multiplied by 2^-rise; 0 at first, when there is nothing to multiply.
template <int HEADROOM>
__device__ __forceinline__ uint32_t raise(float (&s)[32], bool is_first, float (&reference)[2], float (&sum)[2]) {
  // Row of s[i] is i >> 1 & 1; two maxima and two sums per row keep the chains short.
  float top[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
  for (int i = 4; i < 32; ++i) top[i >> 1 & 1][i & 1] = fmaxf(top[i >> 1 & 1][i & 1], s[i]);
  top[0][0] = fmaxf(top[0][0], top[0][1]);
  top[1][0] = fmaxf(top[1][0], top[1][1]);
  uint32_t rises = 0;  // of the two rows, a byte each
  if (is_first || __any_sync(0xFFFFFFFF, fmaxf(top[0][0], top[1][0]) > RESCALE_ABOVE + HEADROOM)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float rise = top[half][0];
      rise = fmaxf(rise, __shfl_xor_sync(0xFFFFFFFF, rise, 1));
      rise = fmaxf(rise, __shfl_xor_sync(0xFFFFFFFF, rise, 2));
      if constexpr (HEADROOM > 0) rise -= HEADROOM;
      // P is at first 2^HEADROOM where it is largest, exactly. Later the reference rises by whole numbers.
      if (!is_first) rise = fmaxf(ceilf(rise), 0.f);
      if (rise == -infinity()) rise = 0.f;  // sees nothing here, and so nothing later
      reference[half] += rise;
#pragma unroll
      for (int i = 0; i < 16; ++i) s[(i >> 1) * 4 + half * 2 + (i & 1)] -= rise;
      if (!is_first) {  // else there is nothing to rescale
        sum[half] *= ex2(-rise);
        rises |= (uint32_t)fminf(rise, 255.f) << 8 * half;  // 2^-255 is zero in fp32
      }
    }
  }
  return rises;
}

// P of a unit to a tile of 64 tokens, 128-byte swizzle.
template <bool IS_BF16>
__device__ __forceinline__ void store_p(const uint8_t* tile, const float (&p)[32]) {
  // Matrix m of a stmatrix is rows (m & 1) * 8.. of the warp's 16 and 16-byte chunk 2 * step + (m >> 1).
  const int thread = thread_index(), lane = thread % 32;
  const int row = thread / 32 * 16 + (lane / 8 & 1) * 8 + lane % 8;
  const uint32_t p_row = shared_address(tile) + row * 128;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    stmatrix_x4(p_row + (((2 * step + lane / 16) ^ (row & 7)) << 4), pack<IS_BF16>(p[8 * step + 0], p[8 * step + 1]),
                pack<IS_BF16>(p[8 * step + 2], p[8 * step + 3]), pack<IS_BF16>(p[8 * step + 4], p[8 * step + 5]),
                pack<IS_BF16>(p[8 * step + 6], p[8 * step + 7]));
  }
}

// Multiplies O by 2^-rise of its rows.
template <class S>
__device__ __forceinline__ void lower(const uint8_t (&rise)[BLOCK_M], float (&o)[S::HALF_COLUMNS / 2]) {
  const int row = accumulator_row();
  const int rise0 = rise[row], rise1 = rise[row + 8];
  if (__any_sync(0xFFFFFFFF, (rise0 | rise1) != 0)) {
    const float alpha0 = ex2((float)-rise0), alpha1 = ex2((float)-rise1);
#pragma unroll
    for (int i = 0; i < S::HALF_COLUMNS / 2; ++i) o[i] *= (i >> 1 & 1) ? alpha1 : alpha0;
  }
}

// Writes the log-sums of an item's rows; `sum` is complete in every lane of a row's four.
__device__ __forceinline__ void store_log_sums(const DecodeParams& params, const Item& item, const Cta& tile,
                                               const float (&reference)[2], const float (&sum)[2]) {
  const int thread = thread_index() % WARPGROUP;
  if (thread % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    if (row >= params.seqlen_q * params.group) return;
    const float log_sum = reference[half] + lg2(sum[half]);
    if (item.is_whole) {
      const int query = row / params.group;
      const int head = tile.kv_head * params.group + row % params.group;
      const int64_t index = ((int64_t)item.request * params.num_heads + head) * params.seqlen_q + query;
      params.lse[index] = sum[half] == 0.f ? infinity() : log_sum * LN_2;
    } else {
      const int64_t index = sum_index(params, 0, item.partial(params, tile), row_index(params, tile, row));
      params.partial_sums[index] = sum[half] == 0.f ? -infinity() : log_sum;
    }
  }
}

// Row `lane / 4 + 8 * UPPER` of each warp's 16, times `scale`: to `out`, or to the partial results.
template <class S, int UPPER>
__device__ __forceinline__ void store_row(const DecodeParams& params, const Cta& cta, const Item& item, int half,
                                          const float (&o)[S::HALF_COLUMNS / 2], float scale) {
  // Read again for each row: registers are short here.
  const volatile Cta& now = cta;
  const Cta tile = {now.plan_slot, now.kv_head, now.first_row};
  const int thread = thread_index() % WARPGROUP;
  const int lane = thread % 32;
  const int tile_row = tile.first_row + thread / 32 * 16 + lane / 4 + 8 * UPPER;
  const bool is_row = tile_row < params.seqlen_q * params.group;
  const int row = row_index(params, tile, tile_row);
  const int rows = params.seqlen_q * params.num_heads;
  if (!item.is_whole) {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < S::HALF_COLUMNS / 2; ++i) {
      if ((i >> 1 & 1) == UPPER) top = fmaxf(top, fabsf(o[i]));
    }
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
    const PartialScale unit = partial_scale(top * scale);
    scale *= unit.inverse;
    const int partial = item.partial(params, tile);
    if (!is_row) return;
    if (lane % 4 == 0) params.partial_sums[sum_index(params, 1 + half, partial, row)] = unit.unit;
    uint16_t* target =
        params.o_partial + ((int64_t)partial * rows + row) * S::KV_LORA_RANK + half * S::HALF_COLUMNS + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < S::HALF_COLUMNS / 16; ++i) {  // TileLayout
      const uint32_t first = pack<false>(o[8 * i + 2 * UPPER] * scale, o[8 * i + 2 * UPPER + 1] * scale);
      const uint32_t second = pack<false>(o[8 * i + 2 * UPPER + 4] * scale, o[8 * i + 2 * UPPER + 5] * scale);
      *reinterpret_cast<uint2*>(target + 16 * i) = make_uint2(first, second);
    }
    return;
  }
  // Neighbours exchange, so that each stores 8 bytes and four lanes fill a sector of 32.
  const int odd = lane & 1;
  uint16_t* target = static_cast<uint16_t*>(params.out) + ((int64_t)item.request * rows + row) * S::KV_LORA_RANK +
                     half * S::HALF_COLUMNS + odd * 8 + (lane & 2) * 2;
#pragma unroll
  for (int i = 0; i < S::HALF_COLUMNS / 16; ++i) {
    const uint32_t first = pack<S::IS_BF16>(o[8 * i + 2 * UPPER] * scale, o[8 * i + 2 * UPPER + 1] * scale);
    const uint32_t second = pack<S::IS_BF16>(o[8 * i + 2 * UPPER + 4] * scale, o[8 * i + 2 * UPPER + 5] * scale);
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, odd ? first : second, 1);
    const uint2 value = odd ? make_uint2(other, second) : make_uint2(first, other);
    if (is_row) *reinterpret_cast<uint2*>(target + 16 * i) = value;
  }
}
