// Decode attention over FP8 rows on Hopper for more than 32 query rows per latent head: tiles of 64 query rows, each by
// a CTA of its own. Rows land in shared memory as they are, and fp16 is written over them (fp8_fp16.cuh).
//
// Four warpgroups, two units of 64 tokens in shared memory (72 KiB each, as in bf16):
//   convert  looks rows up, in pages or by index, and makes fp16 of them where they lie
//   score    and two of value, as in four_roles.cuh; who of these has left its half of a slot asks for rows of the
//            next unit there
// Barriers beside those of four_roles.cuh, one phase per unit:
//   raw[slot][w]  value -> warp w of convert    its 16 rows have arrived as they are (of units 0 and 1: convert itself)
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock.
#include "four_roles.cuh"

struct Shared;

template <bool IS_SPARSE_>
struct Shape : FourRoles {
  static constexpr bool IS_SPARSE = IS_SPARSE_;  // rows are named by index
  static constexpr bool IS_FP8 = true;
  static constexpr bool IS_PAIR = false;
  static constexpr bool IS_BF16 = true;
  static constexpr bool IS_BF16_PRODUCT = false;
  using Memory = Shared;
  static constexpr int CTA_ROWS = WARP_ROWS;
  static constexpr int NOTED = 8;  // convert notes n + 5 while score may read n + 1; and a power of two
  static constexpr int SCORE_REGISTERS = 104;
  static constexpr int VALUE_REGISTERS = 160;
  static constexpr int BRING_REGISTERS = 88;

  static __device__ __forceinline__ int first_row(int warp) { return warp * CTA_ROWS; }
};

using Tile = Shape<false>;  // for what does not depend on how rows are found

struct alignas(1024) Shared {
  uint8_t ring[Tile::STAGES][TILES][TILE_BYTES];  // first: slot_address counts from the start
  uint8_t q[TILES][TILE_BYTES];
  alignas(16) TokenPair tokens[Tile::STAGES][BLOCK_N / 2];
  float inverse_sum[Tile::STAGES][BLOCK_M];  // of an item, beside its last unit
  uint64_t raw[Tile::STAGES][PRODUCER_WARPS];
  uint64_t q_full;
  uint64_t full[Tile::STAGES];
  uint64_t p_full[Tile::STAGES];
  uint8_t rise[Tile::STAGES][BLOCK_M];  // alpha = 2^-rise
  // Of unit u noted after u - 3 and before u - 2 is announced, read by who leaves u - 2, and last by score of u.
  Asked<Tile::CTA_ROWS> asked[Tile::NOTED][PRODUCER_WARPS];
  Walk walk[PRODUCER_WARPS];
  Cta cta;
};

// Where a row lies in a ring slot as it comes out of the pool: rows i and i + 8 of a warp in tile i, where rows 0 to 7
// and 8 to 15 of its 16 will lie as fp16. So half of a warp's rows are read, and then what they become is written over
// them.
__device__ __forceinline__ uint32_t raw_row(uint32_t tiles, uint32_t warp, uint32_t i) {
  return tiles + i % SET_ROWS * TILE_BYTES + (warp * WARP_ROWS + i / SET_ROWS * SET_ROWS) * 128;
}

// Asks for those of the noted rows of unit `number`, 16 of a warp's, that will lie in tiles of half `half` of the
// columns. One thread asks for all of them, with addresses that the compiler sees to be the warp's: it makes a loop of
// ~75 clocks per copy out of lanes that ask for one each.
__device__ __forceinline__ void load_rows(const uint8_t* pool, Shared& shared, int slot, uint32_t number, uint32_t warp,
                                          uint32_t half) {
  const auto& asked = shared.asked[number % Tile::NOTED][warp];
  if (!asked.is_unit) return;
  const uint32_t named = __shfl_sync(0xFFFFFFFF, asked.named, 0), lane = thread_index() & 31;
  const uint32_t mine = asked.offset[lane % WARP_ROWS];
  uint32_t offset[SET_ROWS], row[SET_ROWS];
#pragma unroll
  for (uint32_t i = 0; i < SET_ROWS; ++i) {
    row[i] = i / 4 * SET_ROWS + half * (SET_ROWS / 2) + i % 4;
    offset[i] = __shfl_sync(0xFFFFFFFF, mine, row[i]);
  }
  const uint32_t tiles = slot_address(slot);
  uint64_t& raw = shared.raw[slot][warp];
  if (elect_one()) {
    mbarrier_arrive_expect_tx(raw, __popc(named & (half == 0 ? 0x0F0F : 0xF0F0)) * ROW_BYTES);
#pragma unroll
    for (uint32_t i = 0; i < SET_ROWS; ++i) {
      if (named >> row[i] & 1) {
        bulk_load(raw_row(tiles, warp, row[i]), pool + (uint64_t)offset[i] * 16, ROW_BYTES, raw);
      }
    }
  }
  __syncwarp();
}

// Into shared memory of this CTA.
struct Stores {
  __device__ __forceinline__ void v4(uint32_t target, const uint4& value) const { st_shared_v4(target, value); }

