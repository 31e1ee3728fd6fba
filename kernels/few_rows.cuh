// What the kernels for few query rows share, whatever the rows of the cache are made of: who works on which item, the
// softmax of a unit, and how a consumer's half of the columns is stored.
//
// A shape S says how many rows there are (ROWS), how results are rounded (IS_BF16), how many tiles of O a consumer has
// (O_TILES), whether consumers take units by turns (TURNS = 2) or share each (1), and where its shared memory is
// (Memory, with the members named below).
#pragma once

#include "item.cuh"
#include "wgmma.cuh"

constexpr int KV_LORA_RANK = 512;
constexpr int V_TILES = KV_LORA_RANK / TILE_COLUMNS;
constexpr int NUM_THREADS = 3 * WARPGROUP;
constexpr int CONSUMERS = 2;

// Results are exchanged by 16 rows at a time, half of the columns per consumer: 32 numbers per thread. Those of whole
// requests are turned in shared memory: a pitch of 4 modulo 32 words gives the lanes of an accumulator, 8 columns x 4
// pairs of rows, 32 banks.
constexpr int STAGED_ROWS = 16;
constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;
constexpr int STAGED_PITCH = HALF_COLUMNS + 4;
constexpr int HALF_TILES = V_TILES / 2;
constexpr int EXCHANGED_VECTORS = HALF_TILES * STAGED_ROWS / 2 / 4;

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int { BARRIER_BOTH = 1, BARRIER_CONSUMER = 2 };  // and BARRIER_CONSUMER + 1

// What a consumer gets from the other one, from the thread of the same number, and then turns.
union Exchange {
  float4 taken[EXCHANGED_VECTORS][WARPGROUP];
  float staged[STAGED_ROWS][STAGED_PITCH];
};

// Where a query row lies: once per CTA, because integer division is slow.
struct Row {
  int out;     // query * num_heads + head: its place among a request's rows of `out` and the partial results
  int lse;     // head * seqlen_q + query; < 0: no such row
  int hidden;  // tokens at the end that it does not see
};

// The query row of a thread's accumulator column `i`.
__device__ __forceinline__ int column_row(int i) { return (i >> 1) * 8 + thread_index() % 4 * 2 + (i & 1); }

// Number of accumulator i among the thread's columns.
__device__ __forceinline__ constexpr int column_of(int i) { return (i >> 2) * 2 + (i & 1); }

// Position in the ring and the parity of its barriers' phase.
template <class S>
struct Position {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ Position after(int slots) const {
    Position result = {slot + slots, phase};
    if (result.slot >= S::STAGES) result = {result.slot - S::STAGES, phase ^ 1};
    return result;
  }
};

// --- what producers look up ----------------------------------------------------------------------------------------

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

// Where a unit lies in the pool.
struct Place {
  int page;
  int row;  // of the page: tokens
};

// Of 32 units from `unit` on, one per lane; all 32 are under way at once, and no division is left for later.
__device__ __forceinline__ Place places_of(const DecodeParams& params, const Item& item, int unit) {
  Place place = {0, 0};
  unit += thread_index() % 32;
  if (item.request < 0 || unit >= item.num_units) return place;
  const int token = (item.first_unit + unit) * BLOCK_N;
  if (params.box_rows == BLOCK_N) place.page = page_of(params, item.request, token);
  place.row = row_in_page(params, token);
  return place;
}

// --- what consumers do ---------------------------------------------------------------------------------------------

// What a consumer has of an item.
template <class S>
struct Result {
  float o[S::O_TILES][S::ROWS / 2];  // O^T: tile t, row 16 * warp + 8 * half + lane / 4 of its 64 columns
  float reference[S::COLUMNS];       // of the maxima, log2
  float sum[S::COLUMNS];             // over this thread's tokens
};

// Maxima over the unit's tokens, of each of the thread's columns, in all threads of the warpgroup.
template <class S>
__device__ __forceinline__ void column_maxima(typename S::Memory& shared, int consumer, float (&top)[S::COLUMNS]) {
  const int thread = thread_index() % WARPGROUP;
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(0xFFFFFFFF, top[i], 4));
    top[i] = fmaxf(top[i], __shfl_xor_sync(0xFFFFFFFF, top[i], 8));
    top[i] = fmaxf(top[i], __shfl_xor_sync(0xFFFFFFFF, top[i], 16));
    if (thread % 32 < 4) reinterpret_cast<float*>(&shared.top[consumer][column_row(i)])[thread / 32] = top[i];
  }
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    const float4 all = shared.top[consumer][column_row(i)];
    top[i] = fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w));
  }
}

