// Decode attention over FP8 rows on Hopper, any number of heads: dense_decode.cu's tile of 64 query rows, with the
// codes turned into bf16 on the way. Queries are bf16; 512 + 64 columns.
//
// A row of the pool is [512 e4m3 | 4 fp32 scales, of 128 columns each | 64 bf16]. Per unit of 64 cached tokens
//   V = codes * scales, in bf16; K = [V | rotated keys]
//   S = Q K^T                     64 x 576 . 576 x 64
//   P = 2^(S * scale - m)         64 x 64
//   O = O * alpha + P V           64 x 64 . 64 x 512
//
// Three warpgroups. `score` holds Q in registers and computes S and P. Two `value` warpgroups hold half of O's columns
// each; when O += P(n) V(n) has retired they convert unit n + 2 into the slot that unit n leaves, while `score` works
// on unit n + 1. They also load rows, half a unit at a time and one half ahead of the conversion; which rows these are
// the first warp of `score` looks up while it waits for S.
//
// Columns of V and of Q's latent part stand in another order than in the pool: of 16, position 8 h + 2 q + e holds
// column 4 q + h + 2 e. The even and the odd codes of a register are then parts of two chunks of 16 bytes, and a lane's
// part of a row of O is 8 adjacent bytes.
//
// Barriers, n = a unit's number among all of the CTA:
//   ready[n % 2]       value -> score     K and V are there
//   p_full[n % 2]      score -> value     P is stored, and rows of later units are looked up
// and a named one among the value warps, once per half. P(n) overwrites the rotated keys of unit n, which nothing reads
// after S(n). (One file of 750 lines: the three roles and their barriers are one protocol, read together or not at
// all.)
#include "item.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 64;  // query rows
constexpr int KV_LORA_RANK = 512;
constexpr int V_TILES = KV_LORA_RANK / TILE_COLUMNS;
constexpr int GROUP_COLUMNS = 128;  // that share a scale; as codes, 128 bytes per token
constexpr int GROUPS = KV_LORA_RANK / GROUP_COLUMNS;
constexpr int HALF_COLUMNS = KV_LORA_RANK / 2;  // of O, per value warpgroup

constexpr int NUM_THREADS = 3 * WARPGROUP;
constexpr int SCORE_REGISTERS = 184;
constexpr int VALUE_REGISTERS = 160;
static_assert(SCORE_REGISTERS + 2 * VALUE_REGISTERS <= 504);
constexpr int VALUE_WARPS = 8;
static_assert(VALUE_WARPS == V_TILES);  // a warp converts a tile

constexpr int REGISTER_STEPS = 30;  // of S over 16 latent columns; more do not fit into SCORE_REGISTERS
constexpr int TAIL_STEPS = KV_LORA_RANK / 16 - REGISTER_STEPS;
constexpr int STEP_BYTES = BLOCK_M * 16 * 2;

constexpr int SLOTS = 2;       // units as bf16
constexpr int ROPE_SLOTS = 4;  // rotated keys: two units converted, two more on their way
constexpr int HALF_TOKENS = BLOCK_N / 2;
constexpr int RAW_SLOTS = 3;     // halves of units as codes
constexpr int DESCRIPTIONS = 8;  // of halves, from the unit in work on
constexpr int PLACES = 8;
constexpr int GROUP_BYTES = HALF_TOKENS * GROUP_COLUMNS;
// From here on a scale times 2^120 may pass the end of fp32.
constexpr float LARGE_SCALE = 0x1p7f;

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int {
  BARRIER_SCORE = 1,
  BARRIER_VALUE = 2,  // and BARRIER_VALUE + 1
  BARRIER_BOTH = 4,   // of the value warpgroups
  BARRIER_ALL = 5
};

// A half of a unit.
struct Half {
  const int* from;  // of the block table: its first page; sparse: its first index
  int in_page;      // of the page's rows, the first token's
  int stored;       // tokens that count, 0 to HALF_TOKENS; < 0: there are no more units
};

// The walk over the halves of all units of the CTA. In shared memory because registers are short.
struct Walk {
  int row;  // of the plan, after the item in work; -1 = none
  int request;
  int length;     // tokens
  int unit;       // next to describe
  int units_end;  // == unit: nothing left
};

