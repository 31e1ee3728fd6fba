// Decode attention over FP8 rows on Hopper for latent heads with an even number of tiles of 64 query rows: two CTAs of
// a cluster have two tiles of the same tokens, and each makes fp16 (fp8_fp16.cuh) of half of a unit's rows, for both.
// So a CTA loads and converts half as much as one of dense_decode_fp8_wide.cu, and what it loads fits in registers:
// loads of a unit are under way while the one before is multiplied.
//
// Four warpgroups in each CTA, two units of 64 tokens in shared memory (72 KiB each, as in bf16):
//   convert  looks rows up, in pages or by index, loads them into registers a unit ahead, and stores fp16 in both CTAs
//   score    and two of value, as in four_roles.cuh
// Barriers beside those of four_roles.cuh, one phase per unit:
//   left[slot]  value, of both CTAs -> convert    the slot's unit has been read here and there
//   full[slot]  convert, of both CTAs -> score    by arrivals of this CTA's warps, and by bytes out of the other one
// docs/dense_decode.md has the argument why no wait can deadlock.
#include "four_roles.cuh"

struct Shared;

template <bool IS_SPARSE_>
struct Shape : FourRoles {
  static constexpr bool IS_SPARSE = IS_SPARSE_;  // rows are named by index
  static constexpr bool IS_FP8 = true;
  static constexpr bool IS_PAIR = true;
  static constexpr bool IS_BF16 = true;
  static constexpr bool IS_BF16_PRODUCT = false;
  using Memory = Shared;
  static constexpr int CTA_ROWS = SET_ROWS;
  static constexpr int NOTED = 2;  // n + 2 is noted over n, which has been stored
  static constexpr int SCORE_REGISTERS = 96;
  static constexpr int VALUE_REGISTERS = 160;
  static constexpr int BRING_REGISTERS = 96;

  // A warp of the CTA of rank r has set r of the two that lie where a warp's 16 rows do.
  static __device__ __forceinline__ int first_row(int warp) {
    return warp * WARP_ROWS + (int)cluster_rank() * SET_ROWS;
  }
};

using Tile = Shape<false>;  // for what does not depend on how rows are found

constexpr int SETS = BLOCK_N / SET_ROWS;

struct alignas(1024) Shared {
  uint8_t ring[Tile::STAGES][TILES][TILE_BYTES];  // first: slot_address counts from the start
  uint8_t q[TILES][TILE_BYTES];
  alignas(16) TokenPair tokens[Tile::STAGES][BLOCK_N / 2];
  alignas(16) uint32_t named[Tile::STAGES][SETS];  // a bit per row
  float inverse_sum[Tile::STAGES][BLOCK_M];        // of an item, beside its last unit
  uint64_t left[Tile::STAGES];
  uint64_t q_full;
  uint64_t full[Tile::STAGES];
  uint64_t p_full[Tile::STAGES];
  uint8_t rise[Tile::STAGES][BLOCK_M];  // alpha = 2^-rise
  Asked<Tile::CTA_ROWS> asked[Tile::NOTED][PRODUCER_WARPS];
  Walk walk[PRODUCER_WARPS];
  Cta cta;
};

// What a warp of the other CTA stores here of a unit: rows, their TokenPairs, and which are named.
constexpr int PAIR_BYTES = SET_ROWS * (2 * ROW_CODES + 2 * TILE_COLUMNS) + SET_ROWS / 2 * sizeof(TokenPair) + 4;

// Into shared memory of this CTA, and to the same place in that of the other one, where the barrier counts bytes.
struct Stores {
  uint32_t distance;  // from an address here to the same there
  uint32_t barrier;   // there

  __device__ __forceinline__ void v4(uint32_t target, const uint4& value) const {
    st_shared_v4(target, value);
    st_async_v4(target + distance, value, barrier);
  }
  __device__ __forceinline__ void b32(uint32_t target, uint32_t value) const {
    st_shared(target, value);
    st_async(target + distance, value, barrier);
  }

  // By four lanes each; neighbours are stored together.
  __device__ __forceinline__ void token(const TokenPair (&tokens)[BLOCK_N / 2], uint32_t token, float ref,
                                        float log_ref) const {
    const int next_ref = __shfl_xor_sync(0xFFFFFFFF, __float_as_int(ref), 4);
    const int next_log_ref = __shfl_xor_sync(0xFFFFFFFF, __float_as_int(log_ref), 4);
    if (thread_index() % 8 != 0) return;
    v4(shared_address(&tokens[token / 2]),
       make_uint4(__float_as_int(ref), next_ref, __float_as_int(log_ref), next_log_ref));
  }
};

