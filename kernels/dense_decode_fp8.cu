// Decode attention over FP8 rows on Hopper for up to 32 query rows per latent head: fp8_rows.cuh's arithmetic in
// dense_decode_few.cu's form.
//
// Two consumer warpgroups take an item's units by turns, each with its own O, maximum and sums, and add both up at the
// item's end; they also load Q, a few rows per warp, at its beginning. The third warpgroup loads units: by TMA, one
// thread; rows named by index one by one, a lane each. Barriers:
//   full[consumer][slot]      unit -> its consumer
//   empty[slot]               the unit's consumer -> producers
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock.
#include "fp8_rows.cuh"

template <class S>
struct Shared;

template <int ROWS, int STAGES_, bool IS_SPARSE_>
struct Shape : Codes<ROWS> {
  using Memory = Shared<Shape>;
  using Unit = typename UnitOf<IS_SPARSE_>::Type;
  static constexpr int TILE_ROWS = ROWS;
  static constexpr int STAGES = STAGES_;  // units
  static constexpr bool IS_SPARSE = IS_SPARSE_;
  static constexpr int FULL_ARRIVALS = IS_SPARSE ? PRODUCER_WARPS : 1;  // of warps that copy rows; of who loads pages
  static constexpr int EMPTY_ARRIVALS = WARPGROUP / 32;
  // Out of pages: groups whose sums of products are under way at once, as many as there are registers for.
  static constexpr int S_PARTS = ROWS == 16 ? GROUPS : 2;
  static constexpr int V_PARTS = ROWS == 16 ? 3 : 2;                // products of values under way at once
  static constexpr int CONSUMER_REGISTERS = IS_SPARSE ? 240 : 232;  // a thread that loads pages needs more than 24
  static_assert(STAGES > CONSUMERS);
  static __device__ __forceinline__ uint8_t* q(Memory& shared, int) { return shared.q[0]; }
  static __device__ __forceinline__ uint8_t* q_rope(Memory& shared, int) { return shared.q_rope; }
  // P of the first groups is a consumer's own, that of the others, out of pages, lies over its unit's rotated keys.
  static constexpr int OWN_P = IS_SPARSE ? GROUPS : GROUPS - TILE_BYTES / Codes<ROWS>::P_TILE_BYTES;
  static __device__ __forceinline__ uint8_t* p(Memory& shared, int slot, int consumer, int group) {
    if constexpr (!IS_SPARSE) {
      if (group >= OWN_P) return shared.ring[slot].k_rope + (group - OWN_P) * Codes<ROWS>::P_TILE_BYTES;
    }
    return shared.p[consumer] + group * Codes<ROWS>::P_TILE_BYTES;
  }
  static __device__ __forceinline__ Exchange& exchange(Memory& shared, int consumer) {
    return shared.exchange[consumer];
  }
  static __device__ __forceinline__ void init_others(Memory& shared) {
    // Of a first item without units, which loads no Q.
    shared.inverse[0] = shared.inverse[1] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
};

template <class S>
struct alignas(1024) Shared {
  typename S::Unit ring[S::STAGES];  // first: unit_address counts from the start
  union alignas(1024) {
    struct {
      uint8_t q[GROUPS][S::Q_TILE_BYTES];  // 128-byte swizzle
      uint8_t q_rope[S::Q_ROPE_BYTES];
    };
    Exchange exchange[CONSUMERS];  // at an item's end
  };
  // P times a group's scales; 64-byte swizzle. (No array is empty.)
  alignas(1024) uint8_t p[CONSUMERS][S::OWN_P == 0 ? 1 : S::OWN_P * S::P_TILE_BYTES];
  float4 top[CONSUMERS][S::ROWS];               // maxima of a unit, of each warp's tokens
  float4 sum[CONSUMERS][S::ROWS];               // of an item
  float4 top_scale[CONSUMERS][WARPGROUP / 32];  // of each warp's tokens, by group
  float reference[CONSUMERS][S::ROWS];
  float factor[CONSUMERS][S::ROWS];  // by which an item's O is multiplied
  // softmax_scale_log2 times what the row of Q was divided by; the reference of its maxima (log2).
  float2 from[CONSUMERS][S::ROWS];
  // P_UNITS over the units that scales and O count in, by group: powers of two; or 0, before an item's first.
  float4 inverse[CONSUMERS];
  Row row[S::ROWS];
  alignas(8) uint16_t named[S::STAGES][PRODUCER_WARPS];  // sparse: a bit per token, whether there is such a row
  uint64_t full[CONSUMERS][S::STAGES];                   // by consumer, as in dense_decode_few.cu
  uint64_t empty[S::STAGES];
  Cta cta;
};

// --- a unit ---------------------------------------------------------------------------------------------------------

// Counts references and the units of scales anew, so that neither is exceeded; what was added up so far, too.
template <class S>
__device__ __forceinline__ void rescale(Shared<S>& shared, int consumer, bool is_first, float (&s)[S::ROWS / 2],
                                        const float (&scales)[2][GROUPS], float (&inverse)[GROUPS], Result<S>& result) {
  const bool is_writer = thread_index() % WARPGROUP < 4;  // of what all threads know
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
    if (is_writer) shared.from[consumer][column_row(i)].y += rise;
    const float alpha = is_first ? 1.f : ex2(-rise);
    const int at = i / 2 * 4 + i % 2;
    result.sum[i] *= alpha;
    s[at] -= rise;
    s[at + 2] -= rise;
#pragma unroll
    for (int tile = 0; tile < V_TILES; ++tile) {
      result.o[tile][at] *= alpha * unit[tile / GROUP_TILES];
      result.o[tile][at + 2] *= alpha * unit[tile / GROUP_TILES];
    }
  }
}

