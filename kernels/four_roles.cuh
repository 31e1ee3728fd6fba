// Tiles of 64 query rows in four warpgroups, where rows are fetched one by one. Three roles are here, for a kernel that
// has the fourth, of who brings rows:
//   bring    a unit's rows into a ring slot; there are two, of 64 tokens (72 KiB each); of FP8 rows called convert
//   score    makes fp16 of Q for FP8 rows (fp8_fp16.cuh), computes S and P; P(j) overwrites unit j's rotated keys
//   value    two of them: half of O's columns each
// Barriers, one phase per unit, or per item for Q:
//   full[slot]    bring -> score       the unit is there
//   p_full[slot]  score -> value       P is stored
//   q_full        score -> score       Q has arrived as it is
//
// A shape S is a FourRoles and says whether rows are FP8 (IS_FP8) and another CTA stores here too (IS_PAIR), what
// queries, results and rotated keys are (IS_BF16) and what latents and P (IS_BF16_PRODUCT), what registers the roles
// have (SCORE_REGISTERS, VALUE_REGISTERS, BRING_REGISTERS), and what is in shared memory: Memory begins with the ring,
// `q` behind it, and has `inverse_sum`, `rise`, `cta`, the barriers above and, for FP8 rows, `tokens`.
#pragma once

#include "fp8_fp16.cuh"
#include "gather.cuh"

constexpr int NUM_THREADS = 4 * WARPGROUP;
// 65,536 registers / 512 threads = 128 at launch: 512 per lane over the four warpgroups.
constexpr int REGISTERS = 512;

struct FourRoles {
  static constexpr int KV_LORA_RANK = 512;
  static constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;  // of O, per value warpgroup
  static constexpr int STAGES = 2;
  static constexpr int TILE_ROWS = BLOCK_M;
};

constexpr int V_TILES = FourRoles::KV_LORA_RANK / TILE_COLUMNS;
constexpr int TILES = V_TILES + 1;                            // the last holds the rotated columns
static_assert(CODE_TILES == V_TILES && SET_ROWS == V_TILES);  // FP8 rows as fp16 have their place in tiles

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Of ring slot `slot`, or Q behind the last one: made anew of the symbol each time, as in dense_decode.cu.
__device__ __forceinline__ uint32_t slot_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * (TILES * TILE_BYTES);
}

// --- score ----------------------------------------------------------------------------------------------------------

// Asks for an item's Q, by one thread, as soon as nobody reads the one before.
template <class Memory>
__device__ __forceinline__ void load_queries(const DecodeParams& params, Memory& shared, int request) {
  const Cta cta = shared.cta;
  mbarrier_arrive_expect_tx(shared.q_full, TILES * TILE_BYTES);
  tma_load_5d(shared.q, params.q_map, shared.q_full, 0, cta.first_row, 0, cta.kv_head, request);
}

// S of a unit; of FP8 rows over ref and over what Q was divided by.
template <class S>
__device__ __forceinline__ void score_unit(int slot, float (&s)[32]) {
  const uint64_t keys = matrix_descriptor(slot_address(slot), 0, 1024, Swizzle::B128);
  const uint64_t queries = matrix_descriptor(slot_address(S::STAGES), 0, 1024, Swizzle::B128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int at = V_TILES * TILE_BYTES + step * 32;
    wgmma_m64n64k16_shared<S::IS_BF16>(s, advance(queries, at), advance(keys, at), step > 0);
  }
#pragma unroll
  for (int step = 0; step < 4 * V_TILES; ++step) {
    const int at = step / 4 * TILE_BYTES + step % 4 * 32;
    wgmma_m64n64k16_shared<S::IS_BF16_PRODUCT>(s, advance(queries, at), advance(keys, at), true);
  }
  wgmma_commit_group();
}

// Scores of tokens that a row does not see, or that are not named, are none; `stored` tokens of the request from the
// unit's first one on.
__device__ __forceinline__ void hide(const DecodeParams& params, const Cta& tile, uint64_t named, int stored,
                                     float (&s)[32]) {
  const int row = tile.first_row + accumulator_row();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int visible = visible_tokens(params, stored, row + 8 * half);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = (i >> 1) * 8 + thread_index() % 4 * 2 + (i & 1);
      float& score = s[(i >> 1) * 4 + half * 2 + (i & 1)];
      score = column < visible && (named >> column & 1) ? score : -infinity();
    }
  }
}