struct alignas(1024) Shared {
  uint8_t latent[SLOTS][V_TILES][TILE_BYTES];  // first: addresses count from the start
  uint8_t rope[ROPE_SLOTS][TILE_BYTES];        // rotated keys, then P; 128-byte swizzle
  uint8_t codes[RAW_SLOTS][GROUPS][GROUP_BYTES];
  uint8_t q_rope[TILE_BYTES];              // Q's rotated columns, 128-byte swizzle
  uint8_t q_tail[TAIL_STEPS][STEP_BYTES];  // Q's last latent steps, no swizzle
  float4 scales[RAW_SLOTS][HALF_TOKENS];
  float inverse_sum[ROPE_SLOTS][BLOCK_M];  // of an item, by its last unit; score is two units ahead at most
  uint64_t ready[SLOTS];
  uint64_t p_full[SLOTS];
  uint8_t rise[SLOTS][BLOCK_M];  // alpha = 2^-rise
  Half halves[DESCRIPTIONS];
  int place[PLACES][HALF_TOKENS];  // where rows are that are loaded next
  Walk walk;
  Cta cta;
};
static_assert(sizeof(Shared) <= SHARED_LIMIT);

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Made anew of the symbol each time, for descriptors in uniform registers: see dense_decode.cu.
__device__ __forceinline__ uint32_t shared_start() {
  uint32_t base;
  asm volatile("mov.u32 %0, dynamic_shared;" : "=r"(base));
  return base;
}
__device__ __forceinline__ uint32_t latent_address(int slot) { return shared_start() + slot * (V_TILES * TILE_BYTES); }
__device__ __forceinline__ uint32_t rope_address(int slot) {
  return shared_start() + SLOTS * V_TILES * TILE_BYTES + slot * TILE_BYTES;
}

// A unit's place, by its number among all of the CTA.
struct Place {
  int number = 0;
  __device__ __forceinline__ int slot() const { return number & 1; }
  __device__ __forceinline__ uint32_t phase() const { return number >> 1 & 1; }
  __device__ __forceinline__ int rope_slot() const { return number & 3; }
};
static_assert(SLOTS == 2 && ROPE_SLOTS == 4);

// Row of the tile of a thread's first accumulators; its others are 8 further down.
__device__ __forceinline__ int accumulator_row() {
  const int thread = thread_index() % WARPGROUP;
  return thread / 32 * 16 + thread % 32 / 4;
}

// --- which tokens, and their way to shared memory --------------------------------------------------------------------

// Moves the walk to the next item that has units.
__device__ __forceinline__ void next_item(const DecodeParams& params, Walk& walk) {
  for (int row = walk.row; row >= 0;) {
    const Item item = load_item(params, row);
    if (item.request < 0) break;
    row = item.next;
    if (item.num_units > 0) {
      walk = {row, item.request, item.length, item.first_unit, item.first_unit + item.num_units};
      return;
    }
  }
  walk.row = -1;
  walk.unit = walk.units_end = 0;  // nothing left
}

// Describes half `number` of the CTA's; each in turn.
template <bool IS_SPARSE>
__device__ __forceinline__ void describe_half(const DecodeParams& params, Shared& shared, int number) {
  Walk& walk = shared.walk;
  Half& half = shared.halves[number % DESCRIPTIONS];
  if (walk.unit == walk.units_end) {
    half.stored = -1;
    return;
  }
  const int token = walk.unit * BLOCK_N + number % 2 * HALF_TOKENS;
  const int page = IS_SPARSE ? 0 : params.block_size == BLOCK_N ? token / BLOCK_N : token / params.block_size;
  half.from = params.block_table + walk.request * params.table_stride_request +
              (IS_SPARSE ? token : page * params.table_stride_page);
  half.in_page = token - page * params.block_size;
  half.stored = max(0, min(HALF_TOKENS, walk.length - token));
  if (number % 2 == 0) return;
  const int unit = walk.unit + 1;
  if (unit == walk.units_end) {
    next_item(params, walk);
  } else {
    walk.unit = unit;
  }
}

// Begins to look up where the lane's row of half `number` is: its page, or, sparse, the row's index; < 0: nowhere.
template <bool IS_SPARSE>
__device__ __forceinline__ void look_up(const DecodeParams& params, Shared& shared, int number) {
  const Half& half = shared.halves[number % DESCRIPTIONS];
  const int row = thread_index() % 32;
  int& place = shared.place[number % PLACES][row];
  if (row >= half.stored) {
    place = -1;
    return;
  }
  const int* from = half.from;
  if (IS_SPARSE) {
    from += row;
  } else {
#pragma unroll 1
    for (int in_page = half.in_page + row; in_page >= params.block_size; in_page -= params.block_size) {
      from += params.table_stride_page;
    }
  }
  cp_async_4(shared_address(&place), from);
}

