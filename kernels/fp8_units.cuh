// FP8 rows in shared memory: units of 64 tokens, and the warpgroup that loads them, out of pages or row by row where
// rows are named by index.
//
// A row of the pool is [512 e4m3 | 4 fp32 scales, of 128 columns each | 64 bf16]. Out of pages TMA makes tiles of it,
// in the order that wgmma's descriptors want. Rows by index come one copy each, by a lane each, and keep their order:
// keys go to wgmma through registers. (Copies of 16 bytes, 21 by a lane, can make tiles too: 5% more time at 32 query
// rows.)
//
// Consumers take units by turns. A shape S has, besides what few_rows.cuh wants: whether rows are named by index
// (IS_SPARSE); what a unit is (Unit) and how many there are (STAGES).
#pragma once

#include "few_rows.cuh"
#include "fp8_row.cuh"

constexpr int GROUP_TILES = GROUP_COLUMNS / TILE_COLUMNS;  // of O^T
static_assert(KV_LORA_RANK == ROW_CODES);

constexpr int REGISTERS = 504;  // of a thread of each of the three warpgroups, together
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr int UNIT_BYTES = BLOCK_N * ROW_BYTES;

// A unit out of pages: tiles, as TMA makes them and wgmma's descriptors want them.
struct alignas(1024) Unit {
  static constexpr int GROUP_BYTES = TILE_BYTES, PITCH = 128;  // from a group of codes to the next, from row to row
  uint8_t latent[GROUPS][TILE_BYTES];                          // 64 rows x 128 bytes, 128-byte swizzle
  uint8_t k_rope[TILE_BYTES];
  float4 scales[BLOCK_N];
  __device__ __forceinline__ const float4& scales_of(int token) const { return scales[token]; }
};
static_assert(sizeof(Unit) == UNIT_BYTES);

// A unit of rows that are named by index: rows as they lie in the pool, one copy each. Their pitch is 41 times 16
// bytes, an odd number: 8 rows of a matrix of ldmatrix are in 32 banks.
struct Rows {
  static constexpr int GROUP_BYTES = GROUP_COLUMNS, PITCH = ROW_BYTES;
  uint8_t row[BLOCK_N][ROW_BYTES];
  __device__ __forceinline__ const float4& scales_of(int token) const {
    return *reinterpret_cast<const float4*>(row[token] + KV_LORA_RANK);
  }
};
static_assert(sizeof(Rows) == UNIT_BYTES);

template <bool IS_SPARSE>
struct UnitOf {
  using Type = Unit;
};
template <>
struct UnitOf<true> {
  using Type = Rows;
};

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

// Row `row` of an item's Q; nullptr: there is no such row.
template <class Params>
__device__ __forceinline__ const uint4* query_row(const Params& fp8, const Cta& cta, int request, int row) {
  row += cta.first_row;
  if (row >= fp8.decode.seqlen_q * fp8.decode.group) return nullptr;
  const int64_t start = request * fp8.q_stride_request + cta.kv_head * fp8.q_stride_head;
  return reinterpret_cast<const uint4*>(fp8.q + start + row * fp8.q_stride_row);
}

// Asks L2 for a request's Q: WARPS warps, 128 bytes per lane.
template <class S, int WARPS, class Params>
__device__ __forceinline__ void prefetch_queries(const Params& fp8, const Cta& cta, int request, int warp) {
  constexpr int LINES = (ROW_CODES + TILE_COLUMNS) * 2 / 128;  // of a row
  if (request < 0) return;
#pragma unroll 1
  for (int line = warp * 32 + thread_index() % 32; line < S::TILE_ROWS * LINES; line += WARPS * 32) {
    const uint4* row = query_row(fp8, cta, request, line / LINES);
    if (row) prefetch_global_l2(row + line % LINES * 8);
  }
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
      consumer ^= 1;
      // The next item's length and pages are looked up once the last unit of this one is on its
      // way: three loads, one after another.
      if (unit + 1 == item.num_units) {
        next = item_with_units(params, item.next);
        next_places = places_of(params, next, 0);
        prefetch_queries<S, 1>(fp8, cta, next.request, 0);
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
  return index < gather.num_places ? index : -1;
}

// Copies the warp's rows of a unit: a lane per row; zeros for rows that are not named.
template <class S>
__device__ __forceinline__ void copy_rows(const GatherParams& gather, typename S::Memory& shared, int slot, int index,
                                          uint64_t& full, int warp) {
  const int lane = thread_index() % 32;
  const uint32_t named = __ballot_sync(0xFFFFFFFF, lane < WARP_ROWS && index >= 0);
  uint8_t* rows = shared.ring[slot].row[warp * WARP_ROWS];
  for (uint32_t left = named ^ ((1u << WARP_ROWS) - 1); left != 0; left &= left - 1) {
    uint4* row = reinterpret_cast<uint4*>(rows + (__ffs(left) - 1) * ROW_BYTES);
    for (int i = lane; i < ROW_BYTES / 16; i += 32) row[i] = make_uint4(0, 0, 0, 0);
  }
  // Copies of the unit that will be here next are to come behind what is stored here.
  if (named != (1u << WARP_ROWS) - 1) fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
    shared.named[slot][warp] = (uint16_t)named;
    mbarrier_arrive_expect_tx(full, __popc(named) * ROW_BYTES);
  }
  __syncwarp();
  if (named >> lane & 1) {
    const uint4* from = reinterpret_cast<const uint4*>(gather.pool) + (uint32_t)index * gather.row_stride;
    bulk_load(shared_address(rows) + lane * ROW_BYTES, from, ROW_BYTES, full);
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
        prefetch_queries<S, PRODUCER_WARPS>(gather, cta, next.request, warp);
      }
      mbarrier_wait(shared.empty[position.slot], position.phase ^ 1);
      copy_rows<S>(gather, shared, position.slot, index, shared.full[consumer][position.slot], warp);
      position = position.after(1);
      consumer ^= 1;
      index = next_index;
    }
    item = next;
  }
}
