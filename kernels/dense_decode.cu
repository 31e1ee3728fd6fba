// Decode attention over a paged latent cache (MLA, absorbed form) on Hopper, any number of heads.
//
// One CTA = 64 query rows (a row is a query token's head) x a list of items; an item is a part of one request. Per
// unit of 64 cached tokens:
//   S = Q K^T                     64 x D_QK . D_QK x 64            K = the whole latent row
//   P = 2^(S * scale - m)         64 x 64
//   O = O * alpha + P V           64 x 64 . 64 x KV_LORA_RANK      V = its first KV_LORA_RANK columns
// K and V are the same bytes in shared memory: a unit is read from HBM once (72 KiB at 512 + 64).
//
// Three warpgroups. `score` holds Q in registers (31 of 36 steps of 16 columns), computes S and P, and is the critical
// chain; two `value` warpgroups hold half of O's columns each (64 x 256 fp32 = 128 registers). The first value
// warpgroup's first thread is the producer: it issues TMA for a ring slot when both value warpgroups have left it.
// Ring entries, in order, per item: Q, then its units. P(j) overwrites the rotated-key tile of unit j, which nothing
// reads after S(j). Barriers, all with one phase per ring entry:
//   full[slot]    producer -> score     Q or the unit has arrived
//   p_full[slot]  score -> value        P is stored (Q entry: Q is in registers)
//   empty[slot]   value -> producer     nobody reads the slot any more (Q entry: score -> producer)
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock. (Over 400 lines: the three
// roles and their barriers are one protocol, read together or not at all.)
#include "wide_rows.cuh"

constexpr int NUM_THREADS = 3 * WARPGROUP;
// 65,536 registers / 384 threads = 170 -> 168 at launch: 504 per lane over the three warpgroups. m64n256 needs >= 154.
constexpr int SCORE_REGISTERS = 184;
constexpr int VALUE_REGISTERS = 160;
static_assert(SCORE_REGISTERS + 2 * VALUE_REGISTERS <= 504);

template <int KV_LORA_RANK_, int QK_ROPE_HEAD_DIM_, int STAGES_, bool IS_BF16_>
struct Shape {
  static constexpr int KV_LORA_RANK = KV_LORA_RANK_;
  static constexpr int D_QK = KV_LORA_RANK_ + QK_ROPE_HEAD_DIM_;
  static constexpr bool IS_BF16 = IS_BF16_;
  static constexpr int STAGES = STAGES_;
  static constexpr int V_TILES = KV_LORA_RANK / TILE_COLUMNS;
  static constexpr int TILES = V_TILES + 1;  // the last holds the rotated columns, zero-filled from QK_ROPE_HEAD_DIM on
  // A row of the pool is whole tiles: TMA sees tiles as a dimension, and one box holds them all.
  static constexpr bool HAS_TILE_DIMENSION = D_QK % TILE_COLUMNS == 0;
  static constexpr int STEPS = D_QK / 16;                         // steps of S over 16 columns
  static constexpr int REGISTER_STEPS = STEPS < 31 ? STEPS : 31;  // 32 do not fit into SCORE_REGISTERS
  static constexpr bool HAS_Q_TAIL = STEPS > REGISTER_STEPS;
  static constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;  // of O, per value warpgroup
  // Sums of an item stay until its last unit is left; entries of STAGES - 1 later ones may be in work, 2 or more each.
  static constexpr int SUM_BUFFERS = (STAGES - 1) / 2 + 1;
  static_assert(!HAS_Q_TAIL || (STEPS == 36 && QK_ROPE_HEAD_DIM_ == 64));
  static_assert(QK_ROPE_HEAD_DIM_ <= TILE_COLUMNS && D_QK % 16 == 0 && KV_LORA_RANK % (2 * TILE_COLUMNS) == 0);
};

// The producer's walk over all ring entries of the CTA, STAGES ahead of its warpgroup. In shared memory because the
// accumulators leave a value warpgroup 32 registers for everything else.
struct ProducerState {
  int row;  // of the plan, after the item in work; -1 = none
  int request;
  int length;     // tokens
  int unit;       // next to load
  int units_end;  // == unit: nothing left
  int needs_q;    // the item's Q comes first
};

template <class S>
struct alignas(1024) Shared {
  uint8_t ring[S::STAGES][S::TILES][TILE_BYTES];          // first: slot_address counts from the start
  uint8_t q_rope[S::HAS_Q_TAIL ? TILE_BYTES : 16];        // Q's steps 32..35, 128-byte swizzle
  uint8_t q_step[S::HAS_Q_TAIL ? BLOCK_M * 16 * 2 : 16];  // Q's step 31, no swizzle
  float inverse_sum[S::SUM_BUFFERS][BLOCK_M];
  uint64_t full[S::STAGES];
  uint64_t p_full[S::STAGES];
  uint64_t empty[S::STAGES];
  uint8_t rise[S::STAGES][BLOCK_M];  // alpha = 2^-rise
  ProducerState producer;
  Cta cta;
};

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Address of a ring slot, made anew of the symbol each time: the matrix descriptors that follow from it stay in uniform
// registers. From a pointer that is kept in a vector register, CUDA 12.9 makes each descriptor there and moves it over
// (2 R2UR per wgmma), which costs 10% of the kernel's time.
template <class S>
__device__ __forceinline__ uint32_t slot_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * (S::TILES * TILE_BYTES);
}