// For the first warp of `score`, at unit `unit`: what the loads of the unit three further on want to know, and
// describes the unit after that.
template <bool IS_SPARSE>
__device__ __forceinline__ void look_ahead(const DecodeParams& params, Shared& shared, int unit) {
#pragma unroll 1
  for (int number = 2 * unit + 6; number < 2 * unit + 8; ++number) {
    if (thread_index() == 0) describe_half<IS_SPARSE>(params, shared, number + 2);
    look_up<IS_SPARSE>(params, shared, number);
  }
  cp_async_commit_group();
}

// Begins to copy the thread's parts of its row of half `number` to raw slot `slot`; zeros where there is no row.
template <bool IS_SPARSE>
__device__ __forceinline__ void load_half(const GatherParams& gather, Shared& shared, int number, int slot,
                                          int thread) {
  const int row = thread / 8, chunk = thread % 8;
  const uint32_t at = row * 128 + ((chunk ^ (row & 7)) << 4);
  const int place = shared.place[number % PLACES][row];
  const bool is_row = place >= 0 && (!IS_SPARSE || place < gather.num_rows);
  uint32_t offset = 0;  // in steps of 16 bytes
  if (IS_SPARSE) {
    offset = place * gather.row_stride;
  } else {
    int in_page = shared.halves[number % DESCRIPTIONS].in_page + row;
#pragma unroll 1
    while (in_page >= gather.decode.block_size) in_page -= gather.decode.block_size;
    offset = place * gather.block_stride + in_page * gather.row_stride + shared.cta.kv_head * gather.head_stride;
  }
  const uint4* from = reinterpret_cast<const uint4*>(gather.pool) + (is_row ? offset : 0) + chunk;
  const int bytes = is_row ? 16 : 0;
  const uint32_t codes = shared_address(shared.codes) + slot * (GROUPS * GROUP_BYTES) + at;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    cp_async_16(codes + group * GROUP_BYTES, from + group * (GROUP_COLUMNS / 16), bytes);
  }
  const uint32_t rope = shared_address(shared.rope) + number % (2 * ROPE_SLOTS) * (HALF_TOKENS * 128) + at;
  cp_async_16(rope, from + (KV_LORA_RANK + 4 * GROUPS) / 16, bytes);
  if (chunk == 0) cp_async_16(shared_address(&shared.scales[slot][row]), from + KV_LORA_RANK / 16, bytes);
}

// --- score: S = Q K^T and P -----------------------------------------------------------------------------------------

// Of two registers the halves of the lower addresses, and of the higher ones.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

// Four parts of 16 bytes of tile `tile` of Q: rows 16 i + thread / 8. (Addresses are made anew for each tile:
// registers.)
__device__ __forceinline__ void load_q_tile(const GatherParams& gather, const Shared& shared, int request, int tile,
                                            uint4 (&part)[4]) {
  const int thread = thread_index() % WARPGROUP;
  const volatile Cta& now = shared.cta;
  const int kv_head = now.kv_head, first_row = now.first_row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + i * 16 + thread / 8;
    const uint16_t* from = gather.q + request * gather.q_stride_request + kv_head * gather.q_stride_head +
                           row * gather.q_stride_row + tile * TILE_COLUMNS + thread % 8 * 8;
    part[i] = row < gather.decode.seqlen_q * gather.decode.group ? *reinterpret_cast<const uint4*>(from)
                                                                 : make_uint4(0, 0, 0, 0);
  }
}

