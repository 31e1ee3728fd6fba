// Decode attention over FP8 rows on Hopper for more than 32 query rows per latent head: fp8_rows.cuh's arithmetic for
// tiles of 64 query rows.
//
// Two consumer warpgroups share each unit. A consumer scores 32 of the rows and makes their P; then both have all of P,
// and each adds up half of O's columns for all 64 rows: O^T is 128 registers a thread, as it is by turns for 32 rows,
// and a unit is loaded and its codes are read for twice as many. Sums and references of a row belong to who scores it.
// The third warpgroup loads units as in dense_decode_fp8.cu. Barriers:
//   full[0][slot]     unit -> both consumers
//   empty[slot]       both consumers -> producers
// and a named one where the consumers meet: before P is written, for all have read the P before and the rotated keys,
// and behind it. docs/dense_decode.md has the budgets and the argument why no wait can deadlock.
#include "fp8_rows.cuh"

template <class S>
struct Shared;

template <bool IS_SPARSE_>
struct Shape : Codes<32> {
  using Memory = Shared<Shape>;
  using Unit = typename UnitOf<IS_SPARSE_>::Type;
  static constexpr int TILE_ROWS = CONSUMERS * ROWS;
  static constexpr int STAGES = IS_SPARSE_ ? 2 : 3;  // units
  static constexpr bool TURNS = false;
  static constexpr bool IS_SPARSE = IS_SPARSE_;
  static constexpr int FULL_ARRIVALS = IS_SPARSE ? PRODUCER_WARPS : 1;  // of warps that copy rows; of who loads pages
  static constexpr int EMPTY_ARRIVALS = CONSUMER_WARPS;
  static constexpr int S_PARTS = 2;
  static constexpr int OWN_P = IS_SPARSE ? GROUPS : GROUPS - 1;  // that of the last group lies over rotated keys
  static constexpr int V_PARTS = 3;                              // products of values under way at once
  static constexpr int CONSUMER_REGISTERS = 232;
  static __device__ __forceinline__ uint8_t* q(Memory& shared, int consumer);
  static __device__ __forceinline__ uint8_t* q_rope(Memory& shared, int consumer);
  static __device__ __forceinline__ uint8_t* p(Memory& shared, int slot, int consumer, int group);
  static __device__ __forceinline__ Exchange& exchange(Memory& shared, int consumer);
  static __device__ __forceinline__ void init_others(Memory& shared);
};
using Tile = Shape<false>;  // for what does not depend on how rows are found

constexpr int O_ACCUMULATORS = Tile::TILE_ROWS / 2;  // of a thread, in a tile of 64 columns

template <class S>
struct alignas(1024) Shared {
  typename S::Unit ring[S::STAGES];  // first: unit_address counts from the start
  union alignas(1024) {
    struct {
      uint8_t q[CONSUMERS][GROUPS][Tile::Q_TILE_BYTES];  // 128-byte swizzle
      uint8_t q_rope[CONSUMERS][Tile::Q_ROPE_BYTES];
    };
    Exchange exchange[CONSUMERS];  // at an item's end
  };
  alignas(1024) uint8_t p[S::OWN_P][CONSUMERS][Tile::P_TILE_BYTES];  // P times a group's scales; 64-byte swizzle
  float4 top[CONSUMERS][Tile::ROWS];                                 // maxima of a unit, of each warp's tokens
  float4 sum[CONSUMERS][Tile::ROWS];                                 // of an item
  float4 top_scale[CONSUMERS][WARPGROUP / 32];                       // of each warp's tokens, by group
  // softmax_scale_log2 times what the row of Q was divided by; the reference of its maxima (log2).
  float2 from[CONSUMERS][Tile::ROWS];
  // P_UNITS over the units that scales and O count in, by group: powers of two; or 0, before an item's first.
  float4 inverse[CONSUMERS];
  float alpha[Tile::TILE_ROWS];   // by which O of a row is multiplied when its reference rises
  float factor[Tile::TILE_ROWS];  // and at the item's end
  Row row[Tile::TILE_ROWS];
  alignas(8) uint16_t named[S::STAGES][PRODUCER_WARPS];  // sparse: a bit per token, whether there is such a row
  uint64_t full[CONSUMERS][S::STAGES];
  uint64_t empty[S::STAGES];
  Cta cta;
};