// --- producer -------------------------------------------------------------------------------------------------------

// Moves the walk to the next item that has units.
template <class S>
__device__ __forceinline__ void next_item(const DecodeParams& params, Shared<S>& shared) {
  ProducerState& state = shared.producer;
  for (int row = state.row; row >= 0;) {
    const Item item = load_item(params, row);
    if (item.request < 0) break;
    row = item.next;
    if (item.num_units > 0) {
      state.row = row;
      state.request = item.request;
      state.length = item.length;
      state.unit = item.first_unit;
      state.units_end = item.first_unit + item.num_units;
      state.needs_q = 1;
      return;
    }
  }
  state.row = -1;
  state.needs_q = 0;
  state.unit = state.units_end = 0;  // nothing left
}

// Loads the next entry into `slot`. Where an entry lies in one page, one instruction does it: the issuing thread is
// held up by each until TMA has taken it, ~390 clocks for 8 KiB, ~750 for 24, and its warpgroup with it.
template <class S>
__device__ __forceinline__ void load_entry(const DecodeParams& params, Shared<S>& shared, int slot, int page) {
  const ProducerState& state = shared.producer;
  uint64_t& full = shared.full[slot];
  const int token = state.unit * BLOCK_N;
  const int kv_head = shared.cta.kv_head;
  const bool is_one_box = state.needs_q || params.box_rows == BLOCK_N;
  // Boxes past the length are left out: their pages may not be looked up.
  const int box_rows = is_one_box ? BLOCK_N : params.box_rows;
  const int boxes = is_one_box ? 1 : min(BLOCK_N, state.length - token + box_rows - 1) / box_rows;
  const int box_bytes = box_rows * TILE_COLUMNS * 2;
  mbarrier_arrive_expect_tx(full, S::TILES * boxes * box_bytes);
  if (S::HAS_TILE_DIMENSION && is_one_box) {
    if (state.needs_q) {
      tma_load_5d(shared.ring[slot], params.q_map, full, 0, shared.cta.first_row, 0, kv_head, state.request);
    } else {
      tma_load_5d(shared.ring[slot], params.kv_map, full, 0, row_in_page(params, token), 0, kv_head, page);
    }
    return;
  }
  const TensorMap& map = state.needs_q ? params.q_map : params.kv_map;
#pragma unroll 1
  for (int box = 0; box < boxes; ++box) {
    const int box_token = token + box * box_rows;
    const int row = state.needs_q ? shared.cta.first_row : box_token % params.block_size;
    const int outer = state.needs_q ? state.request : is_one_box ? page : page_of(params, state.request, box_token);
#pragma unroll 1
    for (int tile = 0; tile < S::TILES; ++tile) {
      tma_load_5d(shared.ring[slot][tile] + box * box_bytes, map, full, S::HAS_TILE_DIMENSION ? 0 : tile * TILE_COLUMNS,
                  row, S::HAS_TILE_DIMENSION ? tile : 0, kv_head, outer);
    }
  }
}