// Q: steps below REGISTER_STEPS as wgmma A fragments, the rest in shared memory. Tile by tile through the one that
// keeps the rotated columns, which come last.
__device__ __forceinline__ void take_q(const GatherParams& gather, Shared& shared, int request,
                                       uint32_t (&q)[REGISTER_STEPS][4]) {
  const uint32_t tile_start = shared_address(shared.q_rope);
  uint4 part[4];
  load_q_tile(gather, shared, request, 0, part);
#pragma unroll
  for (int tile = 0; tile <= V_TILES; ++tile) {
    const int thread = thread_index() % WARPGROUP, lane = thread % 32;
    const int first_row = thread / 8, chunk = thread % 8;
    if (tile > 0) bar_sync(BARRIER_SCORE, WARPGROUP);  // all have read the tile before
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 16 + first_row;
      const uint32_t to = tile_start + row * 128;
      if (tile == V_TILES) {
        st_shared_v4(to + ((chunk ^ (row & 7)) << 4), part[i]);
      } else {  // in the order of V's columns
        const uint32_t even = chunk / 2 * 2;
        st_shared_v2(to + ((even ^ (row & 7)) << 4) + chunk % 2 * 8,
                     make_uint2(low_halves(part[i].x, part[i].y), low_halves(part[i].z, part[i].w)));
        st_shared_v2(to + (((even + 1) ^ (row & 7)) << 4) + chunk % 2 * 8,
                     make_uint2(high_halves(part[i].x, part[i].y), high_halves(part[i].z, part[i].w)));
      }
    }
    if (tile == V_TILES) break;
    load_q_tile(gather, shared, request, tile + 1, part);
    bar_sync(BARRIER_SCORE, WARPGROUP);
    const int fragment_row = thread / 32 * 16 + (lane / 8 & 1) * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (tile * 4 + i == REGISTER_STEPS) break;
      ldmatrix_x4(q[tile * 4 + i], tile_start + fragment_row * 128 + (((2 * i + lane / 16) ^ (fragment_row & 7)) << 4));
    }
    if (tile == V_TILES - 1) {  // the last steps, to core matrices of 8 rows x 16 bytes
      const int row = thread / 2, half = thread % 2;
#pragma unroll
      for (int i = 0; i < TAIL_STEPS; ++i) {
        const int part = 2 * (4 - TAIL_STEPS + i) + half;
        st_shared_v4(shared_address(shared.q_tail[i]) + row / 8 * 256 + half * 128 + row % 8 * 16,
                     ld_shared_v4(tile_start + row * 128 + ((part ^ (row & 7)) << 4)));
      }
    }
  }
  fence_proxy_async();
  bar_sync(BARRIER_SCORE, WARPGROUP);
}

__device__ __forceinline__ void score_unit(Shared& shared, Place place, const uint32_t (&q)[REGISTER_STEPS][4],
                                           float (&s)[32]) {
  const uint64_t keys = matrix_descriptor(latent_address(place.slot()), 0, 1024, Swizzle::B128);
  const uint64_t rotated = matrix_descriptor(rope_address(place.rope_slot()), 0, 1024, Swizzle::B128);
  const uint64_t q_tail = matrix_descriptor(shared_address(shared.q_tail), 128, 256, Swizzle::NONE);
  const uint64_t q_rope = matrix_descriptor(shared_address(shared.q_rope), 0, 1024, Swizzle::B128);
  mbarrier_wait(shared.ready[place.slot()], place.phase());
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < REGISTER_STEPS; ++step) {
    wgmma_m64n64k16_registers<true>(s, q[step], advance(keys, step / 4 * TILE_BYTES + step % 4 * 32), step > 0);
  }
#pragma unroll
  for (int i = 0; i < TAIL_STEPS; ++i) {
    const int step = REGISTER_STEPS + i;
    wgmma_m64n64k16_shared<true>(s, advance(q_tail, i * STEP_BYTES),
                                 advance(keys, step / 4 * TILE_BYTES + step % 4 * 32), true);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma_m64n64k16_shared<true>(s, advance(q_rope, step * 32), advance(rotated, step * 32), true);
  }
  wgmma_commit_group();
}

// Writes the log-sums of an item's rows; `sum` is complete in every lane of a row's four.
__device__ __forceinline__ void store_log_sums(const DecodeParams& params, const Item& item, const Cta& tile,
                                               const float (&reference)[2], const float (&sum)[2]) {
  const int thread = thread_index() % WARPGROUP;
  if (thread % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    if (row >= params.seqlen_q * params.group) return;
    const float log_sum = reference[half] + lg2(sum[half]);
    if (item.is_whole) {
      const int query = row / params.group;
      const int head = tile.kv_head * params.group + row % params.group;
      const int64_t index = ((int64_t)item.request * params.num_heads + head) * params.seqlen_q + query;
      params.lse[index] = sum[half] == 0.f ? infinity() : log_sum * LN_2;
    } else {
      const int64_t index = sum_index(params, 0, item.partial(params, tile), row_index(params, tile, row));
      params.partial_sums[index] = sum[half] == 0.f ? -infinity() : log_sum;
    }
  }
}