template <bool IS_SPARSE_>
__device__ __forceinline__ uint8_t* Shape<IS_SPARSE_>::q(Memory& shared, int consumer) {
  return shared.q[consumer][0];
}
template <bool IS_SPARSE_>
__device__ __forceinline__ uint8_t* Shape<IS_SPARSE_>::q_rope(Memory& shared, int consumer) {
  return shared.q_rope[consumer];
}
template <bool IS_SPARSE_>
__device__ __forceinline__ uint8_t* Shape<IS_SPARSE_>::p(Memory& shared, int slot, int consumer, int group) {
  if constexpr (!IS_SPARSE) {
    if (group >= OWN_P) return shared.ring[slot].k_rope + consumer * Tile::P_TILE_BYTES;
  }
  return shared.p[group][consumer];
}
template <bool IS_SPARSE_>
__device__ __forceinline__ Exchange& Shape<IS_SPARSE_>::exchange(Memory& shared, int consumer) {
  return shared.exchange[consumer];
}

template <bool IS_SPARSE_>
__device__ __forceinline__ void Shape<IS_SPARSE_>::init_others(Memory& shared) {
  // Of a first item without units, which loads no Q.
  shared.inverse[0] = shared.inverse[1] = make_float4(0.f, 0.f, 0.f, 0.f);
}

// --- a unit ---------------------------------------------------------------------------------------------------------

// Half of O^T's columns for all rows: tile t, rows 16 * warp + 8 * half + lane / 4 of its 64 columns.
using Values = float[HALF_TILES][O_ACCUMULATORS];

// The query row of a thread's accumulator column `i` of O, of the tile's.
__device__ __forceinline__ int tile_row(int i) {
  return i / Tile::COLUMNS * Tile::ROWS + column_row(i % Tile::COLUMNS);
}

// Counts references and the units of scales anew, so that neither is exceeded; what was added up so far, too.
template <class S>
__device__ __forceinline__ void rescale(Shared<S>& shared, int consumer, bool is_first, float (&s)[S::ROWS / 2],
                                        const float (&scales)[2][GROUPS], float (&inverse)[GROUPS], Values& o,
                                        float (&sum)[S::COLUMNS]) {
  const bool is_writer = thread_index() % WARPGROUP < 4;  // of what all threads of the consumer know
  float top[S::COLUMNS], unit[GROUPS];
  tops<S>(s, top);
  column_maxima<S>(shared, consumer, top);
  scale_units<S>(shared, consumer, scales, unit);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const float old = inverse[group];
    inverse[group] = is_first ? unit[group] : fminf(unit[group], old);
    unit[group] = is_first ? 1.f : inverse[group] * inverse_of(old);
  }
  if (is_writer) shared.inverse[consumer] = make_float4(inverse[0], inverse[1], inverse[2], inverse[3]);
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    // First the maximum itself: P = 1 there. Later a whole number, so that alpha is exact. A row that sees nothing has
    // no maximum.
    const float rise = top[i] == -infinity() ? 0.f : is_first ? top[i] : fmaxf(ceilf(top[i]), 0.f);
    const float alpha = is_first ? 1.f : ex2(-rise);
    if (is_writer) {
      shared.from[consumer][column_row(i)].y += rise;
      shared.alpha[consumer * S::ROWS + column_row(i)] = alpha;
    }
    const int at = i / 2 * 4 + i % 2;
    sum[i] *= alpha;
    s[at] -= rise;
    s[at + 2] -= rise;
  }
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);  // who scores a row knows its factor
  const float own[GROUPS / CONSUMERS] = {consumer == 0 ? unit[0] : unit[2], consumer == 0 ? unit[1] : unit[3]};
#pragma unroll
  for (int i = 0; i < O_ACCUMULATORS / 2; ++i) {
    const float alpha = shared.alpha[tile_row(i)];
    const int at = i / 2 * 4 + i % 2;
#pragma unroll
    for (int tile = 0; tile < HALF_TILES; ++tile) {
      o[tile][at] *= alpha * own[tile / GROUP_TILES];
      o[tile][at + 2] *= alpha * own[tile / GROUP_TILES];
    }
  }
}

