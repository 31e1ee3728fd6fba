// Decode attention over a paged latent cache for up to 32 query rows per latent head, on Hopper: operands swapped, so
// that tokens fill wgmma's 64 rows and no query row is padding beyond a multiple of 16.
//
// One CTA = the query rows of one latent head x a list of items; an item is a part of one request. Per unit of 64
// cached tokens, ROWS = 16 or 32:
//   S^T = K Q^T                     64 x D_QK . D_QK x ROWS            K = the whole latent row
//   P^T = 2^(S^T * scale - m)       64 x ROWS
//   O^T = O^T * alpha + V^T P^T     KV_LORA_RANK x 64 . 64 x ROWS      V = its first KV_LORA_RANK columns
// A unit's wgmmas read 136 KiB of shared memory, 1,090 clocks, where its share of HBM is ~3,900: this kernel waits for
// memory, and what it is built for is to have as much of it on the way as fits.
//
// Three warpgroups: two consumers take an item's units by turns, each with its own O, maximum and sums, and add both up
// at the item's end; of the third, one warp loads pages and one loads Q. The ring is made of thirds of a unit (three
// tiles of 64 columns). Barriers:
//   full[consumer][slot]      pages -> the unit's consumer
//   empty[slot]               the unit's consumer -> pages
//   q_full, q_empty           Q of an item: Q's warp -> both consumers -> Q's warp
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock.
#include "few_rows.cuh"

constexpr int TILES = V_TILES + 1;  // the last holds the rotated columns
constexpr int SLOT_TILES = 3;       // of a ring slot: one box
constexpr int SLOT_BYTES = SLOT_TILES * TILE_BYTES;
constexpr int UNIT_SLOTS = TILES / SLOT_TILES;
static_assert(UNIT_SLOTS * SLOT_TILES == TILES);

// 504 per lane over the three warpgroups, as in dense_decode.cu.
constexpr int CONSUMER_REGISTERS = 224;
constexpr int PRODUCER_REGISTERS = 56;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 504);

template <class S>
struct Shared;

template <int ROWS_, int STAGES_, bool IS_BF16_>
struct Shape {
  using Memory = Shared<Shape>;
  static constexpr int ROWS = ROWS_;      // wgmma's N
  static constexpr int STAGES = STAGES_;  // ring slots
  static constexpr bool IS_BF16 = IS_BF16_;
  static constexpr bool ARE_PAIRS = false;
  static constexpr int Q_TILE_BYTES = ROWS * TILE_COLUMNS * 2;
  static constexpr int COLUMNS = ROWS / 4;  // columns of S^T and O^T, that is query rows, of which a thread has a part
  static constexpr int TILE_ROWS = ROWS;
  static constexpr int FULL_ARRIVALS = 1;                // of the thread that loads pages
  static constexpr int EMPTY_ARRIVALS = WARPGROUP / 32;  // warps of the consumer that had the slot
  static_assert(ROWS % STAGED_ROWS == 0);
  static __device__ __forceinline__ Exchange& exchange(Memory& shared, int consumer) {
    return shared.exchange[consumer];
  }
  static __device__ __forceinline__ void init_others(Memory& shared) {
    mbarrier_init(shared.q_full, 1);  // of the thread that loads Q
    mbarrier_init(shared.q_empty, CONSUMERS * WARPGROUP / 32);
  }
  // Both consumers hold a unit and the producer needs room to go on.
  static_assert(STAGES >= CONSUMERS * UNIT_SLOTS);
};

template <class S>
struct alignas(1024) Shared {
  uint8_t ring[S::STAGES][SLOT_BYTES];  // first: slot_address counts from the start
  uint8_t q[TILES][S::Q_TILE_BYTES];
  uint8_t p[CONSUMERS][S::Q_TILE_BYTES];  // ROWS rows of 64 tokens, 128-byte swizzle
  Exchange exchange[CONSUMERS];
  float4 top[CONSUMERS][S::ROWS];  // maxima of a unit, of each warp's tokens
  float4 sum[CONSUMERS][S::ROWS];  // of an item
  float reference[CONSUMERS][S::ROWS];
  float factor[CONSUMERS][S::ROWS];  // by which an item's O is multiplied
  Row row[S::ROWS];
  // By consumer, so that each has one waiter, for every phase in turn: a slot goes from one consumer to the other, and
  // a parity tells a phase from its neighbours only.
  uint64_t full[CONSUMERS][S::STAGES];
  uint64_t empty[S::STAGES];
  uint64_t q_full;
  uint64_t q_empty;
};

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Made anew of the symbol each time, for descriptors in uniform registers: see dense_decode.cu.
template <class S>
__device__ __forceinline__ uint32_t slot_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * SLOT_BYTES;
}

