// Decode attention over FP8 rows for up to 32 query rows per latent head, on Hopper: dense_decode_few.cu's form, whose
// tokens and columns of V stand on wgmma's 64-row side. That operand may come from registers, and there e4m3 becomes
// bf16 on its way: nothing is written back to shared memory. Queries are bf16.
//
// A row is [512 e4m3 | 4 fp32 scales, of 128 columns each | 64 bf16]. Per unit of 64 tokens, ROWS = 16 or 32, with
// codes C, g = 0..3 the group of 128 columns, scale[token][g]:
//   S^T = sum_g scale[.][g] (C_g Q_g^T) + rotated keys x rotated queries     64 x ROWS
//   P^T = 2^(S^T * softmax_scale_log2 - m)                                   64 x ROWS
//   O_g^T = O_g^T * alpha + C_g^T (scale[.][g] P^T)                          128 x 64 . 64 x ROWS
// Codes are exact in bf16. Scales multiply sums of products and P, in fp32, and never a latent: P is rounded once, as
// it is without scales.
//
// A code's bits are moved to where bf16 has its sign, exponent and mantissa: that is the value times 2^-120, the
// difference of the biases, subnormal codes included. Queries and P carry 2^60 each, so that no sum of products comes
// near the ends of fp32; scales carry 2^60 more for S, and O counts in 2^-60. (A scale of 2^67 and more would overflow;
// so would a query of 2^67.) Code 0x7f, which a writer gives to no number, is read as 480.
//
// Two consumer warpgroups share each unit: each has two groups, of which it makes its part of S^T and its half of O^T.
// They add up S^T by way of shared memory, and know the same maxima and sums. (With a unit each, as in
// dense_decode_few.cu, O^T takes all 512 columns of 32 rows: 128 registers, and ptxas spills 620 bytes.) Of the third
// warpgroup, one warp loads pages and three load Q. Barriers:
//   full[0][slot]      pages -> both consumers
//   empty[slot]        both consumers -> pages
//   q_full, q_empty    Q of an item: Q's warps -> both consumers -> Q's warps
//
// A unit is 41,984 bytes where bf16 rows are 73,728. Moving bits takes 7 instructions per 4 codes, twice per code: 900
// of the ~2,300 clocks that a unit's share of HBM takes to issue, and twice that in the integer pipe, which has half
// the lanes. A unit takes ~3,500 clocks at 16 rows. (One file of 570 lines: producers, consumers and their barriers are
// one protocol, read together or not at all.)
#include "few_rows.cuh"

constexpr int GROUP_COLUMNS = 128;  // that share a scale; as codes, a tile of 128 bytes per token
constexpr int GROUPS = KV_LORA_RANK / GROUP_COLUMNS;
constexpr int OWN_GROUPS = GROUPS / CONSUMERS;
static_assert(GROUPS == 4);  // of a float4

constexpr int CONSUMER_REGISTERS = 224;
constexpr int PRODUCER_REGISTERS = 56;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 504);
constexpr int Q_WARPS = 3;  // of the producers' warpgroup
constexpr int Q_BATCH = 3;  // rows that such a warp has under way at once

constexpr float TWO_60 = 0x1p60f;

struct alignas(1024) Unit {
  uint8_t latent[GROUPS][TILE_BYTES];
  uint8_t k_rope[TILE_BYTES];
  float4 scales[BLOCK_N];
};
constexpr int UNIT_BYTES = 64 * 656;
static_assert(sizeof(Unit) == UNIT_BYTES);

template <class S>
struct Shared;

template <int ROWS_, int STAGES_>
struct Shape {
  using Memory = Shared<Shape>;
  static constexpr int ROWS = ROWS_;      // wgmma's N
  static constexpr int STAGES = STAGES_;  // units
  static constexpr bool IS_BF16 = true;
  static constexpr int Q_TILE_BYTES = ROWS * TILE_COLUMNS * 2;
  static constexpr int COLUMNS = ROWS / 4;  // columns of S^T and O^T, that is query rows, of which a thread has a part
  static constexpr int TURNS = 1;
  static constexpr int O_TILES = HALF_TILES;
  static constexpr int Q_ARRIVALS = Q_WARPS;
  static constexpr int S_VECTORS = ROWS / 8;  // of S^T, that a thread has
  static_assert(ROWS % STAGED_ROWS == 0);
  static __device__ __forceinline__ Exchange& exchange(Memory& shared, int consumer) {
    return shared.own[consumer].exchange;
  }
};