// P of a unit's scores `s`, its products of keys and queries: written by `store_p`, which also sums it up; what O and
// the sums are to be multiplied by where a score rises far above the reference.
template <class S, class StoreP>
__device__ __forceinline__ void probabilities(const DecodeParams& params, typename S::Memory& shared, const Item& item,
                                              int consumer, int unit, float (&s)[S::ROWS / 2], const StoreP& store_p,
                                              Result<S>& result) {
  const bool is_first = unit < S::TURNS;
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    s[i] = __fmaf_rn(s[i], params.softmax_scale_log2, -result.reference[column_of(i)]);
  }
  const int first_token = (item.first_unit + unit) * BLOCK_N;
  if (item.length - shared.row[0].hidden - first_token < BLOCK_N) {  // row 0 sees the least
    const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) {
      const int visible = item.length - shared.row[column_row(column_of(i))].hidden - first_token;
      // Not arithmetic: what lies past the length may be NaN.
      s[i] = token + (i >> 1 & 1) * 8 < visible ? s[i] : -infinity();
    }
  }
  float top[S::COLUMNS];
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    top[column_of(i)] = i & 2 ? fmaxf(top[column_of(i)], s[i]) : s[i];
  }
  // Both ways all warps meet before P is written: they have finished the wgmmas that read the P before.
  if (!is_first) bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  if (is_first) {
    column_maxima<S>(shared, consumer, top);
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) {
      // The maximum itself: P = 1 there, which bf16 holds. A row that sees nothing has none.
      result.reference[i] = top[i] == -infinity() ? 0.f : top[i];
    }
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) s[i] -= result.reference[column_of(i)];
  }
  float sum[S::COLUMNS];
  store_p(s, sum);
  bool is_above = false;
  if (!is_first) {
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) is_above |= top[i] > RESCALE_ABOVE;
  }
  // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence the
  // tensor core may read stale bytes: wrong numbers, no error.
  fence_proxy_async();
  if (bar_red_or(BARRIER_CONSUMER + consumer, WARPGROUP, is_above)) {
    column_maxima<S>(shared, consumer, top);
    float alpha[S::COLUMNS];
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) {
      const float rise = fmaxf(ceilf(top[i]), 0.f);  // a whole number, so that alpha is exact
      result.reference[i] += rise;
      alpha[i] = ex2(-rise);
      result.sum[i] *= alpha[i];
      top[i] = rise;
    }
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) s[i] -= top[column_of(i)];
#pragma unroll
    for (int tile = 0; tile < S::O_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] *= alpha[column_of(i)];
    }
    store_p(s, sum);
    fence_proxy_async();
    bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  }
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) result.sum[i] += sum[i];
}

// 16 rows of a consumer's half of O, of a whole request, to `out`: turned in shared memory, so that rows are stored.
template <class S>
__device__ __forceinline__ void store_whole(const DecodeParams& params, typename S::Memory& shared, const Item& item,
                                            int consumer, int first_row,
                                            const float (&o)[HALF_TILES][STAGED_ROWS / 2]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  auto& staged = S::exchange(shared, consumer).staged;
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);  // all have taken what the other consumer left there
#pragma unroll
  for (int tile = 0; tile < HALF_TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < STAGED_ROWS / 2; ++i) {
      staged[column_row(column_of(i))][tile * TILE_COLUMNS + warp * 16 + (i >> 1 & 1) * 8 + lane / 4] = o[tile][i];
    }
  }
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  const int64_t first = (int64_t)item.request * params.seqlen_q * params.num_heads;
#pragma unroll
  for (int i = 0; i < STAGED_ROWS; i += WARPGROUP / 32) {
    const Row& row = shared.row[first_row + i + warp];
    if (row.lse < 0) break;
    uint16_t* target =
        static_cast<uint16_t*>(params.out) + (first + row.out) * KV_LORA_RANK + consumer * HALF_COLUMNS + lane * 4;
#pragma unroll
    for (int part = 0; part < HALF_COLUMNS / 128; ++part) {
      const float4 four = *reinterpret_cast<const float4*>(&staged[i + warp][part * 128 + lane * 4]);
      *reinterpret_cast<uint2*>(target + part * 128) =
          make_uint2(pack<S::IS_BF16>(four.x, four.y), pack<S::IS_BF16>(four.z, four.w));
    }
  }
}