template <bool IS_SPARSE>
__device__ __forceinline__ void score_role(const GatherParams& gather, Shared& shared) {
  const DecodeParams& params = gather.decode;
  if (thread_index() < 32) {
    if (thread_index() == 0) {
      shared.walk.row = shared.cta.plan_slot;
      next_item(params, shared.walk);
#pragma unroll 1
      for (int number = 0; number < DESCRIPTIONS; ++number) describe_half<IS_SPARSE>(params, shared, number);
    }
    __syncwarp();
#pragma unroll 1
    for (int number = 0; number < DESCRIPTIONS - 2; ++number) look_up<IS_SPARSE>(params, shared, number);
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }
  bar_sync(BARRIER_ALL, NUM_THREADS);
  Place place;
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    float reference[2] = {0.f, 0.f};  // of the maxima, log2; rises by whole numbers, so that alpha is exact
    float sum[2] = {0.f, 0.f};        // of this thread's columns
    int units_left, tokens_left;      // tokens from the current unit on that every row of the tile sees
    int request;
    const int* indices = nullptr;  // sparse: of the current unit
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      request = item.request;
      units_left = item.num_units;
      tokens_left = visible_tokens(params, item.length, shared.cta.first_row) - item.first_unit * BLOCK_N;
      if constexpr (IS_SPARSE) {
        indices = params.block_table + request * params.table_stride_request + item.first_unit * BLOCK_N;
      }
    }
    if (units_left > 0) {
      uint32_t q[REGISTER_STEPS][4];
      take_q(gather, shared, request, q);

      bool is_first = true;
      for (; units_left > 0; --units_left) {
        const int slot = place.slot();
        uint32_t named[2] = {~0u, ~0u};  // sparse: which tokens of the unit are rows of the pool
        if constexpr (IS_SPARSE) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int token = i * 32 + thread_index() % 32;
            const int index = token < tokens_left ? ld_global_nc(indices + token) : -1;
            named[i] = __ballot_sync(0xFFFFFFFF, index >= 0 && index < gather.num_rows);
          }
          indices += BLOCK_N;
        }
        float s[32];
        score_unit(shared, place, q, s);
        if (thread_index() < 32) look_ahead<IS_SPARSE>(params, shared, place.number);
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          s[i] = __fmaf_rn(s[i], params.softmax_scale_log2, -reference[i >> 1 & 1]);
        }
        if constexpr (IS_SPARSE) {
          if ((named[0] & named[1]) != ~0u) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
              const int column = (i >> 2) * 8 + thread_index() % 4 * 2 + (i & 1);
              s[i] = named[i >> 4] >> column % 32 & 1 ? s[i] : -infinity();
            }
          }
        } else if (tokens_left < BLOCK_N) {
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
        // Row of s[i] is i >> 1 & 1; two maxima and two sums per row keep the chains short.
        float top[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
        for (int i = 4; i < 32; ++i) top[i >> 1 & 1][i & 1] = fmaxf(top[i >> 1 & 1][i & 1], s[i]);
        top[0][0] = fmaxf(top[0][0], top[0][1]);
        top[1][0] = fmaxf(top[1][0], top[1][1]);
        uint32_t rises = 0;  // of the two rows, a byte each
        if (is_first || __any_sync(0xFFFFFFFF, fmaxf(top[0][0], top[1][0]) > RESCALE_ABOVE)) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float rise = top[half][0];
            rise = fmaxf(rise, __shfl_xor_sync(0xFFFFFFFF, rise, 1));
            rise = fmaxf(rise, __shfl_xor_sync(0xFFFFFFFF, rise, 2));
            // The first reference is the maximum itself: P = 1 there, which bf16 holds. Later it rises by whole
            // numbers.
            if (!is_first) rise = fmaxf(ceilf(rise), 0.f);
            if (rise == -infinity()) rise = 0.f;  // sees nothing here; a dense row nothing later either
            reference[half] += rise;
#pragma unroll
            for (int i = 0; i < 16; ++i) s[(i >> 1) * 4 + half * 2 + (i & 1)] -= rise;
            if (!is_first) {  // else there is nothing to rescale
              sum[half] *= ex2(-rise);
              rises |= (uint32_t)fminf(rise, 255.f) << 8 * half;  // 2^-255 is zero in fp32
            }
          }
        }
        // Until a row of the pool is named there is no score to refer to.
        is_first = IS_SPARSE && is_first && (named[0] | named[1]) == 0;
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

        // All warps have finished S(n), which reads the rotated keys that P overwrites. And what was looked up is
        // there.
        if (thread_index() < 32) cp_async_wait_group<0>();
        bar_sync(BARRIER_SCORE, WARPGROUP);
        const int thread = thread_index();
        {
          // Matrix m of a stmatrix is rows (m & 1) * 8.. of the warp's 16 and 16-byte chunk 2 * step + (m >> 1).
          const int lane = thread % 32;
          const int row = thread / 32 * 16 + (lane / 8 & 1) * 8 + lane % 8;
          const uint32_t p_row = shared_address(shared.rope[place.rope_slot()]) + row * 128;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            stmatrix_x4(p_row + (((2 * step + lane / 16) ^ (row & 7)) << 4),
                        pack<true>(s[8 * step + 0], s[8 * step + 1]), pack<true>(s[8 * step + 2], s[8 * step + 3]),
                        pack<true>(s[8 * step + 4], s[8 * step + 5]), pack<true>(s[8 * step + 6], s[8 * step + 7]));
          }
        }
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
              shared.inverse_sum[place.rope_slot()][sum_row + 8 * half] = sum[half] > 0.f ? 1.f / sum[half] : 0.f;
            }
          }
        }
        // P was written with ordinary stores; wgmma reads shared memory through the async proxy. Without this fence
        // the tensor core may read stale bytes: wrong numbers, no error.
        fence_proxy_async();
        __syncwarp();
        if (thread % 32 == 0) mbarrier_arrive(shared.p_full[slot]);
        ++place.number;
      }
    }
    const Item item = load_item(params, plan_row);
    store_log_sums(params, item, shared.cta, reference, sum);
    plan_row = item.next;
  }
}