// A consumer's own: during an item, and at its end.
template <class S>
union alignas(1024) Own {
  struct {
    uint8_t p[OWN_GROUPS][S::Q_TILE_BYTES];  // each ROWS rows of 64 tokens, 128-byte swizzle: P times a group's scales
    // The other one's part of S^T, from its thread of the same number; of even and of odd units, so that who is ahead
    // may write while this one reads.
    float4 scores[2][S::S_VECTORS][WARPGROUP];
  };
  Exchange exchange;
};

template <class S>
struct alignas(1024) Shared {
  Unit ring[S::STAGES];  // first: unit_address counts from the start
  uint8_t q[V_TILES][S::Q_TILE_BYTES];
  uint8_t q_rope[S::Q_TILE_BYTES];
  Own<S> own[CONSUMERS];
  float4 top[CONSUMERS][S::ROWS];  // maxima of a unit, of each warp's tokens
  float4 sum[CONSUMERS][S::ROWS];  // of an item
  float reference[CONSUMERS][S::ROWS];
  float factor[CONSUMERS][S::ROWS];  // by which an item's O is multiplied
  Row row[S::ROWS];
  // As in dense_decode_few.cu.
  uint64_t full[CONSUMERS][S::STAGES];
  uint64_t empty[S::STAGES];
  uint64_t q_full;
  uint64_t q_empty;
};

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Made anew of the symbol each time, for descriptors in uniform registers: see dense_decode.cu.
__device__ __forceinline__ uint32_t unit_address(int slot) {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base + slot * UNIT_BYTES;
}

// --- producers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_unit(const Fp8DecodeParams& fp8, const Cta& cta, const Item& item, Unit& target,
                                          uint64_t& full, int unit, const Place& place) {
  const DecodeParams& params = fp8.decode;
  if (params.box_rows == BLOCK_N) {
    mbarrier_arrive_expect_tx(full, UNIT_BYTES);
    tma_load_5d(target.scales, fp8.scale_map, full, 0, place.row, 0, cta.kv_head, place.page);
    tma_load_5d(target.k_rope, params.q_map, full, 0, place.row, 0, cta.kv_head, place.page);
    tma_load_5d(target.latent, params.kv_map, full, 0, place.row, 0, cta.kv_head, place.page);
    return;
  }
  const int token = (item.first_unit + unit) * BLOCK_N;
  // Boxes past the length are left out: their pages may not be looked up.
  const int boxes = min(BLOCK_N, item.length - token + params.box_rows - 1) / params.box_rows;
  mbarrier_arrive_expect_tx(full, boxes * params.box_rows * (UNIT_BYTES / BLOCK_N));
#pragma unroll 1
  for (int box = 0; box < boxes; ++box) {
    const int first = box * params.box_rows;
    const int page = page_of(params, item.request, token + first), row = (token + first) % params.block_size;
    tma_load_5d(target.scales + first, fp8.scale_map, full, 0, row, 0, cta.kv_head, page);
    tma_load_5d(target.k_rope + first * 128, params.q_map, full, 0, row, 0, cta.kv_head, page);
#pragma unroll 1
    for (int group = 0; group < GROUPS; ++group) {
      tma_load_5d(target.latent[group] + first * 128, params.kv_map, full, 0, row, group, cta.kv_head, page);
    }
  }
}