// `named_of`: which tokens of the unit in a slot, of this number among all of the CTA, are named, a bit each.
template <class S, class NamedOf>
__device__ __forceinline__ void score_role(const DecodeParams& params, typename S::Memory& shared,
                                           const NamedOf& named_of) {
  Position<S> position;
  uint32_t q_phase = 0, number = 0;  // of the next unit, among all of the CTA
  if (thread_index() == 0) {
    const Item item = item_with_units(params, shared.cta.plan_slot);
    if (item.request >= 0) load_queries(params, shared, item.request);
  }
  __syncwarp();
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    float reference[2] = {0.f, 0.f};  // of the maxima, log2; rises by whole numbers, so that alpha is exact
    float sum[2] = {0.f, 0.f};        // of this thread's columns
    float factor[2];                  // of FP8 rows, by the thread's rows: S comes divided by it
    int units_left, stored;           // tokens of the request from the current unit on
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
      stored = item.length - item.first_unit * BLOCK_N;
    }
    if (units_left > 0) {
      mbarrier_wait(shared.q_full, q_phase);
      q_phase ^= 1;
      if constexpr (S::IS_FP8) take_queries(params.softmax_scale_log2, shared, factor);
    }
    bool is_first = true;
    for (; units_left > 0; --units_left) {
      const int slot = position.slot();
      float s[32];
      mbarrier_wait(shared.full[slot], position.phase());
      if constexpr (S::IS_PAIR) fence_proxy_async();  // between the other CTA's stores and wgmma
      score_unit<S>(slot, s);
      // What the scores will be put together with comes while they are multiplied.
      TokenPair pairs[S::IS_FP8 ? BLOCK_N / 8 : 1];
      if constexpr (S::IS_FP8) {
#pragma unroll
        for (int n8 = 0; n8 < BLOCK_N / 8; ++n8) pairs[n8] = shared.tokens[slot][4 * n8 + thread_index() % 4];
      }
      const uint64_t named = named_of(slot, number);
      ++number;
      position.advance();
      wgmma_wait_group<0>();

      const int lane = thread_index() % 32;
#pragma unroll
      for (int n8 = 0; n8 < 8; ++n8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = s[4 * n8 + i];
          if constexpr (S::IS_FP8) {
            const TokenPair& pair = pairs[n8];
            score = __fmaf_rn(score, pair.ref[i & 1] * factor[i >> 1], pair.log_ref[i & 1] - reference[i >> 1]);
          } else {
            score = __fmaf_rn(score, params.softmax_scale_log2, -reference[i >> 1]);
          }
        }
      }
      if (named != ~0ull || visible_tokens(params, stored, shared.cta.first_row) < BLOCK_N) {
        hide(params, shared.cta, named, stored, s);
      }
      stored -= BLOCK_N;
      const uint32_t rises = raise<S::IS_FP8 ? P_HEADROOM : 0>(s, is_first, reference, sum);
      is_first = is_first && named == 0;
#pragma unroll
      for (int n8 = 0; n8 < 8; ++n8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& p = s[4 * n8 + i];
          p = ex2(p);
          if constexpr (S::IS_FP8) {
            // Times one over ref, a power of two.
            const float inverse = __int_as_float(0x7F000000 - __float_as_int(pairs[n8].ref[i & 1]));
            sum[i >> 1] = __fmaf_rn(p, inverse, sum[i >> 1]);
          } else {
            sum[i >> 1] += p;
          }
        }
      }

      // All warps have finished S(j), which reads the rotated keys that P overwrites.
      bar_sync(BARRIER_SCORE, WARPGROUP);
      // And with an item's last one they have left Q.
      if (units_left == 1 && thread_index() == 0) {
        const Item next = item_with_units(params, load_item(params, plan_row).next);
        if (next.request >= 0) load_queries(params, shared, next.request);
      }
      __syncwarp();
      store_p<S::IS_BF16_PRODUCT>(shared.ring[slot][V_TILES], s);
      const int sum_row = accumulator_row();
      if (lane % 4 == 0) {
        shared.rise[slot][sum_row] = rises;
        shared.rise[slot][sum_row + 8] = rises >> 8;
      }
      if (units_left == 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 1);
          sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 2);
          // Not `> 0`: NaN stays NaN.
          if (lane % 4 == 0) shared.inverse_sum[slot][sum_row + 8 * half] = sum[half] == 0.f ? 0.f : 1.f / sum[half];
        }
      }
      // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence the
      // tensor core may read stale bytes: wrong numbers, no error.
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.p_full[slot]);
    }
    const Item item = load_item(params, plan_row);
    store_log_sums(params, item, shared.cta, reference, sum);
    plan_row = item.next;
  }
}

