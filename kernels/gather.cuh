// Which rows a unit has, of pages or named by index, where they are fetched one by one: looked up a warp's rows at a
// time, ahead of their loads.
//
// A shape S says how rows are found (IS_SPARSE), how many of a unit's a warp of this CTA loads (CTA_ROWS) from which
// one on (first_row), how many units can be noted (NOTED, a power of two), and where: Memory has `asked` and `walk`.
#pragma once

#include "item.cuh"

// All units of all items, one after another; per warp, in shared memory because registers are short.
struct Walk {
  Item item;
  int unit;  // of the item, the next one
};

// What a warp's rows of a unit are found by.
template <int ROWS>
struct Asked {
  uint32_t offset[ROWS];  // in the pool, in steps of 16 bytes
  uint32_t named;         // a bit per row
  uint32_t is_unit;       // 0: behind the last one
};

// Of a unit's 64 rows, a bit each.
__device__ __forceinline__ uint64_t named_rows(const Asked<WARP_ROWS> (&asked)[PRODUCER_WARPS]) {
  uint64_t named = 0;
#pragma unroll
  for (int warp = 0; warp < PRODUCER_WARPS; ++warp) named |= (uint64_t)asked[warp].named << warp * WARP_ROWS;
  return named;
}

// What the lane's row of a unit, row lane % CTA_ROWS of its warp's, is found by: `number` of a page, or of a row of the
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
  const int token = (item.first_unit + unit) * BLOCK_N + S::first_row(warp) + thread_index() % S::CTA_ROWS;
  if (token >= item.length) return {-1, 0};
  if (S::IS_SPARSE) return {ld_global_nc(params.block_table + item.request * params.table_stride_request + token), 0};
  const int row = params.block_size == BLOCK_N ? token % BLOCK_N : token % params.block_size;
  return {page_of(params, item.request, token), row * gather.row_stride + cta.kv_head * gather.head_stride};
}

// A warp's rows of a unit.
struct Rows {
  bool is_unit;     // false: behind the last one
  uint32_t offset;  // of row lane % CTA_ROWS in the pool, in steps of 16 bytes
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
          __ballot_sync(0xFFFFFFFF, is_row) & ((1u << S::CTA_ROWS) - 1)};
}

// Notes what a warp's rows of unit `number` are found by.
template <class S>
__device__ __forceinline__ void note(typename S::Memory& shared, uint32_t number, uint32_t warp, const Rows& rows) {
  Asked<S::CTA_ROWS>& asked = shared.asked[number % S::NOTED][warp];
  const uint32_t lane = thread_index() & 31;
  if (lane < S::CTA_ROWS) asked.offset[lane] = rows.offset;
  if (lane == 0) {
    asked.named = rows.named;
    asked.is_unit = rows.is_unit;
  }
  __syncwarp();
}
