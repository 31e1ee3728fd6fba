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
// docs/dense_decode.md has the budgets and the argument why no wait can deadlock. (One file of 700 lines: producers,
// consumers and their barriers are one protocol, read together or not at all.)
#include "item.cuh"
#include "wgmma.cuh"

constexpr int KV_LORA_RANK = 512;
constexpr int V_TILES = KV_LORA_RANK / TILE_COLUMNS;
constexpr int TILES = V_TILES + 1;  // the last holds the rotated columns
constexpr int SLOT_TILES = 3;       // of a ring slot: one box
constexpr int SLOT_BYTES = SLOT_TILES * TILE_BYTES;
constexpr int UNIT_SLOTS = TILES / SLOT_TILES;
static_assert(UNIT_SLOTS * SLOT_TILES == TILES);

constexpr int NUM_THREADS = 3 * WARPGROUP;
constexpr int CONSUMERS = 2;
// 504 per lane over the three warpgroups, as in dense_decode.cu.
constexpr int CONSUMER_REGISTERS = 224;
constexpr int PRODUCER_REGISTERS = 56;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 504);

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

template <int ROWS_, int STAGES_, bool IS_BF16_>
struct Shape {
  static constexpr int ROWS = ROWS_;      // wgmma's N
  static constexpr int STAGES = STAGES_;  // ring slots
  static constexpr bool IS_BF16 = IS_BF16_;
  static constexpr int Q_TILE_BYTES = ROWS * TILE_COLUMNS * 2;
  static constexpr int COLUMNS = ROWS / 4;  // columns of S^T and O^T, that is query rows, of which a thread has a part
  static_assert(ROWS % STAGED_ROWS == 0);
  // Both consumers hold a unit and the producer needs room to go on.
  static_assert(STAGES >= CONSUMERS * UNIT_SLOTS);
};

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

// The query row of a thread's accumulator column `i`.
__device__ __forceinline__ int column_row(int i) { return (i >> 1) * 8 + thread_index() % 4 * 2 + (i & 1); }

// Number of accumulator i among the thread's columns.
__device__ __forceinline__ constexpr int column_of(int i) { return (i >> 2) * 2 + (i & 1); }

// --- producers ------------------------------------------------------------------------------------------------------

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

