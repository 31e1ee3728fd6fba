// What the kernels that stand tokens on wgmma's 64-row side share, whatever the rows of the cache are made of: who
// works on which item, what the two consumers have of it, and how they add up and store it at its end.
//
// A shape S says how many rows there are (ROWS), how results are rounded (IS_BF16), where its shared memory is (Memory,
// with the members named below) and what else of it begins there (init_others), who announces a slot (FULL_ARRIVALS)
// and who leaves it (EMPTY_ARRIVALS), the CTA's rows (TILE_ROWS), where halves of O are exchanged (exchange), and which
// columns of O a thread has of a warp's 16: r and r + 8, r = lane / 4, or 2 r and 2 r + 1 (ARE_PAIRS).
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
constexpr int STAGED_COLUMNS = STAGED_ROWS / 4;  // of a thread's columns, that is query rows
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
  float o[V_TILES][S::ROWS / 2];  // O^T: tile t, row 16 * warp + 8 * half + lane / 4 of its 64 columns
  float reference[S::COLUMNS];    // of the maxima, log2
  float sum[S::COLUMNS];          // over this thread's tokens
};

// Scores of tokens that a query row does not see are none; `stored` tokens of the request from the unit's first one on.
template <class S>
__device__ __forceinline__ void hide(typename S::Memory& shared, int stored, float (&s)[S::ROWS / 2]) {
  if (stored - shared.row[0].hidden >= BLOCK_N) return;  // row 0 sees the least
  const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    const int visible = stored - shared.row[column_row(column_of(i))].hidden;
    // Not arithmetic: what lies past the length may be NaN.
    s[i] = token + (i >> 1 & 1) * 8 < visible ? s[i] : -infinity();
  }
}

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
    for (int column = 0; column < STAGED_COLUMNS; ++column) {
      const int at = column / 2 * 4 + column % 2;  // and at + 2
      float* target = &staged[column_row(column)][tile * TILE_COLUMNS + warp * 16];
      if constexpr (S::ARE_PAIRS) {
        *reinterpret_cast<float2*>(target + lane / 4 * 2) = make_float2(o[tile][at], o[tile][at + 2]);
      } else {
        target[lane / 4] = o[tile][at];
        target[lane / 4 + 8] = o[tile][at + 2];
      }
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

// The same of a part, to the partial results: a thread has VECTOR columns of a row (FewLayout, PairLayout), a warp 64.
template <class S>
__device__ __forceinline__ void store_part(const DecodeParams& params, const Cta& cta, const Item& item, int consumer,
                                           const int (&place)[STAGED_COLUMNS],
                                           const float (&o)[HALF_TILES][STAGED_ROWS / 2]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const int partial = item.partial(params, cta);
  const int slots = 2 * params.num_slots, rows = params.seqlen_q * params.num_heads;
  uint16_t* results = params.o_partial + (int64_t)partial * rows * KV_LORA_RANK + consumer * HALF_COLUMNS + warp * 64 +
                      lane / 4 * VECTOR;
  float* scales = params.partial_sums + sum_index(params, 1 + consumer * 4 + warp, partial, 0);
  float top[STAGED_COLUMNS];
#pragma unroll
  for (int column = 0; column < STAGED_COLUMNS; ++column) {
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
    for (int column = 0; column < STAGED_COLUMNS; ++column) {
      top[column] = fmaxf(top[column], __shfl_xor_sync(0xFFFFFFFF, top[column], distance));
    }
  }
#pragma unroll
  for (int column = 0; column < STAGED_COLUMNS; ++column) {
    const int at = column / 2 * 4 + column % 2;
    const int row = place[column];
    const PartialScale unit = partial_scale(top[column]);
    const float scale = unit.inverse;
    const uint4 value = make_uint4(
        pack<false>(o[0][at] * scale, o[0][at + 2] * scale), pack<false>(o[1][at] * scale, o[1][at + 2] * scale),
        pack<false>(o[2][at] * scale, o[2][at + 2] * scale), pack<false>(o[3][at] * scale, o[3][at + 2] * scale));
    if (row >= 0) *reinterpret_cast<uint4*>(results + (int64_t)row * KV_LORA_RANK) = value;
    if (row >= 0 && lane < 4) scales[(int64_t)row * slots] = unit.unit;
  }
}

// Puts both consumers' maxima and sums together: the factors of their O to shared memory, the log-sums to memory.
template <class S>
__device__ __forceinline__ void merge_sums(const DecodeParams& params, typename S::Memory& shared, const Cta& cta,
                                           const Item& item, int consumer, const Result<S>& result) {
  const int thread = thread_index() % WARPGROUP;
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    float sum = result.sum[i];
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 4);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 8);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 16);
    if (thread % 32 < 4) reinterpret_cast<float*>(&shared.sum[consumer][column_row(i)])[thread / 32] = sum;
    if (thread < 4) shared.reference[consumer][column_row(i)] = result.reference[i];
  }
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
  float log_sum = 0.f;
  if (thread < S::ROWS) {
    float sum[CONSUMERS], reference[CONSUMERS];
#pragma unroll
    for (int other = 0; other < CONSUMERS; ++other) {
      const float4 all = shared.sum[other][thread];
      sum[other] = (all.x + all.y) + (all.z + all.w);
      // One that saw nothing has no reference either.
      reference[other] = sum[other] > 0.f ? shared.reference[other][thread] : -infinity();
    }
    const float top = fmaxf(reference[0], reference[1]);
    const float both = top == -infinity() ? 0.f : top;
    // Rounded one by one: the same bits whichever consumer had the first unit.
    const float total =
        __fadd_rn(__fmul_rn(sum[0], ex2(reference[0] - both)), __fmul_rn(sum[1], ex2(reference[1] - both)));
    const float mine = ex2((consumer == 0 ? reference[0] : reference[1]) - both);
    shared.factor[consumer][thread] = total == 0.f ? 0.f : __fdividef(mine, total);
    log_sum = total == 0.f ? -infinity() : both + lg2(total);
  }
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  if (consumer == 0 && thread < S::ROWS && shared.row[thread].lse >= 0) {
    const Row& row = shared.row[thread];
    if (item.is_whole) {
      const int64_t first = (int64_t)item.request * params.seqlen_q * params.num_heads;
      params.lse[first + row.lse] = log_sum == -infinity() ? infinity() : log_sum * LN_2;
    } else {
      params.partial_sums[sum_index(params, 0, item.partial(params, cta), row.out)] = log_sum;
    }
  }
}