// --- producers ------------------------------------------------------------------------------------------------------

// Loads a third of a unit, from tile `tile` on, into `target`.
__device__ __forceinline__ void load_slot(const DecodeParams& params, const Cta& cta, const Item& item, uint8_t* target,
                                          uint64_t& full, int unit, int tile, const Place& place) {
  if (params.box_rows == BLOCK_N) {
    mbarrier_arrive_expect_tx(full, SLOT_BYTES);
    tma_load_5d(target, params.kv_map, full, 0, place.row, tile, cta.kv_head, place.page);
    return;
  }
  const int token = (item.first_unit + unit) * BLOCK_N;
  // Boxes past the length are left out: their pages may not be looked up.
  const int boxes = min(BLOCK_N, item.length - token + params.box_rows - 1) / params.box_rows;
  const int box_bytes = params.box_rows * TILE_COLUMNS * 2;
  mbarrier_arrive_expect_tx(full, SLOT_TILES * boxes * box_bytes);
#pragma unroll 1
  for (int box = 0; box < boxes; ++box) {
    const int box_token = token + box * params.box_rows;
    const int box_page = page_of(params, item.request, box_token);
#pragma unroll 1
    for (int i = 0; i < SLOT_TILES; ++i) {
      tma_load_5d(target + i * TILE_BYTES + box * box_bytes, params.kv_map, full, 0, box_token % params.block_size,
                  tile + i, cta.kv_head, box_page);
    }
  }
}

// A warp: all units of all items, as ring slots become free.
template <class S>
__device__ __forceinline__ void load_pages(const DecodeParams& params, Shared<S>& shared, const Cta& cta) {
  const bool is_issuing = thread_index() % 32 == 0;
  Position<S> position;
  int consumer = 0;  // of the unit: by turns
  Item item = item_with_units(params, cta.plan_slot);
  Place places = places_of(params, item, 0);
  while (item.request >= 0) {
    Item next;
    Place next_places;
    for (int unit = 0; unit < item.num_units; ++unit) {
      if (unit % 32 == 0 && unit > 0) places = places_of(params, item, unit);
      const Place place = {__shfl_sync(0xFFFFFFFF, places.page, unit % 32),
                           __shfl_sync(0xFFFFFFFF, places.row, unit % 32)};
#pragma unroll 1
      for (int third = 0; third < UNIT_SLOTS; ++third) {
        if (is_issuing) {
          mbarrier_wait(shared.empty[position.slot], position.phase ^ 1);
          load_slot(params, cta, item, shared.ring[position.slot], shared.full[consumer][position.slot], unit,
                    third * SLOT_TILES, place);
        }
        __syncwarp();
        position = position.after(1);
      }
      consumer ^= 1;
      // The next item's length and pages are looked up once the last unit of this one is on its
      // way: three loads, one after another.
      if (unit + 1 == item.num_units) {
        next = item_with_units(params, item.next);
        next_places = places_of(params, next, 0);
      }
    }
    item = next;
    places = next_places;
  }
}