// A warp: all units of all items, as ring slots become free.
template <class S>
__device__ __forceinline__ void load_pages(const Fp8DecodeParams& fp8, Shared<S>& shared, const Cta& cta) {
  const DecodeParams& params = fp8.decode;
  const bool is_issuing = thread_index() % 32 == 0;
  Position<S> position;
  Item item = item_with_units(params, cta.plan_slot);
  Place places = places_of(params, item, 0);
  while (item.request >= 0) {
    Item next;
    Place next_places;
    for (int unit = 0; unit < item.num_units; ++unit) {
      if (unit % 32 == 0 && unit > 0) places = places_of(params, item, unit);
      const Place place = {__shfl_sync(0xFFFFFFFF, places.page, unit % 32),
                           __shfl_sync(0xFFFFFFFF, places.row, unit % 32)};
      if (is_issuing) {
        mbarrier_wait(shared.empty[position.slot], position.phase ^ 1);
        load_unit(fp8, cta, item, shared.ring[position.slot], shared.full[0][position.slot], unit, place);
      }
      __syncwarp();
      position = position.after(1);
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

// Two bf16 of one register times 2^60, as fp32.
__device__ __forceinline__ float2 times_two_60(uint32_t both) {
  return {__int_as_float(both << 16) * TWO_60, __int_as_float(both & 0xFFFF0000) * TWO_60};
}

// Eight latent columns of a query, chunk `chunk` of its 64, to shared memory: of 16 columns the even ones first, then
// the odd ones, which is the order of a consumer's keys (load_keys).
template <class S>
__device__ __forceinline__ void store_query(Shared<S>& shared, int row, int chunk, const uint4& columns) {
  const float2 a = times_two_60(columns.x), b = times_two_60(columns.y);
  const float2 c = times_two_60(columns.z), d = times_two_60(columns.w);
  uint8_t* target = shared.q[chunk / 8] + row * 128 + chunk % 2 * 8;
  const int even = chunk % 8 / 2 * 2;  // of the row's eight parts of 16 bytes
  *reinterpret_cast<uint2*>(target + ((even ^ (row & 7)) << 4)) =
      make_uint2(pack<true>(a.x, b.x), pack<true>(c.x, d.x));
  *reinterpret_cast<uint2*>(target + (((even + 1) ^ (row & 7)) << 4)) =
      make_uint2(pack<true>(a.y, b.y), pack<true>(c.y, d.y));
}

// Warp `warp` of Q_WARPS: its rows of Q of all items that have units. They pass through registers, to be put in order.
template <class S>
__device__ __forceinline__ void load_queries(const Fp8DecodeParams& fp8, Shared<S>& shared, const Cta& cta, int warp) {
  const DecodeParams& params = fp8.decode;
  const int lane = thread_index() % 32;
  uint32_t phase = 0;
  for (Item item = item_with_units(params, cta.plan_slot); item.request >= 0;
       item = item_with_units(params, item.next)) {
    mbarrier_wait(shared.q_empty, phase ^ 1);
    const uint16_t* request = fp8.q + item.request * fp8.q_stride_request + cta.kv_head * fp8.q_stride_head;
#pragma unroll 1
    for (int first = warp * Q_BATCH; first < S::ROWS; first += Q_WARPS * Q_BATCH) {
      uint4 columns[Q_BATCH][2];
      uint4 rotated = make_uint4(0, 0, 0, 0);  // eight lanes per row
#pragma unroll
      for (int i = 0; i < Q_BATCH; ++i) {
        const bool is_row = first + i < params.seqlen_q * params.group;
        const uint4* row = reinterpret_cast<const uint4*>(request + (first + i) * fp8.q_stride_row);
#pragma unroll
        for (int part = 0; part < 2; ++part) columns[i][part] = is_row ? row[part * 32 + lane] : make_uint4(0, 0, 0, 0);
        if (is_row && lane / 8 == i) rotated = row[64 + lane % 8];
      }
#pragma unroll
      for (int i = 0; i < Q_BATCH; ++i) {
        if (first + i >= S::ROWS) break;
#pragma unroll
        for (int part = 0; part < 2; ++part) store_query(shared, first + i, part * 32 + lane, columns[i][part]);
      }
      const int row = first + lane / 8;
      if (lane / 8 < Q_BATCH && row < S::ROWS) {
        *reinterpret_cast<uint4*>(shared.q_rope + row * 128 + ((lane % 8 ^ (row & 7)) << 4)) = rotated;
      }
    }
    // wgmma reads through the async proxy what was stored here.
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.q_full);
    phase ^= 1;
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

// Four codes of a register as bf16 times 2^-120: the first and the third, the second and the fourth.
__device__ __forceinline__ void to_bf16(uint32_t codes, uint32_t& even, uint32_t& odd) {
  const uint32_t shifted = codes << 8;
  even = (shifted & 0x7F007F00) >> 4 | shifted & 0x80008000;
  odd = (codes & 0x7F007F00) >> 4 | codes & 0x80008000;
}

// Keys of the warp's 16 tokens, 32 columns from 16-byte part `part` of a group's tile on: two k-steps. A lane gets four
// adjacent codes where a fragment has two pairs eight columns apart: so columns are contracted in another order than
// they lie in, even ones before odd ones, and queries are stored likewise.
__device__ __forceinline__ void load_keys(uint32_t tile, int part, uint32_t (&a)[2][4]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  const int token = 16 * warp + (lane / 8 & 1) * 8 + lane % 8;
  uint32_t codes[4];
  ldmatrix_x4(codes, tile + token * 128 + (((part + lane / 16) ^ (token & 7)) << 4));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    to_bf16(codes[2 * step], a[step][0], a[step][2]);
    to_bf16(codes[2 * step + 1], a[step][1], a[step][3]);
  }
}

// Values of 32 tokens from `token` on, of the warp's 16 of the 64 columns from 16-byte part `part` of a group's tile
// on: two k-steps. Transposed, a lane gets two adjacent columns of two tokens: so row r of a fragment is column 2 r,
// row r + 8 column 2 r + 1.
__device__ __forceinline__ void load_values(uint32_t tile, int part, int token, uint32_t (&a)[2][4]) {
  const int lane = thread_index() % 32, warp = thread_index() % WARPGROUP / 32;
  token += lane;
  uint32_t codes[4];
  ldmatrix_x4_trans(codes, tile + token * 128 + (((part + warp) ^ (token & 7)) << 4));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    to_bf16(codes[2 * step], a[step][0], a[step][1]);
    to_bf16(codes[2 * step + 1], a[step][2], a[step][3]);
  }
}

// Adds products of codes and queries, times their group's scales, to the scores; and leaves zeros.
template <class S>
__device__ __forceinline__ void fold(float (&part)[S::ROWS / 2], const float (&scales)[2][GROUPS], int group,
                                     float (&s)[S::ROWS / 2]) {
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) {
    s[i] = __fmaf_rn(part[i], scales[i >> 1 & 1][group], s[i]);
    part[i] = 0.f;
  }
}

// P of the scores, which count from the references: times the scales of each of the consumer's groups to shared memory,
// rounded; and sums over the thread's tokens.
template <class S>
struct ScaledP {
  Shared<S>& shared;
  int consumer;
  const float (&scales)[2][OWN_GROUPS];  // times 2^60, of the thread's two tokens
  __device__ __forceinline__ void operator()(const float (&s)[S::ROWS / 2], float (&sum)[S::COLUMNS]) const {
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
    for (int group = 0; group < OWN_GROUPS; ++group) {
      const float low = scales[0][group], high = scales[1][group];
#pragma unroll
      for (int pair = 0; pair < S::ROWS / 16; ++pair) {
        const int row = pair * 16 + lane / 16 * 8 + lane % 8;
        const float* values = p + 8 * pair;
        stmatrix_x4_trans(shared_address(shared.own[consumer].p[group]) + row * 128 + ((chunk ^ (row & 7)) << 4),
                          pack<true>(values[0] * low, values[1] * low), pack<true>(values[2] * high, values[3] * high),
                          pack<true>(values[4] * low, values[5] * low), pack<true>(values[6] * high, values[7] * high));
      }
    }
  }
};

// Adds the other consumer's part of the scores to this one's, and the other way round.
template <class S>
__device__ __forceinline__ void add_up(Shared<S>& shared, int consumer, int unit, float (&s)[S::ROWS / 2]) {
  const int thread = thread_index() % WARPGROUP;
  auto& given = shared.own[1 - consumer].scores[unit & 1];
  auto& taken = shared.own[consumer].scores[unit & 1];
#pragma unroll
  for (int i = 0; i < S::S_VECTORS; ++i) {
    given[i][thread] = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
  }
  bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
#pragma unroll
  for (int i = 0; i < S::S_VECTORS; ++i) {
    const float4 four = taken[i][thread];
    s[4 * i] += four.x;
    s[4 * i + 1] += four.y;
    s[4 * i + 2] += four.z;
    s[4 * i + 3] += four.w;
  }
}

// One unit: this consumer's part of S^T, P^T, and its half of O^T.
template <class S>
__device__ __forceinline__ void share(const DecodeParams& params, Shared<S>& shared, const Item& item, int consumer,
                                      int unit, Position<S> position, Result<S>& result) {
  const int stored = item.length - (item.first_unit + unit) * BLOCK_N;  // tokens, from the unit's first on
  const int token = thread_index() % WARPGROUP / 32 * 16 + thread_index() % 32 / 4;
  const uint32_t base = unit_address(position.slot);
  const uint32_t own_codes = base + consumer * OWN_GROUPS * TILE_BYTES;
  const uint64_t q = matrix_descriptor(shared_address(shared.q) + consumer * (OWN_GROUPS * 2 * S::Q_TILE_BYTES), 0,
                                       1024, Swizzle::B128);
  // Of the rotated columns, half.
  const uint64_t q_rope = matrix_descriptor(shared_address(shared.q_rope) + consumer * 64, 0, 1024, Swizzle::B128);
  const uint64_t k_rope = matrix_descriptor(base + GROUPS * TILE_BYTES + consumer * 64, 0, 1024, Swizzle::B128);
  float s[S::ROWS / 2], part[OWN_GROUPS][S::ROWS / 2], scales[2][OWN_GROUPS];
#pragma unroll
  for (int i = 0; i < S::ROWS / 2; ++i) s[i] = part[0][i] = part[1][i] = 0.f;

  mbarrier_wait(shared.full[0][position.slot], position.phase);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2* both = reinterpret_cast<const float2*>(&shared.ring[position.slot].scales[token + 8 * i]);
    const float2 own = both[consumer];
    // What lies past the length may be anything, and 0 * NaN is NaN.
    scales[i][0] = token + 8 * i < stored ? own.x * TWO_60 : 0.f;
    scales[i][1] = token + 8 * i < stored ? own.y * TWO_60 : 0.f;
  }
#pragma unroll
  for (int group = 0; group < OWN_GROUPS; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of 64 columns
      uint32_t keys[2][2][4];
      load_keys(own_codes + group * TILE_BYTES, half * 4, keys[0]);
      load_keys(own_codes + group * TILE_BYTES, half * 4 + 2, keys[1]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma_m64k16_narrow_registers(part[group], keys[step / 2][step % 2],
                                      advance(q, (group * 2 + half) * S::Q_TILE_BYTES + step * 32));
      }
      wgmma_commit_group();
      wgmma_wait_group<1>();  // of the half before: its registers may take other keys
    }
  }
  // The rotated keys come last: in flight beside products from registers, ptxas would serialise them all (C7518).
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    wgmma_m64k16_narrow<true, false>(s, advance(k_rope, step * 32), advance(q_rope, step * 32));
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  if (unit + 1 == item.num_units) {  // Q may go
    __syncwarp();
    if (thread_index() % 32 == 0) mbarrier_arrive(shared.q_empty);
  }