// Page of the next entry, looked up before its slot is free: the answer takes ~700 clocks.
template <class S>
__device__ __forceinline__ int next_page(const DecodeParams& params, const Shared<S>& shared) {
  const ProducerState& state = shared.producer;
  if (state.unit == state.units_end || params.box_rows != BLOCK_N) return 0;
  return page_of(params, state.request, state.unit * BLOCK_N);
}

// Loads the next entry, if there is one, into `slot`; `parity` is that of the phase in which the slot was left.
template <class S>
__device__ __forceinline__ void produce(const DecodeParams& params, Shared<S>& shared, int slot, uint32_t parity,
                                        int page) {
  ProducerState& state = shared.producer;
  if (state.unit == state.units_end) return;
  mbarrier_wait(shared.empty[slot], parity);
  load_entry<S>(params, shared, slot, page);
  if (state.needs_q) {
    state.needs_q = 0;
    return;
  }
  const int unit = state.unit + 1;
  if (unit == state.units_end) {
    next_item<S>(params, shared);
  } else {
    state.unit = unit;
  }
}

// --- score: S = Q K^T and P -----------------------------------------------------------------------------------------

// Copies Q from its ring slot: REGISTER_STEPS as wgmma A fragments, the rest to shared memory.
template <class S>
__device__ __forceinline__ void take_q(Shared<S>& shared, int slot, uint32_t (&q)[S::REGISTER_STEPS][4]) {
  const int thread = thread_index() % WARPGROUP;
  const int warp = thread / 32, lane = thread % 32;
  const int matrix = lane / 8;
  const int row = warp * 16 + (matrix & 1) * 8 + lane % 8;
  const uint32_t tiles = shared_address(shared.ring[slot]);
#pragma unroll
  for (int step = 0; step < S::REGISTER_STEPS; ++step) {
    const int chunk = 2 * (step % 4) + (matrix >> 1);  // of 16 bytes, in a row of 128
    ldmatrix_x4(q[step], tiles + step / 4 * TILE_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4));
  }
  if constexpr (S::HAS_Q_TAIL) {
    const uint4* rope = reinterpret_cast<const uint4*>(shared.ring[slot][S::V_TILES]);
#pragma unroll
    for (int i = 0; i < TILE_BYTES / 16 / WARPGROUP; ++i) {
      reinterpret_cast<uint4*>(shared.q_rope)[i * WARPGROUP + thread] = rope[i * WARPGROUP + thread];
    }
    // Step 31 is the last quarter of the last V tile: two chunks per row, to core matrices of 8 rows x 16 bytes.
    const int tail_row = thread / 2, half = thread % 2;
    const uint4 value = *reinterpret_cast<const uint4*>(shared.ring[slot][S::V_TILES - 1] + tail_row * 128 +
                                                        (((6 + half) ^ (tail_row & 7)) << 4));
    *reinterpret_cast<uint4*>(shared.q_step + tail_row / 8 * 256 + half * 128 + tail_row % 8 * 16) = value;
    fence_proxy_async();
    bar_sync(BARRIER_SCORE, WARPGROUP);
  }
}