// A thread: Q of all items that have units.
template <class S>
__device__ __forceinline__ void load_queries(const DecodeParams& params, Shared<S>& shared, const Cta& cta) {
  uint32_t phase = 0;
  for (Item item = item_with_units(params, cta.plan_slot); item.request >= 0;
       item = item_with_units(params, item.next)) {
    mbarrier_wait(shared.q_empty, phase ^ 1);
    mbarrier_arrive_expect_tx(shared.q_full, TILES * S::Q_TILE_BYTES);
    tma_load_5d(shared.q, params.q_map, shared.q_full, 0, 0, 0, cta.kv_head, item.request);
    phase ^= 1;
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

// P of the scores, which count from the references: to shared memory, rounded; and sums over the thread's tokens.
template <class S>
__device__ __forceinline__ void store_p(Shared<S>& shared, int consumer, const float (&s)[S::ROWS / 2],
                                        float (&sum)[S::COLUMNS]) {
  float p[S::ROWS / 2];
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) sum[i] = 0.f;
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    p[i] = ex2(s[i]);
    sum[column_of(i)] += p[i];
  }
  // Matrix m of a stmatrix is tokens (m & 1) * 8.. of the warp's 16 and query rows 8 * (m >> 1)..
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const int chunk = 2 * warp + (lane / 8 & 1);  // of 16 bytes: 8 tokens
#pragma unroll
  for (int pair = 0; pair < S::ROWS / 16; ++pair) {
    const int row = pair * 16 + lane / 16 * 8 + lane % 8;
    const float* values = p + 8 * pair;
    stmatrix_x4_trans(shared_address(shared.p[consumer]) + row * 128 + ((chunk ^ (row & 7)) << 4),
                      pack<S::IS_BF16>(values[0], values[1]), pack<S::IS_BF16>(values[2], values[3]),
                      pack<S::IS_BF16>(values[4], values[5]), pack<S::IS_BF16>(values[6], values[7]));
  }
}

// P of a unit's scores `s`, its products of keys and queries, and its sums; O and the sums are multiplied where a score
// rises far above the reference.
template <class S>
__device__ __forceinline__ void probabilities(const DecodeParams& params, Shared<S>& shared, const Item& item,
                                              int consumer, int unit, float (&s)[S::ROWS / 2], Result<S>& result) {
  const bool is_first = unit < CONSUMERS;
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    s[i] = __fmaf_rn(s[i], params.softmax_scale_log2, -result.reference[column_of(i)]);
  }
  hide<S>(shared, item.length - (item.first_unit + unit) * BLOCK_N, s);
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
  store_p<S>(shared, consumer, s, sum);
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
    for (int tile = 0; tile < V_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] *= alpha[column_of(i)];
    }
    store_p<S>(shared, consumer, s, sum);
    fence_proxy_async();
    bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  }
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) result.sum[i] += sum[i];
}

// Rows of V past the length are multiplied by P = 0, but 0 * NaN is NaN: overwrite them with zeros.
template <class S>
__device__ __forceinline__ void clear_rows(Shared<S>& shared, int consumer, Position<S> position, int first_row) {
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);  // all warps have finished S^T, which reads these rows
  const int chunks = (BLOCK_N - first_row) * 8;      // of 16 bytes, per tile; swizzling stays within a row
#pragma unroll 1
  for (int tile = 0; tile < V_TILES; ++tile) {
    uint8_t* rows = shared.ring[position.after(tile / SLOT_TILES).slot] + tile % SLOT_TILES * TILE_BYTES;
    for (int chunk = thread_index() % WARPGROUP; chunk < chunks; chunk += WARPGROUP) {
      reinterpret_cast<uint4*>(rows + first_row * 128)[chunk] = make_uint4(0, 0, 0, 0);
    }
  }
}

// One unit: S^T, P^T and O^T.
template <class S>
__device__ __forceinline__ void consume(const DecodeParams& params, Shared<S>& shared, const Item& item, int consumer,
                                        int unit, Position<S> position, uint32_t& full_phases, Result<S>& result) {
  const bool is_last = unit + CONSUMERS >= item.num_units;
  float s[S::ROWS / 2];
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) s[i] = 0.f;
  const uint64_t q = matrix_descriptor(shared_address(shared.q), 0, 1024, Swizzle::B128);
