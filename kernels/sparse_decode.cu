// Sparse decode attention on Hopper over rows of bf16 or fp16 that each query names by index, any number of heads:
// tiles of 64 query rows (four_roles.cuh), whose rows are copied one by one in chunks of 16 bytes.
//
// Barriers beside those of four_roles.cuh, one phase per unit:
//   left[slot]  value -> bring    the slot's unit has been read
// docs/dense_decode.md has the argument why no wait can deadlock.
#include "four_roles.cuh"

struct Shared;

template <bool IS_BF16_>
struct Shape : FourRoles {
  static constexpr bool IS_SPARSE = true;
  static constexpr bool IS_FP8 = false;
  static constexpr bool IS_PAIR = false;
  static constexpr bool IS_BF16 = IS_BF16_;
  static constexpr bool IS_BF16_PRODUCT = IS_BF16_;
  using Memory = Shared;
  static constexpr int CTA_ROWS = WARP_ROWS;
  static constexpr int NOTED = 4;  // n + 3 may be noted while score reads n; and a power of two
  static constexpr int SCORE_REGISTERS = 104;
  static constexpr int VALUE_REGISTERS = 160;
  static constexpr int BRING_REGISTERS = 88;

  static __device__ __forceinline__ int first_row(int warp) { return warp * CTA_ROWS; }
};

using Tile = Shape<true>;  // for what does not depend on the dtype

struct alignas(1024) Shared {
  uint8_t ring[Tile::STAGES][TILES][TILE_BYTES];  // first: slot_address counts from the start
  uint8_t q[TILES][TILE_BYTES];
  float inverse_sum[Tile::STAGES][BLOCK_M];  // of an item, beside its last unit
  uint64_t left[Tile::STAGES];
  uint64_t q_full;
  uint64_t full[Tile::STAGES];
  uint64_t p_full[Tile::STAGES];
  uint8_t rise[Tile::STAGES][BLOCK_M];  // alpha = 2^-rise
  Asked<Tile::CTA_ROWS> asked[Tile::NOTED][PRODUCER_WARPS];
  Walk walk[PRODUCER_WARPS];
  Cta cta;
};

constexpr int ROWS_AT_ONCE = 4;  // of a warp, of which eight lanes copy 128 bytes each
constexpr int TURNS = WARP_ROWS / ROWS_AT_ONCE;

// What a lane copies of a unit: 16 bytes of each tile of a row in each turn; nothing where no row is named.
struct Chunks {
  const uint8_t* from[TURNS];
  uint32_t bytes[TURNS];  // 16, or 0
};

__device__ __forceinline__ Chunks chunks_of(const uint8_t* pool, const Asked<WARP_ROWS>& asked) {
  const uint32_t lane = thread_index() & 31, named = asked.named;
  Chunks chunks;
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const uint32_t row = turn * ROWS_AT_ONCE + lane / 8, is_named = named >> row & 1;
    chunks.from[turn] = pool + (is_named ? (uint64_t)asked.offset[row] * 16 : 0) + lane % 8 * 16;
    chunks.bytes[turn] = is_named * 16;
  }
  return chunks;
}

// To the tiles of a slot; zeros where no row is named.
__device__ __forceinline__ void copy_rows(const Chunks& chunks, uint32_t tiles, int warp) {
  const uint32_t lane = thread_index() & 31;
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const uint32_t target = tiles + chunk_offset(warp * WARP_ROWS + turn * ROWS_AT_ONCE + lane / 8, lane % 8);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      cp_async_16(target + tile * TILE_BYTES, chunks.from[turn] + tile * (2 * TILE_COLUMNS), chunks.bytes[turn]);
    }
  }
}

template <class S>
__device__ __forceinline__ void bring_role(const GatherParams& gather, Shared& shared) {
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS;
  Walk& walk = shared.walk[warp];
  walk = {item_with_units(gather.decode, shared.cta.plan_slot), 0};
  Found found[2];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) found[unit] = next_unit<S>(gather, shared.cta, walk, warp);
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) note<S>(shared, unit, warp, rows_of<S>(gather, found[unit]));
  Position<S> position;
  for (uint32_t number = 0; shared.asked[number % S::NOTED][warp].is_unit; ++number) {
    const int slot = position.slot();
    // Before the wait: behind it the slot's users wait for every load from shared memory.
    const Chunks chunks = chunks_of(gather.pool, shared.asked[number % S::NOTED][warp]);
    mbarrier_wait(shared.left[slot], position.phase() ^ 1);  // at once, of a slot's first unit
    copy_rows(chunks, shared_address(shared.ring[slot]), warp);
    // Behind the copies, which nothing of it then holds up. Used in this turn of the loop: from one to the next it
    // would be copied, and so waited for.
    const Found next = next_unit<S>(gather, shared.cta, walk, warp);
    cp_async_wait_all();
    // wgmma reads through the async proxy what was stored here.
    fence_proxy_async();
    __syncwarp();
    if ((thread_index() & 31) == 0) mbarrier_arrive(shared.full[slot]);
    note<S>(shared, number + 2, warp, rows_of<S>(gather, next));
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
      mbarrier_init(shared.left[slot], 2 * 4);  // warps of values
      mbarrier_init(shared.full[slot], PRODUCER_WARPS);
      mbarrier_init(shared.p_full[slot], 4);  // warps of the score warpgroup
    }
    fence_mbarrier_init();
    shared.cta = this_cta(params);
  }
  begin_launch(params, shared.cta, 1);
  const auto named_of = [&](int, uint32_t number) { return named_rows(shared.asked[number % S::NOTED]); };
  const auto leave = [&](int slot, uint32_t, uint32_t, int) {
    __syncwarp();
    if (elect_one()) mbarrier_arrive(shared.left[slot]);
    __syncwarp();
  };
  run_roles<S>(params, shared, named_of, leave, [&] { bring_role<S>(gather, shared); });
}

#define DECODE_KERNEL(NAME, PARAMS, IS_BF16)                                              \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                            \
      flash_fwd_splitkv_mla_sparse_kernel_##NAME(const __grid_constant__ PARAMS params) { \
    decode<Shape<IS_BF16>>(params);                                                       \
  }

DECODE_KERNEL(bf16_512_64, GatherParams, true)
DECODE_KERNEL(fp16_512_64, GatherParams, false)