template <class S>
__device__ __forceinline__ void score_unit(Shared<S>& shared, int slot, uint32_t phase,
                                           const uint32_t (&q)[S::REGISTER_STEPS][4], float (&s)[32]) {
  const uint64_t keys = matrix_descriptor(slot_address<S>(slot), 0, 1024, Swizzle::B128);
  mbarrier_wait(shared.full[slot], phase);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < S::REGISTER_STEPS; ++step) {
    wgmma_m64n64k16_registers<S::IS_BF16>(s, q[step], advance(keys, step / 4 * TILE_BYTES + step % 4 * 32), step > 0);
  }
  if constexpr (S::HAS_Q_TAIL) {
    const uint64_t q_step = matrix_descriptor(shared_address(shared.q_step), 128, 256, Swizzle::NONE);
    wgmma_m64n64k16_shared<S::IS_BF16>(s, q_step, advance(keys, 7 * TILE_BYTES + 3 * 32), true);
    const uint64_t q_rope = matrix_descriptor(shared_address(shared.q_rope), 0, 1024, Swizzle::B128);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma_m64n64k16_shared<S::IS_BF16>(s, advance(q_rope, step * 32), advance(keys, 8 * TILE_BYTES + step * 32),
                                         true);
    }
  }
  wgmma_commit_group();
}

template <class S>
__device__ __forceinline__ void score_role(const DecodeParams& params, Shared<S>& shared) {
  Position<S> position;
  int sum_buffer = 0;
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    float reference[2] = {0.f, 0.f};  // of the maxima, log2; rises by whole numbers, so that alpha is exact
    float sum[2] = {0.f, 0.f};        // of this thread's columns
    int units_left, tokens_left;      // tokens from the current unit on that every row of the tile sees
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
      tokens_left = visible_tokens(params, item.length, shared.cta.first_row) - item.first_unit * BLOCK_N;
    }
    if (units_left > 0) {
      uint32_t q[S::REGISTER_STEPS][4];
      mbarrier_wait(shared.full[position.slot()], position.phase());
      take_q<S>(shared, position.slot(), q);
      __syncwarp();
      if (thread_index() % 32 == 0) {
        mbarrier_arrive(shared.p_full[position.slot()]);
        mbarrier_arrive(shared.empty[position.slot()], 2);  // 4 warps stand for the 8 of the value warpgroups
      }
      position.advance();

      bool is_first = true;
      bool is_pending = false;  // the previous unit's P is stored but not announced
      for (; units_left > 0; --units_left) {
        const int slot = position.slot();
        float s[32];
        score_unit<S>(shared, slot, position.phase(), q, s);
        position.advance();
        wgmma_wait_group<0>();
        // The tensor cores are free while P(j) is computed: now PV(j - 1) may have them. Released earlier it takes two
        // thirds of them from S(j), which everything else waits for.
        if (is_pending) mbarrier_arrive(shared.p_full[slot == 0 ? S::STAGES - 1 : slot - 1]);

#pragma unroll
        for (int i = 0; i < 32; ++i) {
          s[i] = __fmaf_rn(s[i], params.softmax_scale_log2, -reference[i >> 1 & 1]);
        }
        if (tokens_left < BLOCK_N) {
          const Cta& tile = shared.cta;
          const int thread = thread_index();
          const int row = tile.first_row + thread / 32 * 16 + thread % 32 / 4;
          const int hidden_by_first = visible_tokens(params, 0, tile.first_row);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int visible = tokens_left + visible_tokens(params, 0, row + 8 * half) - hidden_by_first;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              const int column = (i >> 1) * 8 + thread % 4 * 2 + (i & 1);
              float& score = s[(i >> 1) * 4 + half * 2 + (i & 1)];
              // Not arithmetic: what lies past the length may be NaN.
              score = column < visible ? score : -infinity();
            }
          }
        }
        tokens_left -= BLOCK_N;
        const uint32_t rises = raise<0>(s, is_first, reference, sum);
        is_first = false;
        float odd_sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          s[i] = ex2(s[i]);
          if (i & 1) {
            odd_sum[i >> 1 & 1] += s[i];
          } else {
            sum[i >> 1 & 1] += s[i];
          }
        }
        sum[0] += odd_sum[0];
        sum[1] += odd_sum[1];

        // All warps have finished S(j), which reads the rotated-key tile that P overwrites.
        bar_sync(BARRIER_SCORE, WARPGROUP);
        store_p<S::IS_BF16>(shared.ring[slot][S::V_TILES], s);
        const int thread = thread_index();
        const int sum_row = accumulator_row();
        if (thread % 4 == 0) {
          shared.rise[slot][sum_row] = rises;
          shared.rise[slot][sum_row + 8] = rises >> 8;
        }
        if (units_left == 1) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 2);
            if (thread % 4 == 0) {
              shared.inverse_sum[sum_buffer][sum_row + 8 * half] = sum[half] > 0.f ? 1.f / sum[half] : 0.f;
            }
          }
        }
        // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence
        // the tensor core may read stale bytes: wrong numbers, no error.
        fence_proxy_async();
        __syncwarp();
        if (thread % 32 == 0) {
          // Nothing to overlap with: the item ends, or its next unit is still on its way.
          is_pending = units_left > 1 && mbarrier_test_wait(shared.full[position.slot()], position.phase());
          if (!is_pending) mbarrier_arrive(shared.p_full[slot]);
        }
      }
      sum_buffer = sum_buffer + 1 == S::SUM_BUFFERS ? 0 : sum_buffer + 1;
    }
    const Item item = load_item(params, plan_row);
    store_log_sums(params, item, shared.cta, reference, sum);
    plan_row = item.next;
  }
}