// --- value: V from codes, O = O * alpha + P V -----------------------------------------------------------------------

// Two bf16 that add up to a scale times 2^120, each in both halves of a register; a large scale's to it times 2^60.
struct Scale {
  uint32_t high, low;
};
constexpr uint32_t BF16X2_TWO_60 = 0x5D805D80;

__device__ __forceinline__ bool is_large(float scale) { return fabsf(scale) >= LARGE_SCALE; }

__device__ __forceinline__ Scale split_scale(float scale) {
  scale *= is_large(scale) ? 0x1p60f : 0x1p120f;
  const uint32_t high = pack<true>(scale, scale);
  const float rest = scale - __int_as_float(high << 16);
  return {high, pack<true>(rest, rest)};
}

// Four codes times their scale, in bf16: the even ones, the odd ones. A code's bits are moved to where bf16 has its
// sign, exponent and mantissa, which is the value times 2^-120, subnormal ones included: 7 instructions for four codes.
// (With the instructions that convert e4m3 the kernel took as long.)
__device__ __forceinline__ void to_bf16(uint32_t codes, const Scale& scale, uint32_t& even, uint32_t& odd) {
  const uint32_t even_bits = codes << 4 & 0x07F007F0 | codes << 8 & 0x80008000;
  const uint32_t odd_bits = codes >> 4 & 0x07F007F0 | codes & 0x80008000;
  even = fma_bf16x2(even_bits, scale.high, mul_bf16x2(even_bits, scale.low));
  odd = fma_bf16x2(odd_bits, scale.high, mul_bf16x2(odd_bits, scale.low));
}

// Sixteen codes of a row to the chunks `2 * step` and the next.
__device__ __forceinline__ void convert_step(const uint4& from, uint32_t row, int step, const Scale& scale) {
  uint4 even, odd;
  to_bf16(from.x, scale, even.x, odd.x);
  to_bf16(from.y, scale, even.y, odd.y);
  to_bf16(from.z, scale, even.z, odd.z);
  to_bf16(from.w, scale, even.w, odd.w);
  st_shared_v4(row ^ 2 * step << 4, even);
  st_shared_v4(row ^ (2 * step + 1) << 4, odd);
}

// Half a unit's codes of the warp's tile of 64 columns, from raw slot `slot` to the tile's rows from `first_token` on;
// a lane per token.
__device__ __forceinline__ void convert_half(Shared& shared, int slot, uint32_t tile, int first_token, int thread) {
  const uint32_t lane = thread % 32, warp = thread / 32;
  const float scale = reinterpret_cast<const float*>(&shared.scales[slot][lane])[warp / 2];
  const bool has_large_scale = is_large(scale);
  // Addresses of the chunk that is number 0 but for the swizzle: number c is at this one, exclusive or 16 c.
  const uint32_t swizzle = (lane & 7) << 4;
  const uint32_t codes = shared_address(shared.codes) + slot * (GROUPS * GROUP_BYTES) + warp / 2 * GROUP_BYTES +
                         lane * 128 + (swizzle ^ warp % 2 << 6);
  const uint32_t row = tile + (first_token + lane) * 128 + swizzle;
  const Scale parts = split_scale(scale);
#pragma unroll
  for (int step = 0; step < 4; ++step) convert_step(ld_shared_v4(codes ^ step << 4), row, step, parts);
  if (has_large_scale) {
#pragma unroll 1
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const uint4 old = ld_shared_v4(row ^ chunk << 4);
      st_shared_v4(row ^ chunk << 4, {mul_bf16x2(old.x, BF16X2_TWO_60), mul_bf16x2(old.y, BF16X2_TWO_60),
                                      mul_bf16x2(old.z, BF16X2_TWO_60), mul_bf16x2(old.w, BF16X2_TWO_60)});
    }
  }
}