// Leaves for the other consumer what consumer CONSUMER has of its half of the columns: 16 rows from `first_row` on.
template <class S, int CONSUMER>
__device__ __forceinline__ void give(typename S::Memory& shared, const Result<S>& result, int first_row,
                                     const float (&factor)[STAGED_COLUMNS]) {
  constexpr int OTHERS = (1 - CONSUMER) * HALF_TILES;
  const int first = first_row / 2;  // accumulator
#pragma unroll
  for (int i = 0; i < EXCHANGED_VECTORS; ++i) {
    const float* four = &result.o[OTHERS + i / 2][first + i % 2 * 4];
    const float* by = &factor[i % 2 * 2];
    S::exchange(shared, 1 - CONSUMER).taken[i][thread_index() % WARPGROUP] =
        make_float4(four[0] * by[0], four[1] * by[1], four[2] * by[0], four[3] * by[1]);
  }
}

// Adds what the other one left to consumer CONSUMER's own half of the columns, and stores it.
template <class S, int CONSUMER>
__device__ __forceinline__ void take(const DecodeParams& params, typename S::Memory& shared, const Cta& cta,
                                     const Item& item, const Result<S>& result, int first_row,
                                     const float (&factor)[STAGED_COLUMNS], const int (&place)[STAGED_COLUMNS]) {
  constexpr int OWN = CONSUMER * HALF_TILES;
  const int first = first_row / 2;
  float o[HALF_TILES][STAGED_ROWS / 2];
#pragma unroll
  for (int i = 0; i < EXCHANGED_VECTORS; ++i) {
    const float4 four = S::exchange(shared, CONSUMER).taken[i][thread_index() % WARPGROUP];
    const float others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = i % 2 * 4 + k;
      o[i / 2][at] = __fadd_rn(others[k], __fmul_rn(result.o[OWN + i / 2][first + at], factor[column_of(at)]));
    }
  }
  if (item.is_whole) {
    store_whole<S>(params, shared, item, CONSUMER, first_row, o);
  } else {
    store_part<S>(params, cta, item, CONSUMER, place, o);
  }
}

template <class S>
__device__ __forceinline__ void store_result(const DecodeParams& params, typename S::Memory& shared, const Cta& cta,
                                             const Item& item, int consumer, const Result<S>& result) {
#pragma unroll
  for (int first_row = 0; first_row < S::ROWS; first_row += STAGED_ROWS) {
    float factor[STAGED_COLUMNS];
    int place[STAGED_COLUMNS];  // Row::out of the thread's columns, < 0: no such row
#pragma unroll
    for (int i = 0; i < STAGED_COLUMNS; ++i) {
      const Row& row = shared.row[first_row + column_row(i)];
      place[i] = row.lse < 0 ? -1 : row.out;
      factor[i] = shared.factor[consumer][first_row + column_row(i)];
    }
    if (first_row > 0) bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);  // both have stored the 16 rows before
    if (consumer == 0) {
      give<S, 0>(shared, result, first_row, factor);
    } else {
      give<S, 1>(shared, result, first_row, factor);
    }
    bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);  // one instruction for both: compute-sanitizer asks for that
    if (consumer == 0) {
      take<S, 0>(params, shared, cta, item, result, first_row, factor, place);
    } else {
      take<S, 1>(params, shared, cta, item, result, first_row, factor, place);
    }
  }
}

// --- a CTA's beginning ----------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void begin_cta(const DecodeParams& params, typename S::Memory& shared, const Cta& cta) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < S::STAGES; ++slot) {
      for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        mbarrier_init(shared.full[consumer][slot], S::FULL_ARRIVALS);
      }
      mbarrier_init(shared.empty[slot], S::EMPTY_ARRIVALS);
    }
    S::init_others(shared);
    fence_mbarrier_init();
  }
  if (threadIdx.x < S::TILE_ROWS) {
    const int row = cta.first_row + threadIdx.x, query = row / params.group;
    const int head = cta.kv_head * params.group + row % params.group;
    const bool is_row = row < params.seqlen_q * params.group;
    shared.row[threadIdx.x] = {row_index(params, cta, row), is_row ? head * params.seqlen_q + query : -1,
                               params.is_causal && is_row ? params.seqlen_q - 1 - query : 0};
  }
  begin_launch(params, cta, NUM_THREADS / 32 - 1);
}