// --- value: O = O * alpha + P V -------------------------------------------------------------------------------------

// Rows of V past the length are multiplied by P = 0, but 0 * NaN is NaN: overwrite them with zeros.
template <class S>
__device__ __forceinline__ void clear_rows(Shared<S>& shared, int slot, int half, int first_row) {
  constexpr int TILES_PER_HALF = S::V_TILES / 2;
  const int thread = thread_index() % WARPGROUP;
  const int chunks = (BLOCK_N - first_row) * 8;  // of 16 bytes, per tile; swizzling stays within a row
  for (int chunk = thread; chunk < chunks; chunk += WARPGROUP) {
#pragma unroll
    for (int t = 0; t < TILES_PER_HALF; ++t) {
      uint4* row = reinterpret_cast<uint4*>(shared.ring[slot][half * TILES_PER_HALF + t] + first_row * 128);
      row[chunk] = make_uint4(0, 0, 0, 0);
    }
  }
  fence_proxy_async();
  bar_sync(BARRIER_VALUE + half, WARPGROUP);
}

// Whether an item with units follows that of plan row `row`. A plan's `next` never leads to an unused row.
__device__ __forceinline__ bool next_has_units(const DecodeParams& params, int row) {
  Item item = load_item(params, row);
  do {
    if (item.next < 0) return false;
    item = load_item(params, item.next);
  } while (item.num_units == 0);
  return true;
}

