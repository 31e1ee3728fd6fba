// What an FP8 row is, and how large numbers of a query are.
#pragma once

#include "item.cuh"

constexpr int ROW_CODES = 512;      // e4m3, a row's first bytes
constexpr int GROUP_COLUMNS = 128;  // that share a scale; as codes, 128 bytes per token
constexpr int GROUPS = ROW_CODES / GROUP_COLUMNS;
static_assert(GROUPS == 4);                        // scales of a row: 16 bytes
constexpr int K_ROPE_AT = ROW_CODES + 4 * GROUPS;  // bytes
constexpr int ROW_BYTES = K_ROPE_AT + 2 * TILE_COLUMNS;
static_assert(ROW_BYTES == 656);

// The largest magnitude of some bf16, as the 15 bits that order them: of NaN the largest.
__device__ __forceinline__ int magnitude(uint32_t both) {
  return max((int)(both & 0x7FFF), (int)(both >> 16 & 0x7FFF));
}

__device__ __forceinline__ uint32_t magnitudes(const uint4& eight) {
  return max_abs_bf16x2(max_abs_bf16x2(eight.x, eight.y), max_abs_bf16x2(eight.z, eight.w));
}