  // By four lanes each.
  __device__ __forceinline__ void token(TokenPair (&tokens)[BLOCK_N / 2], uint32_t token, float ref,
                                        float log_ref) const {
    if (thread_index() % 4 != 0) return;
    TokenPair& pair = tokens[token / 2];
    pair.ref[token % 2] = ref;
    pair.log_ref[token % 2] = log_ref;
  }
};

// Rows 8 * HALF to 8 * HALF + 7 of a warp's 16, which `named` names, to fp16.
template <int HALF>
__device__ __forceinline__ void convert_rows(Shared& shared, int slot, uint32_t warp, uint32_t named) {
  const uint32_t lane = thread_index() & 31, tiles = shared_address(shared.ring[slot]);
  const uint32_t first = warp * WARP_ROWS + HALF * SET_ROWS;  // of the tile
  const uint32_t from = raw_row(tiles, warp, HALF * SET_ROWS);
  Raw raw = {1.f, {}, {}};
  if (named >> lane / 4 & 1) raw.scale = ld_shared(from + lane / 4 * TILE_BYTES + ROW_CODES + lane % 4 * 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t row = 4 * i + lane / 8;
    if (named >> row & 1) raw.k_rope[i] = ld_shared_v4(from + row * TILE_BYTES + K_ROPE_AT + lane % 8 * 16);
  }
#pragma unroll
  for (int i = 0; i < SET_ROWS; ++i) {
    if (named >> i & 1) {
      raw.codes[i][0] = ld_shared_v2(from + i * TILE_BYTES + lane * 8);
      raw.codes[i][1] = ld_shared_v2(from + i * TILE_BYTES + ROW_CODES / 2 + lane * 8);
    }
  }
  __syncwarp();  // all have read, and now it is written over
  convert_set<Tile>(shared, slot, first, raw, Stores());
}

template <class S>
__device__ __forceinline__ void convert_role(const GatherParams& gather, Shared& shared) {
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % PRODUCER_WARPS;
  Walk& walk = shared.walk[warp];
  walk = {item_with_units(gather.decode, shared.cta.plan_slot), 0};
  // The first units are asked for here, as long as slots are new; the others by who leaves a slot.
  Found first[Tile::STAGES + 1];
#pragma unroll
  for (int unit = 0; unit <= Tile::STAGES; ++unit) first[unit] = next_unit<S>(gather, shared.cta, walk, warp);
#pragma unroll
  for (int unit = 0; unit <= Tile::STAGES; ++unit) {
    note<S>(shared, unit, warp, rows_of<S>(gather, first[unit]));
    if (unit == Tile::STAGES) break;
    for (int half = 0; half < 2; ++half) load_rows(gather.pool, shared, unit, unit, warp, half);
  }
  Position<S> position;
  for (uint32_t number = 0; shared.asked[number % Tile::NOTED][warp].is_unit; ++number) {
    const int slot = position.slot();
    // Used in this turn of the loop: from one to the next it would be copied, and so waited for.
    const Found found = next_unit<S>(gather, shared.cta, walk, warp);
    mbarrier_wait(shared.raw[slot][warp], position.phase());
    const uint32_t named = shared.asked[number % Tile::NOTED][warp].named;
    convert_rows<0>(shared, slot, warp, named);
    convert_rows<1>(shared, slot, warp, named >> SET_ROWS);
    // wgmma reads through the async proxy what was stored here.
    fence_proxy_async();
    __syncwarp();
    if ((thread_index() & 31) == 0) mbarrier_arrive(shared.full[slot]);
    // Now, while nobody waits for this warp.
    note<S>(shared, number + Tile::STAGES + 1, warp, rows_of<S>(gather, found));
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
      for (int warp = 0; warp < PRODUCER_WARPS; ++warp) mbarrier_init(shared.raw[slot][warp], 2);
      mbarrier_init(shared.full[slot], PRODUCER_WARPS);
      mbarrier_init(shared.p_full[slot], 4);  // warps of the score warpgroup
    }
    fence_mbarrier_init();
    shared.cta = this_cta(params);
  }
  begin_launch(params, shared.cta, 1);
  const auto named_of = [&](int, uint32_t number) { return named_rows(shared.asked[number % Tile::NOTED]); };
  const auto leave = [&](int slot, uint32_t number, uint32_t warp, int half) {
    // All four warps have left this half of the unit's columns: rows of the next unit of this slot may come.
    bar_sync(BARRIER_VALUE + half, WARPGROUP);
    load_rows(gather.pool, shared, slot, number + Tile::STAGES, warp, half);
  };
  run_roles<S>(params, shared, named_of, leave, [&] { convert_role<S>(gather, shared); });
}

#define DECODE_KERNEL(NAME, PARAMS, IS_SPARSE)                                         \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                         \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ PARAMS params) { \
    decode<Shape<IS_SPARSE>>(params);                                                  \
  }

DECODE_KERNEL(bf16_512_64, GatherParams, false)
DECODE_KERNEL(sparse_bf16_512_64, GatherParams, true)