// The same of a part, to the partial results: a thread has VECTOR columns of a row (FewLayout), a warp 64.
template <class S>
__device__ __forceinline__ void store_part(const DecodeParams& params, const Cta& cta, const Item& item, int consumer,
                                           int first_row, const int (&place)[S::COLUMNS],
                                           const float (&o)[HALF_TILES][STAGED_ROWS / 2]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const int partial = item.partial(params, cta);
  const int slots = 2 * params.num_slots, rows = params.seqlen_q * params.num_heads;
  uint16_t* results = params.o_partial + (int64_t)partial * rows * KV_LORA_RANK + consumer * HALF_COLUMNS + warp * 64 +
                      lane / 4 * VECTOR;
  float* scales = params.partial_sums + sum_index(params, 1 + consumer * 4 + warp, partial, 0);
  float top[STAGED_ROWS / 4];
#pragma unroll
  for (int column = 0; column < STAGED_ROWS / 4; ++column) {
    const int at = column / 2 * 4 + column % 2;  // its accumulators: this one, and for 8 columns of O more, at + 2
    top[column] = 0.f;
#pragma unroll
    for (int tile = 0; tile < HALF_TILES; ++tile) {
      top[column] = fmaxf(top[column], fmaxf(fabsf(o[tile][at]), fabsf(o[tile][at + 2])));
    }
  }
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
#pragma unroll
    for (int column = 0; column < STAGED_ROWS / 4; ++column) {
      top[column] = fmaxf(top[column], __shfl_xor_sync(0xFFFFFFFF, top[column], distance));
    }
  }
#pragma unroll
  for (int column = 0; column < STAGED_ROWS / 4; ++column) {
    const int at = column / 2 * 4 + column % 2;
    const int row = place[first_row / 4 + column];
    const PartialScale unit = partial_scale(top[column]);
    const float scale = unit.inverse;
    const uint4 value = make_uint4(
        pack<false>(o[0][at] * scale, o[0][at + 2] * scale), pack<false>(o[1][at] * scale, o[1][at + 2] * scale),
        pack<false>(o[2][at] * scale, o[2][at + 2] * scale), pack<false>(o[3][at] * scale, o[3][at + 2] * scale));
    if (row >= 0) *reinterpret_cast<uint4*>(results + (int64_t)row * KV_LORA_RANK) = value;
    if (row >= 0 && lane < 4) scales[(int64_t)row * slots] = unit.unit;
  }
}

// --- a CTA's beginning ----------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void begin_cta(const DecodeParams& params, typename S::Memory& shared, const Cta& cta) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < S::STAGES; ++slot) {
      for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(shared.full[consumer][slot], 1);
      mbarrier_init(shared.empty[slot], CONSUMERS / S::TURNS * WARPGROUP / 32);  // warps that read it
    }
    mbarrier_init(shared.q_full, S::Q_ARRIVALS);
    mbarrier_init(shared.q_empty, CONSUMERS * WARPGROUP / 32);
    fence_mbarrier_init();
  }
  if (threadIdx.x < S::ROWS) {
    const int row = threadIdx.x, query = row / params.group;
    const int head = cta.kv_head * params.group + row % params.group;
    const bool is_row = row < params.seqlen_q * params.group;
    shared.row[row] = {row_index(params, cta, row), is_row ? head * params.seqlen_q + query : -1,
                       params.is_causal && is_row ? params.seqlen_q - 1 - query : 0};
  }
  // A launch's parameters are in no cache yet: fetched here they do not add to the chain of loads behind the wait.
  asm volatile("" ::"l"(params.items), "l"(params.cache_seqlens), "l"(params.block_table), "r"(params.block_size));
  __syncthreads();
  if (threadIdx.x / 32 == NUM_THREADS / 32 - 1) prefetch_chain(params, cta);  // a warp with nothing else to do
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}