// P of a unit's scores, and its sums; O and the sums are multiplied where a score or a scale rises far above what they
// count in.
template <class S>
__device__ __forceinline__ void probabilities(Shared<S>& shared, int slot, int consumer, float (&s)[S::ROWS / 2],
                                              const float (&scales)[2][GROUPS], Values& o, float (&sum)[S::COLUMNS]) {
  const float4 all = shared.inverse[consumer];
  float inverse[GROUPS] = {all.x, all.y, all.z, all.w};
  const bool is_first = all.x == 0.f;
  const bool is_above = is_first || exceeds<S>(s, scales, inverse);
  // Also: all warps have finished the wgmmas that read the P before, and this unit's rotated keys, over which P of the
  // last group is stored: both consumers' warps.
  if (bar_red_or(BARRIER_BOTH, CONSUMERS * WARPGROUP, is_above)) {
    rescale<S>(shared, consumer, is_first, s, scales, inverse, o, sum);
  }
  store_p<S>(shared, slot, consumer, s, scales, inverse, sum);
  // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence the
  // tensor core may read stale bytes: wrong numbers, no error.
  fence_proxy_async();
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
}

// Adds a unit's values times P to the consumer's half of O, for either consumer's rows.
template <class S>
__device__ __forceinline__ void add_values(Shared<S>& shared, int slot, int consumer, Values& o) {
  constexpr int OWN_GROUPS = GROUPS / CONSUMERS;
  const auto p_of = [&](int group) {
    const uint8_t* p = S::p(shared, slot, 0, consumer * OWN_GROUPS + group);
    return matrix_descriptor(shared_address(p), 0, 512, Swizzle::B64);
  };
  add_parts<S>(unit_address(slot) + consumer * (OWN_GROUPS * S::Unit::GROUP_BYTES), p_of, o);
}

// One unit: S^T, P^T and O^T; `stored` tokens of the request from its first one on.
template <class S>
__device__ __forceinline__ void consume(Shared<S>& shared, int stored, int consumer, uint32_t number, Values& o,
                                        float (&sum)[S::COLUMNS]) {
  // Uniform to the compiler too, so that descriptors are in uniform registers.
  const int slot = __shfl_sync(0xFFFFFFFF, number % S::STAGES, 0);
  mbarrier_wait(shared.full[0][slot], number / S::STAGES & 1);
  const Tokens<S> tokens(shared, slot, stored);
  if (!tokens.is_nothing) {
    float s[S::ROWS / 2], scales[2][GROUPS];
    score<S>(shared, slot, consumer, s);
    tokens.load_scales(shared.ring[slot], scales);
    // Of the columns that this consumer adds up. The other one may still score these rows, and drops what comes out.
    if constexpr (!S::IS_SPARSE) {
      if (stored < BLOCK_N) {
        clear_rows<GROUPS / CONSUMERS>(shared.ring[slot], consumer * (GROUPS / CONSUMERS), stored);
      }
    }
    count_scores<S>(shared, consumer, stored, tokens, s);
    probabilities<S>(shared, slot, consumer, s, scales, o, sum);
    add_values<S>(shared, slot, consumer, o);
  }
  __syncwarp();
  if (thread_index() % 32 == 0) mbarrier_arrive(shared.empty[slot]);
}

// --- an item --------------------------------------------------------------------------------------------------------

// Factors of the rows that the consumer scores to shared memory, their log-sums to memory; what its half of O counts
// in. Both consumers meet, before and after: the other one may still read the factors of the item before, for an item
// without units has no Q at which they meet.
template <class S>
__device__ __forceinline__ void finish_sums(const DecodeParams& params, Shared<S>& shared, int consumer, int plan_row,
                                            const float (&sums)[S::COLUMNS], float (&unit)[GROUPS / CONSUMERS]) {
  const Item item = load_item(params, plan_row);  // again, as the CTA's place: registers
  const Cta cta = now(shared);
  const int thread = thread_index() % WARPGROUP;
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    float sum = sums[i];
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 4);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 8);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 16);
    if (thread % 32 < 4) reinterpret_cast<float*>(&shared.sum[consumer][column_row(i)])[thread / 32] = sum;
  }
  const float4 inverse = shared.inverse[consumer];
  unit[0] = unit_of(consumer == 0 ? inverse.x : inverse.z);
  unit[1] = unit_of(consumer == 0 ? inverse.y : inverse.w);
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
  if (thread < S::ROWS) {
    const float4 all = shared.sum[consumer][thread];
    const float total = (all.x + all.y) + (all.z + all.w);
    const float log_sum = total == 0.f ? -infinity() : shared.from[consumer][thread].y + lg2(total);
    shared.factor[consumer * S::ROWS + thread] = total == 0.f ? 0.f : __fdividef(1.f, total);
    const Row& row = shared.row[consumer * S::ROWS + thread];
    if (row.lse >= 0) {
      if (item.is_whole) {
        const int64_t first = (int64_t)item.request * params.seqlen_q * params.num_heads;
        params.lse[first + row.lse] = log_sum == -infinity() ? infinity() : log_sum * LN_2;
      } else {
        params.partial_sums[sum_index(params, 0, item.partial(params, cta), row.out)] = log_sum;
      }
    }
  }
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
}