// Asks for a warp's noted rows, into registers: in parts of 8 to 16 bytes per lane, as convert_set takes them.
__device__ __forceinline__ void load_rows(const uint8_t* pool, const Asked<SET_ROWS>& asked, Raw& raw) {
  const uint32_t lane = thread_index() & 31, named = asked.named;
  const auto row = [&](uint32_t i) { return pool + (uint64_t)asked.offset[i] * 16; };
  raw.scale = __int_as_float(ld_global_or_zero(row(lane / 4) + ROW_CODES + lane % 4 * 4, named >> lane / 4 & 1));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = 4 * i + lane / 8;
    raw.k_rope[i] = ld_global_or_zero_v4(row(at) + K_ROPE_AT + lane % 8 * 16, named >> at & 1);
  }
#pragma unroll
  for (int i = 0; i < SET_ROWS; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw.codes[i][half] = ld_global_or_zero_v2(row(i) + half * (ROW_CODES / 2) + lane * 8, named >> i & 1);
    }
  }
}

template <class S>
__device__ __forceinline__ void convert_role(const GatherParams& gather, Shared& shared) {
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS;
  Walk& walk = shared.walk[warp];
  walk = {item_with_units(gather.decode, shared.cta.plan_slot), 0};
  Found found[2];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) found[unit] = next_unit<S>(gather, shared.cta, walk, warp);
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) note<S>(shared, unit, warp, rows_of<S>(gather, found[unit]));
  Raw raw;
  load_rows(gather.pool, shared.asked[0][warp], raw);
  Position<S> position;
#pragma unroll 1
  for (uint32_t number = 0; shared.asked[number % S::NOTED][warp].is_unit; ++number) {
    const int slot = position.slot();
    // Used in this turn of the loop: from one to the next it would be copied, and so waited for.
    const Found next = next_unit<S>(gather, shared.cta, walk, warp);
    mbarrier_wait(shared.left[slot], position.phase() ^ 1);  // at once, of a slot's first unit
    const uint32_t full = shared_address(&shared.full[slot]), full_there = map_shared(full, cluster_rank() ^ 1);
    const Stores stores = {full_there - full, full_there};
    const int first = S::first_row(warp);
    if ((thread_index() & 31) == 0) {
      stores.b32(shared_address(&shared.named[slot][first / SET_ROWS]), shared.asked[number % S::NOTED][warp].named);
    }
    convert_set<S>(shared, slot, first, raw, stores);
    // wgmma reads through the async proxy what was stored here.
    fence_proxy_async();
    __syncwarp();
    if ((thread_index() & 31) == 0) mbarrier_arrive_expect_tx(shared.full[slot], PAIR_BYTES);
    // Now, while nobody waits for this warp.
    load_rows(gather.pool, shared.asked[(number + 1) % S::NOTED][warp], raw);
    note<S>(shared, number + 2, warp, rows_of<S>(gather, next));
    position.advance();
  }
  // The last arrivals out of the other CTA: they must not meet shared memory that is no longer this one's. Its stores
  // have all been waited for, by score.
  for (int slot = 0; slot < S::STAGES; ++slot) {
    mbarrier_wait(shared.left[position.slot()], position.phase() ^ 1);
    position.advance();
  }
}

template <class S>
__device__ __forceinline__ void decode(const GatherParams& gather) {
  const DecodeParams& params = gather.decode;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) {
    mbarrier_init(shared.q_full, 1);
    for (int slot = 0; slot < Tile::STAGES; ++slot) {
      mbarrier_init(shared.left[slot], 2 * 2 * 4);  // warps of values, of both CTAs
      mbarrier_init(shared.full[slot], PRODUCER_WARPS);
      mbarrier_init(shared.p_full[slot], 4);  // warps of the score warpgroup
    }
    fence_mbarrier_init();
    shared.cta = this_cta(params);
  }
  cluster_arrive();
  begin_launch(params, shared.cta, 1);
  // The other CTA's barriers are what they should be; and L1, which this empties, has nothing of before the launches
  // ahead, which write rows.
  cluster_wait();
  const auto named_of = [&](int slot, uint32_t) {
    uint64_t named = 0;
#pragma unroll
    for (int set = 0; set < SETS; ++set) named |= (uint64_t)shared.named[slot][set] << set * SET_ROWS;
    return named;
  };
  const auto leave = [&](int slot, uint32_t, uint32_t, int) {
    __syncwarp();
    if (elect_one()) {
      mbarrier_arrive(shared.left[slot]);
      mbarrier_arrive_cluster(map_shared(shared_address(&shared.left[slot]), cluster_rank() ^ 1));
    }
    __syncwarp();
  };
  run_roles<S>(params, shared, named_of, leave, [&] { convert_role<S>(gather, shared); });
}

#define DECODE_KERNEL(NAME, PARAMS, IS_SPARSE)                                           \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(NUM_THREADS, 1) \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ PARAMS params) {   \
    decode<Shape<IS_SPARSE>>(params);                                                    \
  }

DECODE_KERNEL(pair_bf16_512_64, GatherParams, false)
DECODE_KERNEL(sparse_pair_bf16_512_64, GatherParams, true)