// Unit `unit`, if there is one: from its two halves to its slot.
template <bool IS_SPARSE>
__device__ __forceinline__ void convert(const GatherParams& gather, Shared& shared, int unit) {
  int number = 2 * unit;
  if (shared.halves[number % DESCRIPTIONS].stored < 0) return;
  const int thread = thread_index() - WARPGROUP;
  do {
    const int slot = (uint32_t)number % RAW_SLOTS;
    // This half's copies have ended, all but the last group. Those of all threads, behind the barrier; and all have
    // left the half before, whose slot the second one after this takes.
    cp_async_wait_group<1>();
    bar_sync(BARRIER_BOTH, VALUE_WARPS * 32);
    if (shared.halves[(number + 2) % DESCRIPTIONS].stored >= 0) {
      load_half<IS_SPARSE>(gather, shared, number + 2, slot == 0 ? RAW_SLOTS - 1 : slot - 1, thread);
    }
    cp_async_commit_group();
    const uint32_t tile = latent_address(number / 2 % SLOTS) + thread / 32 * TILE_BYTES;
    convert_half(shared, slot, tile, number % 2 * HALF_TOKENS, thread);
  } while (++number % 2 != 0);
  fence_proxy_async();
  __syncwarp();
  if (thread % 32 == 0) mbarrier_arrive(shared.ready[number / 2 - 1 & 1]);
}

// Row `lane / 4 + 8 * UPPER` of each warp's 16, times `scale`: to `out`, or to the partial results.
template <int UPPER>
__device__ __forceinline__ void store_row(const DecodeParams& params, const Shared& shared, const Item& item, int half,
                                          const float (&o)[HALF_COLUMNS / 2], float scale) {
  // Read again for each row: registers are short here.
  const volatile Cta& now = shared.cta;
  const Cta tile = {now.plan_slot, now.kv_head, now.first_row};
  const int thread = thread_index() % WARPGROUP;
  const int lane = thread % 32;
  const int tile_row = tile.first_row + thread / 32 * 16 + lane / 4 + 8 * UPPER;
  const bool is_row = tile_row < params.seqlen_q * params.group;
  const int row = row_index(params, tile, tile_row);
  const int rows = params.seqlen_q * params.num_heads;
  uint16_t* target;
  if (item.is_whole) {
    target = static_cast<uint16_t*>(params.out) + ((int64_t)item.request * rows + row) * KV_LORA_RANK;
  } else {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < HALF_COLUMNS / 2; ++i) {
      if ((i >> 1 & 1) == UPPER) top = fmaxf(top, fabsf(o[i]));
    }
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
    const PartialScale unit = partial_scale(top * scale);
    scale *= unit.inverse;
    const int partial = item.partial(params, tile);
    if (is_row && lane % 4 == 0) params.partial_sums[sum_index(params, 1 + half, partial, row)] = unit.unit;
    target = params.o_partial + ((int64_t)partial * rows + row) * KV_LORA_RANK;
  }
  if (!is_row) return;
  target += half * HALF_COLUMNS + lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < HALF_COLUMNS / 16; ++i) {
    const float a = o[8 * i + 2 * UPPER] * scale, b = o[8 * i + 2 * UPPER + 1] * scale;
    const float c = o[8 * i + 2 * UPPER + 4] * scale, d = o[8 * i + 2 * UPPER + 5] * scale;
    *reinterpret_cast<uint2*>(target + 16 * i) = item.is_whole ? make_uint2(pack<true>(a, c), pack<true>(b, d))
                                                               : make_uint2(pack<false>(a, c), pack<false>(b, d));
  }
}