#pragma unroll
  for (int group = 0; group < OWN_GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) s[i] = __fmaf_rn(part[group][i], scales[i >> 1 & 1][group], s[i]);
  }
  add_up<S>(shared, consumer, unit, s);
  probabilities<S>(params, shared, item, consumer, unit, s, ScaledP<S>{shared, consumer, scales}, result);

#pragma unroll
  for (int tile = 0; tile < HALF_TILES; ++tile) {
    const uint64_t p = matrix_descriptor(shared_address(shared.own[consumer].p[tile / 2]), 0, 1024, Swizzle::B128);
    uint32_t values[2][2][4];
    load_values(own_codes + tile / 2 * TILE_BYTES, tile % 2 * 4, 0, values[0]);
    load_values(own_codes + tile / 2 * TILE_BYTES, tile % 2 * 4, 32, values[1]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) {
      wgmma_m64k16_narrow_registers(result.o[tile], values[step / 2][step % 2], advance(p, step * 32));
    }
    wgmma_commit_group();
    wgmma_wait_group<1>();
  }
  wgmma_wait_group<0>();
  __syncwarp();
  if (thread_index() % 32 == 0) mbarrier_arrive(shared.empty[position.slot]);
}

// The factors of O to shared memory, the log-sums to memory. Both consumers know the same sums.
template <class S>
__device__ __forceinline__ void finish_sums(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
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
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
  if (thread < S::ROWS) {
    const float4 all = shared.sum[consumer][thread];
    const float total = (all.x + all.y) + (all.z + all.w);
    const float log_sum = total == 0.f ? -infinity() : shared.reference[consumer][thread] + lg2(total);
    shared.factor[consumer][thread] = total == 0.f ? 0.f : __fdividef(TWO_60, total);
    const Row& row = shared.row[thread];
    if (consumer == 0 && row.lse >= 0) {
      if (item.is_whole) {
        const int64_t first = (int64_t)item.request * params.seqlen_q * params.num_heads;
        params.lse[first + row.lse] = log_sum == -infinity() ? infinity() : log_sum * LN_2;
      } else {
        params.partial_sums[sum_index(params, 0, item.partial(params, cta), row.out)] = log_sum;
      }
    }
  }
  bar_sync(BARRIER_CONSUMER + consumer, WARPGROUP);
}