// Maxima over the unit's tokens, of each of the thread's columns, in all threads of the warpgroup.
template <class S>
__device__ __forceinline__ void column_maxima(Shared<S>& shared, int consumer, float (&top)[S::COLUMNS]) {
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

// P of the scores, which count from the references: to shared memory, rounded; returns sums over the thread's tokens.
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

// What a consumer has of an item.
template <class S>
struct Result {
  float o[V_TILES][S::ROWS / 2];  // O^T: tile t, row 16 * warp + 8 * half + lane / 4 of its 64 columns
  float reference[S::COLUMNS];    // of the maxima, log2
  float sum[S::COLUMNS];          // over this thread's tokens
};

// One unit: S^T, P^T and O^T.
template <class S>
__device__ __forceinline__ void consume(const DecodeParams& params, Shared<S>& shared, const Item& item, int consumer,
                                        int unit, Position<S> position, uint32_t& full_phases, Result<S>& result) {
  const bool is_first = unit < CONSUMERS;
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
    if (item.length - first_token < BLOCK_N) clear_rows(shared, consumer, position, item.length - first_token);
  }
  float top[S::COLUMNS];
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    top[column_of(i)] = i & 2 ? fmaxf(top[column_of(i)], s[i]) : s[i];
  }
  // Both ways all warps meet before P is written: they have finished the wgmmas that read the P before.
  if (!is_first) bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  if (is_first) {
    column_maxima(shared, consumer, top);
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
    column_maxima(shared, consumer, top);
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

// Puts both consumers' maxima and sums together: the factors of their O to shared memory, the log-sums to memory.
template <class S>
__device__ __forceinline__ void merge_sums(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
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

// 16 rows of a consumer's half of O, of a whole request, to `out`: turned in shared memory, so that rows are stored.
template <class S>
__device__ __forceinline__ void store_whole(const DecodeParams& params, Shared<S>& shared, const Item& item,
                                            int consumer, int first_row,
                                            const float (&o)[HALF_TILES][STAGED_ROWS / 2]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  auto& staged = shared.exchange[consumer].staged;
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

// Leaves for the other consumer what consumer CONSUMER has of its half of the columns: 16 rows from `first_row` on.
template <class S, int CONSUMER>
__device__ __forceinline__ void give(Shared<S>& shared, const Result<S>& result, int first_row,
                                     const float (&factor)[S::COLUMNS]) {
  constexpr int OTHERS = (1 - CONSUMER) * HALF_TILES;
  const int first = first_row / 2;  // accumulator
#pragma unroll
  for (int i = 0; i < EXCHANGED_VECTORS; ++i) {
    const float* four = &result.o[OTHERS + i / 2][first + i % 2 * 4];
    const float* by = &factor[column_of(first + i % 2 * 4)];
    shared.exchange[1 - CONSUMER].taken[i][thread_index() % WARPGROUP] =
        make_float4(four[0] * by[0], four[1] * by[1], four[2] * by[0], four[3] * by[1]);
  }
}

// Adds what the other one left to consumer CONSUMER's own half of the columns, and stores it.
template <class S, int CONSUMER>
__device__ __forceinline__ void take(const DecodeParams& params, Shared<S>& shared, const Cta& cta, const Item& item,
                                     const Result<S>& result, int first_row, const float (&factor)[S::COLUMNS],
                                     const int (&place)[S::COLUMNS]) {
  constexpr int OWN = CONSUMER * HALF_TILES;
  const int first = first_row / 2;
  float o[HALF_TILES][STAGED_ROWS / 2];
#pragma unroll
  for (int i = 0; i < EXCHANGED_VECTORS; ++i) {
    const float4 four = shared.exchange[CONSUMER].taken[i][thread_index() % WARPGROUP];
    const float others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = i % 2 * 4 + k;
      o[i / 2][at] = __fadd_rn(others[k], __fmul_rn(result.o[OWN + i / 2][first + at], factor[column_of(first + at)]));
    }
  }
  if (item.is_whole) {
    store_whole<S>(params, shared, item, CONSUMER, first_row, o);
  } else {
    store_part<S>(params, cta, item, CONSUMER, first_row, place, o);
  }
}

template <class S>
__device__ __forceinline__ void store_result(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
                                             const Item& item, int consumer, const Result<S>& result,
                                             const int (&place)[S::COLUMNS]) {
  float factor[S::COLUMNS];
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) factor[i] = shared.factor[consumer][column_row(i)];
#pragma unroll
  for (int first_row = 0; first_row < S::ROWS; first_row += STAGED_ROWS) {
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

template <class S>
__device__ __forceinline__ void consumer_role(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
                                              int consumer) {
  Position<S> position;
  uint32_t q_phase = 0;
  uint32_t full_phases = 0;  // a bit per slot: parity of this consumer's next phase there
  int turn = 0;              // the consumer of an item's first unit
  int place[S::COLUMNS];     // Row::out of the thread's columns, < 0: no such row
#pragma unroll
  for (int i = 0; i < S::COLUMNS; ++i) {
    const Row& row = shared.row[column_row(i)];
    place[i] = row.lse < 0 ? -1 : row.out;
  }
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
    store_result<S>(params, shared, cta, item, consumer, result, place);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void decode(const DecodeParams& params) {
  static_assert(sizeof(Shared<S>) <= SHARED_LIMIT);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(dynamic_shared);
  const Cta cta = {(int)blockIdx.x / params.tiles, (int)blockIdx.x % params.tiles, 0};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < S::STAGES; ++slot) {
      for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(shared.full[consumer][slot], 1);
      mbarrier_init(shared.empty[slot], WARPGROUP / 32);  // warps of the unit's consumer
    }
    mbarrier_init(shared.q_full, 1);
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
