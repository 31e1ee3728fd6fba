// Partial results of cut requests, as the decode kernels leave them and the merge finds them.
//
// A row's columns are fp16, in units of a power of two that follows the largest magnitude among the columns that share
// it: 11 bits, three more than bf16 has, in half the memory of fp32. (Where 132 SMs share one request of 128 heads,
// fp32 took 4 us to write and 4 to read.) They lie in the order in which a thread of the writing kernel has them in its
// accumulators, so that it stores 8 or 16 bytes at a time without asking its neighbours.
#pragma once

#include "params.cuh"

constexpr int VECTOR = 8;  // columns that a thread stores or loads at a time: 16 bytes

// Written by dense_decode.cu and the kernels of four_roles.cuh: each half of the columns by a warpgroup, 16 columns by
// four lanes.
struct TileLayout {
  static constexpr int SCALES = 2;  // per row
  // Column of position `position` of a row, of which KV_LORA_RANK / SCALES share a scale.
  template <int KV_LORA_RANK>
  static __device__ __forceinline__ constexpr int column(int position) {
    const int lane = position / 4 % 4, i = position % 4;
    return position / 16 * 16 + i / 2 * 8 + lane * 2 + i % 2;
  }
  // The positions of columns 2 * pair and 2 * pair + 1, counted as positions are, are this one and DISTANCE further on.
  static constexpr int DISTANCE = 1;
  static __device__ __forceinline__ constexpr int pair_position(int pair) { return 2 * pair; }
};

// Written by dense_decode_few.cu: each half of the columns by a warpgroup, 16 of each tile of 64 by a warp.
struct FewLayout {
  static constexpr int SCALES = 8;
  template <int KV_LORA_RANK>
  static __device__ __forceinline__ constexpr int column(int position) {
    constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;
    const int half = position / HALF_COLUMNS, warp = position % HALF_COLUMNS / 64;
    const int lane = position % 64 / VECTOR, i = position % VECTOR;
    return half * HALF_COLUMNS + i / 2 * 64 + warp * 16 + i % 2 * 8 + lane;
  }
  static constexpr int DISTANCE = VECTOR;
  static __device__ __forceinline__ constexpr int pair_position(int pair) {
    return pair / VECTOR * (2 * VECTOR) + pair % VECTOR;
  }
};

// Written by dense_decode_fp8.cu: the same with a lane's columns by twos.
struct PairLayout {
  static constexpr int SCALES = 8;
  template <int KV_LORA_RANK>
  static __device__ __forceinline__ constexpr int column(int position) {
    constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;
    const int half = position / HALF_COLUMNS, warp = position % HALF_COLUMNS / 64;
    const int lane = position % 64 / VECTOR, i = position % VECTOR;
    return half * HALF_COLUMNS + i / 2 * 64 + warp * 16 + lane * 2 + i % 2;
  }
  static constexpr int DISTANCE = 1;
  static __device__ __forceinline__ constexpr int pair_position(int pair) { return 2 * pair; }
};

// The unit for columns of magnitudes up to `top`, and one over it: the largest comes out between 2^14 and 2^15 (fp16
// ends at 65,504), so that columns down to 2^-28 of it keep their 11 bits; what is smaller errs by 2^-39 of it. Both
// are normal numbers of fp32 whatever `top` is, also 0, infinity and NaN.
struct PartialScale {
  float unit;
  float inverse;
};

__device__ __forceinline__ PartialScale partial_scale(float top) {
  const int exponent = max(__float_as_int(top) >> 23 & 255, 16) - 14;
  return {__int_as_float(exponent << 23), __int_as_float((254 - exponent) << 23)};
}