// Accumulators that hold columns 2 r and 2 r + 1 of a warp's 16, r = lane / 4, become those of columns r and r + 8.
__device__ __forceinline__ void part_columns(float (&o)[HALF_TILES][STAGED_ROWS / 2]) {
  const int lane = thread_index() % 32;
  const int from = lane / 8 * 4 + lane % 4;  // r / 2; of column r + 8, four further on
  const bool is_odd = lane & 4;
#pragma unroll
  for (int tile = 0; tile < HALF_TILES; ++tile) {
#pragma unroll
    for (int column = 0; column < STAGED_ROWS / 4; ++column) {
      const int at = column / 2 * 4 + column % 2;
      const float low[2] = {__shfl_sync(0xFFFFFFFF, o[tile][at], from), __shfl_sync(0xFFFFFFFF, o[tile][at + 2], from)};
      const float high[2] = {__shfl_sync(0xFFFFFFFF, o[tile][at], from + 16),
                             __shfl_sync(0xFFFFFFFF, o[tile][at + 2], from + 16)};
      o[tile][at] = is_odd ? low[1] : low[0];
      o[tile][at + 2] = is_odd ? high[1] : high[0];
    }
  }
}

// A consumer's half of O, 16 rows at a time.
template <class S>
__device__ __forceinline__ void store_half(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
                                           const Item& item, int consumer, const Result<S>& result,
                                           const int (&place)[S::COLUMNS]) {
#pragma unroll
  for (int first_row = 0; first_row < S::ROWS; first_row += STAGED_ROWS) {
    float o[HALF_TILES][STAGED_ROWS / 2];
#pragma unroll
    for (int i = 0; i < STAGED_ROWS / 2; ++i) {
      const float factor = shared.factor[consumer][column_row(column_of(first_row / 2 + i))];
#pragma unroll
      for (int tile = 0; tile < HALF_TILES; ++tile) o[tile][i] = result.o[tile][first_row / 2 + i] * factor;
    }
    part_columns(o);
    if (item.is_whole) {
      store_whole<S>(params, shared, item, consumer, first_row, o);
    } else {
      store_part<S>(params, cta, item, consumer, first_row, place, o);
    }
  }
}