template <class S, int HALF>
__device__ __forceinline__ void value_role(const DecodeParams& params, Shared<S>& shared) {
  constexpr bool PRODUCES = HALF == 0;
  if (PRODUCES && thread_index() == WARPGROUP) {
    shared.producer.row = shared.cta.plan_slot;
    next_item<S>(params, shared);
    // All slots, of which none was used before, and then the one that holds Q once more. The first unit's page is
    // looked up before Q is asked for: the answer comes while TMA takes Q.
    int page = next_page<S>(params, shared);
    for (int entry = 0; entry <= S::STAGES; ++entry) {
      const int slot = entry == S::STAGES ? 0 : entry;
      if (entry > 1) page = next_page<S>(params, shared);
      produce<S>(params, shared, slot, entry == S::STAGES ? 0 : 1, page);
    }
  }
  __syncwarp();

  Position<S> position;
  int sum_buffer = 0;
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
    if (units_left > 0) {
      // Q's entry. It is not waited for: score has announced it when it announces the units after it. And it must not
      // be waited for: score alone leaves it, so its slot may already have been filled and announced once more.
      position.advance();
      for (; units_left > 0; --units_left) {
        const int slot = position.slot();
        int page = 0;
        if (PRODUCES && thread_index() == WARPGROUP) page = next_page<S>(params, shared);
        mbarrier_wait(shared.p_full[slot], position.phase());
        lower<S>(shared.rise[slot], o);
        if (units_left == 1) {
          const Item item = load_item(params, plan_row);
          const int used = item.length - (item.first_unit + item.num_units - 1) * BLOCK_N;
          if (used < BLOCK_N) clear_rows<S>(shared, slot, HALF, used);
        }
        const uint32_t tiles = slot_address<S>(slot);
        const uint64_t p = matrix_descriptor(tiles + S::V_TILES * TILE_BYTES, 0, 1024, Swizzle::B128);
        const uint64_t v =
            matrix_descriptor(tiles + HALF * S::V_TILES / 2 * TILE_BYTES, TILE_BYTES, 1024, Swizzle::B128);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_N / 16; ++step) {
          wgmma_m64k16_transposed<S::IS_BF16>(o, advance(p, step * 32), advance(v, step * 2048), true);
        }
        wgmma_commit_group();
        wgmma_wait_group<0>();
        if (units_left == 1) {
          const int row = accumulator_row();
          scale[0] = shared.inverse_sum[sum_buffer][row];
          scale[1] = shared.inverse_sum[sum_buffer][row + 8];
        }
        __syncwarp();
        if (thread_index() % 32 == 0) mbarrier_arrive(shared.empty[slot]);
        if (PRODUCES && thread_index() == WARPGROUP) {
          produce<S>(params, shared, slot, position.phase(), page);
        }
        __syncwarp();
        position.advance();
        if (PRODUCES && units_left == 1 && thread_index() == WARPGROUP && next_has_units(params, plan_row)) {
          // The next item's Q lies behind: its slot is free as soon as score has taken it. Now, not after the stores,
          // which take 2,500 clocks: the next item's third unit goes there.
          produce<S>(params, shared, position.slot(), position.phase(), next_page<S>(params, shared));
        }
        __syncwarp();
      }
      sum_buffer = sum_buffer + 1 == S::SUM_BUFFERS ? 0 : sum_buffer + 1;
    }
    const Item item = load_item(params, plan_row);
    store_row<S, 0>(params, shared.cta, item, HALF, o, scale[0]);
    store_row<S, 1>(params, shared.cta, item, HALF, o, scale[1]);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void decode(const DecodeParams& params) {
  static_assert(sizeof(Shared<S>) <= SHARED_LIMIT);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < S::STAGES; ++slot) {
      mbarrier_init(shared.full[slot], 1);
      mbarrier_init(shared.p_full[slot], 4);  // warps of the score warpgroup
      mbarrier_init(shared.empty[slot], 8);   // warps of the value warpgroups
    }
    fence_mbarrier_init();
    const int tile = blockIdx.x % params.tiles;
    shared.cta = {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * BLOCK_M};
  }
  begin_launch(params, shared.cta, NUM_THREADS / 32 - 1);

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    setmaxnreg_inc<SCORE_REGISTERS>();
    score_role<S>(params, shared);
  } else if (warpgroup == 1) {
    setmaxnreg_dec<VALUE_REGISTERS>();
    value_role<S, 0>(params, shared);
  } else {
    setmaxnreg_dec<VALUE_REGISTERS>();
    value_role<S, 1>(params, shared);
  }
}

#define DECODE_KERNEL(NAME, KV_LORA_RANK, QK_ROPE_HEAD_DIM, STAGES, IS_BF16)             \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                           \
      flash_fwd_splitkv_mla_kernel_##NAME(const __grid_constant__ DecodeParams params) { \
    decode<Shape<KV_LORA_RANK, QK_ROPE_HEAD_DIM, STAGES, IS_BF16>>(params);              \
  }

DECODE_KERNEL(bf16_512_64, 512, 64, 3, true)
DECODE_KERNEL(fp16_512_64, 512, 64, 3, false)
DECODE_KERNEL(bf16_256_64, 256, 64, 5, true)
DECODE_KERNEL(fp16_256_64, 256, 64, 5, false)
DECODE_KERNEL(bf16_256_32, 256, 32, 5, true)
DECODE_KERNEL(fp16_256_32, 256, 32, 5, false)
DECODE_KERNEL(bf16_128_32, 128, 32, 8, true)
DECODE_KERNEL(fp16_128_32, 128, 32, 8, false)