#pragma unroll
  for (int third = 0; third < UNIT_SLOTS; ++third) {
    const Position<S> at = position.after(third);
    const uint64_t keys = matrix_descriptor(slot_address<S>(at.slot), 0, 1024, Swizzle::B128);
    mbarrier_wait(shared.full[consumer][at.slot], full_phases >> at.slot & 1);
    full_phases ^= 1u << at.slot;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4 * SLOT_TILES; ++step) {
      wgmma_m64k16_narrow<S::IS_BF16, false>(
          s, advance(keys, step / 4 * TILE_BYTES + step % 4 * 32),
          advance(q, (third * SLOT_TILES + step / 4) * S::Q_TILE_BYTES + step % 4 * 32));
    }
    wgmma_commit_group();
  }
  wgmma_wait_group<0>();
  if (is_last) {  // of this consumer's S^T: Q may go
    __syncwarp();
    if (thread_index() % 32 == 0) mbarrier_arrive(shared.q_empty);
  }

  const int stored = item.length - (item.first_unit + unit) * BLOCK_N;
  if (stored < BLOCK_N) clear_rows<S>(shared, consumer, position, stored);
  probabilities<S>(params, shared, item, consumer, unit, s, result);

  const uint64_t p = matrix_descriptor(shared_address(shared.p[consumer]), 0, 1024, Swizzle::B128);
  wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < V_TILES; ++tile) {
    const uint64_t values =
        matrix_descriptor(slot_address<S>(position.after(tile / SLOT_TILES).slot) + tile % SLOT_TILES * TILE_BYTES, 0,
                          1024, Swizzle::B128);
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) {
      wgmma_m64k16_narrow<S::IS_BF16, true>(result.o[tile], advance(values, step * 2048), advance(p, step * 32));
    }
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  __syncwarp();
  if (thread_index() % 32 == 0) {
#pragma unroll
    for (int third = 0; third < UNIT_SLOTS; ++third) mbarrier_arrive(shared.empty[position.after(third).slot]);
  }
}

template <class S>
__device__ __forceinline__ void consumer_role(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
                                              int consumer) {
  Position<S> position;
  uint32_t q_phase = 0;
  uint32_t full_phases = 0;  // a bit per slot: parity of this consumer's next phase there
  int turn = 0;              // the consumer of an item's first unit
  for (int plan_row = cta.plan_slot; plan_row >= 0;) {
    const Item item = load_item(params, plan_row);
    if (item.request < 0) break;
    Result<S> result;
#pragma unroll
    for (int tile = 0; tile < V_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) result.reference[i] = result.sum[i] = 0.f;
    if (item.num_units > 0) {
      const int first = consumer ^ turn;
      if (first < item.num_units) {
        mbarrier_wait(shared.q_full, q_phase);
      } else if (thread_index() % 32 == 0) {
        mbarrier_arrive(shared.q_empty);
      }
      q_phase ^= 1;
      for (int unit = 0; unit < item.num_units; ++unit) {
        if ((unit & 1) == first) consume<S>(params, shared, item, consumer, unit, position, full_phases, result);
        position = position.after(UNIT_SLOTS);
      }
      turn ^= item.num_units & 1;
    }
    merge_sums<S>(params, shared, cta, item, consumer, result);
    store_result<S>(params, shared, cta, item, consumer, result);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void decode(const DecodeParams& params) {
  static_assert(sizeof(Shared<S>) <= SHARED_LIMIT);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(dynamic_shared);
  const Cta cta = {(int)blockIdx.x / params.tiles, (int)blockIdx.x % params.tiles, 0};
  begin_cta<S>(params, shared, cta);

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == CONSUMERS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % (WARPGROUP / 32);
    if (warp == 0) {
      load_pages<S>(params, shared, cta);
    } else if (warp == 1) {
      if (threadIdx.x % 32 == 0) load_queries<S>(params, shared, cta);
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consumer_role<S>(params, shared, cta, warpgroup);
  }
}

#define DECODE_KERNEL(NAME, ROWS, STAGES, IS_BF16)                                       \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                           \
      flash_fwd_splitkv_mla_kernel_##NAME(const __grid_constant__ DecodeParams params) { \
    decode<Shape<ROWS, STAGES, IS_BF16>>(params);                                        \
  }

DECODE_KERNEL(few16_bf16_512_64, 16, 7, true)
DECODE_KERNEL(few16_fp16_512_64, 16, 7, false)
DECODE_KERNEL(few32_bf16_512_64, 32, 6, true)
DECODE_KERNEL(few32_fp16_512_64, 32, 6, false)