template <class S>
__device__ __forceinline__ void consumer_role(const DecodeParams& params, Shared<S>& shared, const Cta& cta,
                                              int consumer) {
  Position<S> position;
  uint32_t q_phase = 0;
  int place[S::COLUMNS];  // Row::out of the thread's columns, < 0: no such row
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
    for (int tile = 0; tile < HALF_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < S::ROWS / 2; ++i) result.o[tile][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS; ++i) result.reference[i] = result.sum[i] = 0.f;
    if (item.num_units > 0) {
      mbarrier_wait(shared.q_full, q_phase);
      q_phase ^= 1;
      for (int unit = 0; unit < item.num_units; ++unit) {
        share<S>(params, shared, item, consumer, unit, position, result);
        position = position.after(1);
      }
    }
    finish_sums<S>(params, shared, cta, item, consumer, result);
    store_half<S>(params, shared, cta, item, consumer, result, place);
    // Nobody writes scores of the next item where the other one still turns its half.
    bar_sync(BARRIER_BOTH, CONSUMERS * WARPGROUP);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void decode(const Fp8DecodeParams& fp8) {
  static_assert(sizeof(Shared<S>) <= SHARED_LIMIT);
  const DecodeParams& params = fp8.decode;
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(dynamic_shared);
  const Cta cta = {(int)blockIdx.x / params.tiles, (int)blockIdx.x % params.tiles, 0};
  begin_cta<S>(params, shared, cta);

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == CONSUMERS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) % (WARPGROUP / 32);
    if (warp == 0) {
      load_pages<S>(fp8, shared, cta);
    } else {
      load_queries<S>(fp8, shared, cta, warp - 1);
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consumer_role<S>(params, shared, cta, warpgroup);
  }
}

#define DECODE_KERNEL(NAME, ROWS, STAGES)                                                       \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                                  \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ Fp8DecodeParams params) { \
    decode<Shape<ROWS, STAGES>>(params);                                                        \
  }

DECODE_KERNEL(few16_bf16_512_64, 16, 4)
DECODE_KERNEL(few32_bf16_512_64, 32, 3)