// P of a unit's scores, and its sums; O and the sums are multiplied where a score or a scale rises far above what they
// count in.
template <class S>
__device__ __forceinline__ void probabilities(Shared<S>& shared, int slot, int consumer, float (&s)[S::ROWS / 2],
                                              const float (&scales)[2][GROUPS], Result<S>& result) {
  const float4 all = shared.inverse[consumer];
  float inverse[GROUPS] = {all.x, all.y, all.z, all.w};
  const bool is_first = all.x == 0.f;
  const bool is_above = is_first || exceeds<S>(s, scales, inverse);
  // Also: all warps have finished the wgmmas that read the P before, and this unit's rotated keys, over which P of the
  // last groups is stored.
  if (bar_red_or(BARRIER_CONSUMER + consumer, WARPGROUP, is_above)) {
    rescale<S>(shared, consumer, is_first, s, scales, inverse, result);
  }
  store_p<S>(shared, slot, consumer, s, scales, inverse, result.sum);
  // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence the
  // tensor core may read stale bytes: wrong numbers, no error.
  fence_proxy_async();
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
}

// Adds a unit's values times P to O.
template <class S>
__device__ __forceinline__ void add_values(Shared<S>& shared, int slot, int consumer, Result<S>& result) {
  const auto p_of = [&](int group) {
    return matrix_descriptor(shared_address(S::p(shared, slot, consumer, group)), 0, 512, Swizzle::B64);
  };
  add_parts<S>(unit_address(slot), p_of, result.o);
}

// One unit: S^T, P^T and O^T; `stored` tokens of the request from its first one on.
template <class S>
__device__ __forceinline__ void consume(Shared<S>& shared, int stored, int consumer, uint32_t number,
                                        Result<S>& result) {
  // Uniform to the compiler too, so that descriptors are in uniform registers.
  const int slot = __shfl_sync(0xFFFFFFFF, number % S::STAGES, 0);
  // A consumer has every second unit: it comes to a slot again after this many.
  constexpr int ROUND = S::STAGES % CONSUMERS == 0 ? S::STAGES : CONSUMERS * S::STAGES;
  mbarrier_wait(shared.full[consumer][slot], number / ROUND & 1);
  const Tokens<S> tokens(shared, slot, stored);
  if (!tokens.is_nothing) {
    float s[S::ROWS / 2], scales[2][GROUPS];
    score<S>(shared, slot, consumer, s);
    tokens.load_scales(shared.ring[slot], scales);
    if constexpr (!S::IS_SPARSE) {
      if (stored < BLOCK_N) {
        bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);  // all warps have finished S^T, which reads these rows
        clear_rows<GROUPS>(shared.ring[slot], 0, stored);
      }
    }
    count_scores<S>(shared, consumer, stored, tokens, s);
    probabilities<S>(shared, slot, consumer, s, scales, result);
    add_values<S>(shared, slot, consumer, result);
  }
  __syncwarp();
  if (thread_index() % 32 == 0) mbarrier_arrive(shared.empty[slot]);
}

// --- an item ---------------------------------------------------------------------------------------------------------

template <class S, class Params>
__device__ __forceinline__ void consumer_role(const Params& fp8, Shared<S>& shared, int consumer) {
  const DecodeParams& params = fp8.decode;
  uint32_t number = 0;  // of the next unit, among all of the CTA
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    int units_left, stored;  // tokens of the request from the next unit's first one on
    {
      const Cta cta = now(shared);
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      if (item.num_units > 0) take_queries<S>(fp8, shared, cta, item.request, consumer);
      units_left = item.num_units;
      stored = item.length - item.first_unit * BLOCK_N;
    }
    Result<S> result;
#pragma unroll
    for (int tile = 0; tile < V_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) result.sum[i] = 0.f;
    for (; units_left > 0; --units_left, ++number, stored -= BLOCK_N) {
      if (number % CONSUMERS != consumer) continue;
      consume<S>(shared, stored, consumer, number, result);
    }
    const float4 all = shared.inverse[consumer];
    const float inverse[GROUPS] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int tile = 0; tile < V_TILES; ++tile) {
      const float unit = unit_of(inverse[tile / GROUP_TILES]);
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] *= unit;
    }
    const Item item = load_item(params, plan_row);  // again: registers
    const Cta cta = now(shared);
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) result.reference[i] = shared.from[consumer][column_row(i)].y;
    merge_sums<S>(params, shared, cta, item, consumer, result);
    store_result<S>(params, shared, cta, item, consumer, result);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S, class Params>
__device__ __forceinline__ void decode(const Params& fp8) {
  decode_tile<S>(fp8, [&](Shared<S>& shared, int consumer) { consumer_role<S>(fp8, shared, consumer); });
}

#define DECODE_KERNEL(NAME, PARAMS, ROWS, STAGES, IS_SPARSE)                           \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                         \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ PARAMS params) { \
    decode<Shape<ROWS, STAGES, IS_SPARSE>>(params);                                    \
  }

DECODE_KERNEL(few16_bf16_512_64, Fp8DecodeParams, 16, 4, false)
DECODE_KERNEL(few32_bf16_512_64, Fp8DecodeParams, 32, 4, false)
DECODE_KERNEL(sparse_few16_bf16_512_64, GatherParams, 16, 4, true)
DECODE_KERNEL(sparse_few32_bf16_512_64, GatherParams, 32, 3, true)