// --- value ----------------------------------------------------------------------------------------------------------

// `leave`: what a warp does when it has read its half of the columns of a slot's unit, the `number`th of the CTA.
template <class S, int HALF, class Leave>
__device__ __forceinline__ void value_role(const DecodeParams& params, typename S::Memory& shared, const Leave& leave) {
  const uint32_t warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % 4;
  uint32_t number = 0;  // of the next unit, among all of the CTA
  Position<S> position;
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    int units_left;
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
    }
    float o[S::HALF_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < S::HALF_COLUMNS / 2; ++i) o[i] = 0.f;
    float scale[2] = {0.f, 0.f};
    for (; units_left > 0; --units_left) {
      const int slot = position.slot();
      // What another CTA stored wgmma may read as well: score's fences stand between that and this barrier.
      mbarrier_wait(shared.p_full[slot], position.phase());
      lower<S>(shared.rise[slot], o);
      const uint32_t tiles = slot_address(slot);
      const uint64_t p = matrix_descriptor(tiles + V_TILES * TILE_BYTES, 0, 1024, Swizzle::B128);
      const uint64_t v = matrix_descriptor(tiles + HALF * V_TILES / 2 * TILE_BYTES, TILE_BYTES, 1024, Swizzle::B128);
      float (&left)[S::HALF_COLUMNS / 4] = reinterpret_cast<float (&)[S::HALF_COLUMNS / 4]>(o[0]);
      float (&right)[S::HALF_COLUMNS / 4] = reinterpret_cast<float (&)[S::HALF_COLUMNS / 4]>(o[S::HALF_COLUMNS / 4]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < BLOCK_N / 16; ++step) {
        wgmma_m64k16_transposed<S::IS_BF16_PRODUCT>(left, advance(p, step * 32), advance(v, step * 2048), true);
        wgmma_m64k16_transposed<S::IS_BF16_PRODUCT>(right, advance(p, step * 32),
                                                    advance(v, 2 * TILE_BYTES + step * 2048), true);
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
      if (units_left == 1) {
        const int row = accumulator_row();
        scale[0] = shared.inverse_sum[slot][row];
        scale[1] = shared.inverse_sum[slot][row + 8];
      }
      leave(slot, number, warp, HALF);
      ++number;
      position.advance();
    }
    const Item item = load_item(params, plan_row);
    store_row<S, 0>(params, shared.cta, item, HALF, o, scale[0]);
    store_row<S, 1>(params, shared.cta, item, HALF, o, scale[1]);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Cta this_cta(const DecodeParams& params) {
  const int tile = blockIdx.x % params.tiles;
  return {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * BLOCK_M};
}

// The role of each warpgroup; the last one's is `bring`, and for the others see score_role and value_role.
template <class S, class NamedOf, class Leave, class Bring>
__device__ __forceinline__ void run_roles(const DecodeParams& params, typename S::Memory& shared,
                                          const NamedOf& named_of, const Leave& leave, const Bring& bring) {
  static_assert(sizeof(typename S::Memory) <= SHARED_LIMIT);
  static_assert(S::SCORE_REGISTERS + 2 * S::VALUE_REGISTERS + S::BRING_REGISTERS <= REGISTERS);
  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<S::SCORE_REGISTERS>();
    score_role<S>(params, shared, named_of);
  } else if (warpgroup == 1) {
    setmaxnreg_inc<S::VALUE_REGISTERS>();
    value_role<S, 0>(params, shared, leave);
  } else if (warpgroup == 2) {
    setmaxnreg_inc<S::VALUE_REGISTERS>();
    value_role<S, 1>(params, shared, leave);
  } else {
    setmaxnreg_dec<S::BRING_REGISTERS>();
    bring();
  }
}