template <int HALF, bool IS_SPARSE>
__device__ __forceinline__ void value_role(const GatherParams& gather, Shared& shared) {
  const DecodeParams& params = gather.decode;
  bar_sync(BARRIER_ALL, NUM_THREADS);
  if (shared.halves[0].stored >= 0) {
#pragma unroll 1
    for (int number = 0; number < RAW_SLOTS - 1; ++number) {
      load_half<IS_SPARSE>(gather, shared, number, number, thread_index() - WARPGROUP);
      cp_async_commit_group();
    }
#pragma unroll 1
    for (int unit = 0; unit < SLOTS; ++unit) convert<IS_SPARSE>(gather, shared, unit);
  }
  int unit = 0;  // among all of the CTA
  for (int plan_row = shared.cta.plan_slot; plan_row >= 0;) {
    int units_left;
    {
      const Item item = load_item(params, plan_row);
      if (item.request < 0) break;
      units_left = item.num_units;
    }
    float o[HALF_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < HALF_COLUMNS / 2; ++i) o[i] = 0.f;
    if (units_left > 0) {
      for (; units_left > 0; --units_left) {
        const Place place = {unit};
        const int slot = place.slot();
        mbarrier_wait(shared.p_full[slot], place.phase());
        {
          const int row = accumulator_row();
          const int rise0 = shared.rise[slot][row], rise1 = shared.rise[slot][row + 8];
          if (__any_sync(0xFFFFFFFF, (rise0 | rise1) != 0)) {
            const float alpha0 = ex2((float)-rise0), alpha1 = ex2((float)-rise1);
#pragma unroll
            for (int i = 0; i < HALF_COLUMNS / 2; ++i) o[i] *= (i >> 1 & 1) ? alpha1 : alpha0;
          }
        }
        const uint64_t p = matrix_descriptor(rope_address(place.rope_slot()), 0, 1024, Swizzle::B128);
        const uint64_t v = matrix_descriptor(latent_address(slot) + HALF * (V_TILES / 2 * TILE_BYTES), TILE_BYTES, 1024,
                                             Swizzle::B128);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_N / 16; ++step) {
          wgmma_m64k16_transposed<true>(o, advance(p, step * 32), advance(v, step * 2048), true);
        }
        wgmma_commit_group();
        wgmma_wait_group<0>();
        // All warps' products have read the tiles that are overwritten now, which are this warpgroup's own.
        bar_sync(BARRIER_VALUE + HALF, WARPGROUP);
        convert<IS_SPARSE>(gather, shared, unit + SLOTS);
        ++unit;
      }
    }
    const Item item = load_item(params, plan_row);
    const float* inverse_sum = shared.inverse_sum[unit + ROPE_SLOTS - 1 & ROPE_SLOTS - 1] + accumulator_row();
    store_row<0>(params, shared, item, HALF, o, item.num_units > 0 ? inverse_sum[0] : 0.f);
    store_row<1>(params, shared, item, HALF, o, item.num_units > 0 ? inverse_sum[8] : 0.f);
    plan_row = item.next;
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <bool IS_SPARSE>
__device__ __forceinline__ void decode(const GatherParams& gather) {
  const DecodeParams& params = gather.decode;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      mbarrier_init(shared.ready[slot], VALUE_WARPS);
      mbarrier_init(shared.p_full[slot], WARPGROUP / 32);
    }
    fence_mbarrier_init();
    const int tile = blockIdx.x % params.tiles;
    shared.cta = {(int)blockIdx.x / params.tiles, tile / params.row_tiles, tile % params.row_tiles * BLOCK_M};
  }
  // A launch's parameters are in no cache yet: fetched here they do not add to the chain of loads behind the wait.
  asm volatile("" ::"l"(params.items), "l"(params.cache_seqlens), "l"(params.block_table), "l"(gather.pool));
  __syncthreads();
  if (threadIdx.x / 32 == NUM_THREADS / 32 - 1) prefetch_chain(params, shared.cta);  // a warp whose work comes last
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();

  // Uniform to the compiler too, or it serialises the wgmmas.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    setmaxnreg_inc<SCORE_REGISTERS>();
    score_role<IS_SPARSE>(gather, shared);
  } else if (warpgroup == 1) {
    setmaxnreg_dec<VALUE_REGISTERS>();
    value_role<0, IS_SPARSE>(gather, shared);
  } else {
    setmaxnreg_dec<VALUE_REGISTERS>();
    value_role<1, IS_SPARSE>(gather, shared);
  }
}

#define DECODE_KERNEL(NAME, IS_SPARSE)                                                       \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                               \
      flash_fwd_splitkv_mla_fp8_kernel_##NAME(const __grid_constant__ GatherParams params) { \
    decode<IS_SPARSE>(params);                                                               \
  }

DECODE_KERNEL(bf16_512_64, false)
DECODE_KERNEL(sparse_bf16_512_64, true)
