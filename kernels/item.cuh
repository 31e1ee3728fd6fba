// What a CTA of a decode kernel works on: tokens by the unit and the items of one slot of the split plan, derived from
// the live lengths.
#pragma once

#include "partial.cuh"

constexpr int BLOCK_N = 64;  // tokens in a unit; the split plan counts in the same unit (contract.PLAN_BLOCK)
constexpr int TILE_COLUMNS = 64;
constexpr int TILE_BYTES = BLOCK_N * TILE_COLUMNS * 2;  // 64 rows x 128 bytes, 128-byte swizzle
static_assert(TILE_BYTES == 8192);

constexpr int WARPGROUP = 128;
constexpr int PRODUCER_WARPS = WARPGROUP / 32;       // of a warpgroup that fetches rows one by one
constexpr int WARP_ROWS = BLOCK_N / PRODUCER_WARPS;  // of a unit, that each of them fetches
static_assert(WARP_ROWS == 16);
constexpr int SHARED_LIMIT = 232448;  // bytes that a CTA may have on Hopper
// A reference maximum is kept until a score exceeds it by 2^8: then P is at most 256 times what it was at first (1, or
// wide_rows.cuh's HEADROOM), and O and the sums lose nothing.
constexpr float RESCALE_ABOVE = 8.f;
constexpr float LN_2 = 0.6931471805599453f;

// What a CTA works on, for all roles. Row r of the tile is query (first_row + r) / group, head kv_head * group +
// (first_row + r) % group of its request.
struct Cta {
  int plan_slot;
  int kv_head;
  int first_row;
};

// What every role derives for itself from the plan and the live length; again when it is needed again, from L1.
struct Item {
  int request;
  int first_unit;
  int num_units;
  int length;  // tokens
  bool is_whole;
  bool is_begin;  // of the request
  int next;

  // Index of the partial result of a cut request: first parts lie behind all slots.
  __device__ __forceinline__ int partial(const DecodeParams& params, const Cta& cta) const {
    return is_begin ? params.num_slots + cta.plan_slot : cta.plan_slot;
  }
};

__device__ __forceinline__ Item load_item(const DecodeParams& params, int row) {
  const int4 plan = ld_global_nc(reinterpret_cast<const int4*>(params.items) + row);
  Item item;
  item.request = plan.x;
  item.next = plan.w;
  if (plan.x < 0) return item;
  const int length = ld_global_nc(params.cache_seqlens + plan.x * params.seqlens_stride);
  item.length = length < 0 ? 0 : length;
  const uint64_t units = ((uint32_t)item.length + BLOCK_N - 1) / BLOCK_N;
  item.first_unit = (int)(units * (uint32_t)plan.y >> 30);
  item.num_units = (int)(units * (uint32_t)plan.z >> 30) - item.first_unit;
  item.is_begin = plan.y == 0;
  item.is_whole = item.is_begin && plan.z == PLAN_WHOLE;
  return item;
}

// The item of plan row `row`, or the first after it that has units; request < 0: none.
__device__ __forceinline__ Item item_with_units(const DecodeParams& params, int row) {
  Item item;
  item.request = -1;
  while (row >= 0) {
    item = load_item(params, row);
    if (item.request < 0 || item.num_units > 0) return item;
    row = item.next;
    item.request = -1;
  }
  return item;
}

// query * num_heads + head of row `row` of a latent head: its place among a request's rows of `out` and the partial
// results. Rows of one latent head are apart only where there are others: else no division, which is slow.
__device__ __forceinline__ int row_index(const DecodeParams& params, const Cta& cta, int row) {
  const int others = params.num_heads - params.group;
  return cta.kv_head * params.group + row + (others == 0 ? 0 : row / params.group * others);
}

// Place of a partial result's number in `partial_sums`: plane 0 has log-sums, the others scales.
__device__ __forceinline__ int64_t sum_index(const DecodeParams& params, int plane, int partial, int row) {
  const int rows = params.seqlen_q * params.num_heads;
  return ((int64_t)plane * rows + row) * (2 * params.num_slots) + partial;
}

// Tokens of a request that row `row` of a latent head may see; queries are aligned to the end.
__device__ __forceinline__ int visible_tokens(const DecodeParams& params, int length, int row) {
  return params.is_causal ? length - (params.seqlen_q - 1 - row / params.group) : length;
}

// --- pages ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int page_of(const DecodeParams& params, int request, int token) {
  // Integer division is slow, and this one stands before the first load of a page.
  const int page = params.block_size == BLOCK_N ? token / BLOCK_N : token / params.block_size;
  return ld_global_nc(params.block_table + request * params.table_stride_request + page * params.table_stride_page);
}

// Where in its page a unit begins.
__device__ __forceinline__ int row_in_page(const DecodeParams& params, int token) {
  return params.block_size == BLOCK_N ? 0 : token % params.block_size;
}

// Asks L2 for what the chain plan -> length -> table -> page begins with, each line by one CTA of the grid: a miss of
// all L2 is ~0.5 us, and three stand one behind the other. For a warp. It may run before the launches ahead have ended:
// nothing is read, and L2 is where their writes arrive.
__device__ __forceinline__ void prefetch_chain(const DecodeParams& params, const Cta& cta) {
  const int lane = thread_index() % 32;
  if (lane == 0) prefetch_global_l2(params.items + cta.plan_slot);
  const int64_t line = (int64_t)blockIdx.x * 32 + lane;  // of 128 bytes: 32 lengths or pages
  if (line * 32 < params.batch) prefetch_global_l2(params.cache_seqlens + line * 32 * params.seqlens_stride);
  const int lines = max(1, (params.max_blocks + 31) / 32);  // of the table, per request
  const int64_t request = line / lines, page = line % lines * 32;
  if (request >= params.batch || params.max_blocks == 0) return;
  prefetch_global_l2(params.block_table + request * params.table_stride_request + page * params.table_stride_page);
}

// A CTA's beginning, by all its threads, once what they share is set up: `warp` is one whose work comes last.
__device__ __forceinline__ void begin_launch(const DecodeParams& params, const Cta& cta, int warp) {
  // A launch's parameters are in no cache yet: fetched here they do not add to the chain of loads behind the wait.
  asm volatile("" ::"l"(params.items), "l"(params.cache_seqlens), "l"(params.block_table), "r"(params.block_size));
  __syncthreads();
  if (threadIdx.x / 32 == warp) prefetch_chain(params, cta);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}