// The consumer's half of O, 16 rows at a time.
template <class S>
__device__ __forceinline__ void store_half(const DecodeParams& params, Shared<S>& shared, int consumer,
                                           const float (&unit)[GROUPS / CONSUMERS], int plan_row,
                                           const Values& values) {
  const Item item = load_item(params, plan_row);
  const Cta cta = now(shared);
#pragma unroll
  for (int first_row = 0; first_row < S::TILE_ROWS; first_row += STAGED_ROWS) {
    float o[HALF_TILES][STAGED_ROWS / 2];
    int place[STAGED_COLUMNS];  // Row::out of the thread's columns, < 0: no such row
#pragma unroll
    for (int i = 0; i < STAGED_COLUMNS; ++i) {
      const Row& row = shared.row[first_row + column_row(i)];
      place[i] = row.lse < 0 ? -1 : row.out;
      const float factor = shared.factor[first_row + column_row(i)];
      const int at = i / 2 * 4 + i % 2;
#pragma unroll
      for (int tile = 0; tile < HALF_TILES; ++tile) {
        o[tile][at] = values[tile][first_row / 2 + at] * (factor * unit[tile / GROUP_TILES]);
        o[tile][at + 2] = values[tile][first_row / 2 + at + 2] * (factor * unit[tile / GROUP_TILES]);
      }
    }
    if (item.is_whole) {
      store_whole<S>(params, shared, item, consumer, first_row, o);
    } else {
      store_part<S>(params, cta, item, consumer, place, o);
    }
  }
}

template <class S, class Params>
__device__ __forceinline__ void consumer_role(const Params& fp8, Shared<S>& shared, int consumer) {
  const DecodeParams& params = fp8.decode;
  uint32_t number = 0;  // of the next unit, among all of the CTA
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    int units_left, behind;  // tokens of the request behind the item's last unit; < 0: what that one lacks
    {
      const Cta cta = now(shared);
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      if (item.num_units > 0) take_queries<S>(fp8, shared, cta, item.request, consumer);
      units_left = item.num_units;
      behind = item.length - (item.first_unit + units_left) * BLOCK_N;
    }
    Values o;
    float sum[S::COLUMNS];
#pragma unroll
    for (int tile = 0; tile < HALF_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < O_ACCUMULATORS; ++i) o[tile][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) sum[i] = 0.f;
    for (; units_left > 0; --units_left, ++number) {
      consume<S>(shared, behind + units_left * BLOCK_N, consumer, number, o, sum);
    }
    float unit[GROUPS / CONSUMERS];
    finish_sums<S>(params, shared, consumer, plan_row, sum, unit);
    store_half<S>(params, shared, consumer, unit, plan_row, o);
    plan_row = load_item(params, plan_row).next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S, class Params>
__device__ __forceinline__ void decode(const Params& fp8) {
  decode_tile<S>(fp8, [&](Shared<S>& shared, int consumer) { consumer_role<S>(fp8, shared, consumer); });
}

#define DECODE_KERNEL(NAME, PARAMS, IS_SPARSE)                                         \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                         \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ PARAMS params) { \
    decode<Shape<IS_SPARSE>>(params);                                                  \
  }

DECODE_KERNEL(bf16_512_64, Fp8DecodeParams, false)
DECODE_KERNEL(sparse_bf16_512_64, GatherParams, true)
