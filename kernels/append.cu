// Writes new tokens into their pages: row slots[b, j] of the pool becomes [latent[b, j] | k_rope[b, j]], per latent
// head.
//
// Rows are moved as bytes, in units of WIDTH bytes: 16 where every address, stride and length allows it, else 8, 4
// or 2. One warp moves one row (DeepSeek's: 512 + 64 columns of 2 bytes = 72 units of 16 bytes, up to 3 per lane). Its
// first 2 KiB are on their way before the slot is known and before anything is stored: 48 warps per SM (40 registers
// each) have 54 KiB of such rows in flight, where 27 to 33 KiB keep HBM busy.
//
// Into a pool of FP8 rows (src/flash_mla/codec.py has their bytes) a row goes encoded, also by one warp: a lane has 16
// columns, eight lanes the 128 that share a scale. With s = max |x| / 448 of those, in fp32 and at least 2^-100,
//   code = e4m3(x / s)          both divisions rounded by IEEE, the code to nearest, ties to even
// so that the bytes are those of every other writer. DeepSeek's row of bf16, 1,152 bytes, is on its way before the slot
// is known: 40 warps per SM (48 registers each) have 45 KiB in flight. 656 bytes go out.
//
// The same launch may place the rotated columns of the queries behind the latent ones (absorbed form: `q` gets its
// latent columns from a matrix product that writes there directly). They take CTAs of their own, one unit per thread.

using int64 = long long;

constexpr int WARP = 32;
// Units per lane in flight. 4 x 32 x 16 bytes = 2 KiB, a whole row of every published model in 2-byte dtypes.
constexpr int UNROLL = 4;

// FP8 rows. The codes of a lane's columns are one store of 16 bytes.
constexpr int LANE_COLUMNS = 16;
constexpr int PASS_COLUMNS = WARP * LANE_COLUMNS;  // 512: the latent of every published model
constexpr int COLUMNS_PER_SCALE = 128;
constexpr int SCALE_LANES = COLUMNS_PER_SCALE / LANE_COLUMNS;
static_assert(SCALE_LANES == 8);
constexpr float LARGEST = 448;               // of e4m3
constexpr float SMALLEST_SCALE = 0x1p-100f;  // a scale is never zero

// Mirrored in src/flash_mla/backends/cuda/append.py.
struct AppendParams {
  char* kv_cache;      // [num_blocks, block_size, h_kv, d_qk], or FP8 rows: bytes [num_blocks, block_size, h_kv, row]
  const char* latent;  // [batch, seqlen_q, h_kv, kv_lora_rank]
  const char* k_rope;  // [batch, seqlen_q, h_kv, qk_rope_head_dim]
  const char* slots;   // int64 [batch, seqlen_q], block * block_size + offset
  const char* q_rope;  // [batch, seqlen_q, num_heads, qk_rope_head_dim]
  char* q;             // where the rotated columns of q begin: [batch, seqlen_q, num_heads, qk_rope_head_dim]
  // All strides in bytes; the columns of a row are adjacent.
  int64 kv_stride_block, kv_stride_token, kv_stride_head;
  int64 latent_stride_batch, latent_stride_token, latent_stride_head;
  int64 rope_stride_batch, rope_stride_token, rope_stride_head;
  int64 slots_stride_batch, slots_stride_token;
  int64 q_rope_stride_batch, q_rope_stride_token, q_rope_stride_head;
  int64 q_stride_batch, q_stride_token, q_stride_head;
  unsigned num_rows;  // batch * seqlen_q * h_kv
  unsigned seqlen_q;
  unsigned h_kv;
  unsigned block_size;  // tokens
  int latent_bytes;     // kv_lora_rank columns, in the dtype that they come in
  int row_bytes;        // kv_lora_rank + qk_rope_head_dim columns, likewise
  unsigned num_heads;   // of q
  unsigned q_rows;      // batch * seqlen_q * num_heads; 0: no queries are to be placed
};
static_assert(sizeof(AppendParams) == 216);

// Where a row comes from, and where its slot is written down.
struct Source {
  const char* latent;
  const char* k_rope;
  const char* slot;
  unsigned head;
};

__device__ __forceinline__ Source source_of(const AppendParams& p, unsigned row) {
  const unsigned head = row % p.h_kv;
  const int64 token = row / p.h_kv % p.seqlen_q;
  const int64 request = row / p.h_kv / p.seqlen_q;
  return {p.latent + request * p.latent_stride_batch + token * p.latent_stride_token + head * p.latent_stride_head,
          p.k_rope + request * p.rope_stride_batch + token * p.rope_stride_token + head * p.rope_stride_head,
          p.slots + request * p.slots_stride_batch + token * p.slots_stride_token, head};
}

// The host refuses pools of 2^32 tokens and more (4.5 TiB in DeepSeek's shape), so a slot is divided in 32 bits; the
// quotient is widened before it is multiplied: block x 73,728 bytes overflows int32 from block 29,128 on.
__device__ __forceinline__ char* target_of(const AppendParams& p, int64 slot, unsigned head) {
  const int64 block = static_cast<unsigned>(slot) / p.block_size;
  const int64 offset = static_cast<unsigned>(slot) % p.block_size;
  return p.kv_cache + block * p.kv_stride_block + offset * p.kv_stride_token + head * p.kv_stride_head;
}

// --- queries --------------------------------------------------------------------------------------------------------

// Unit number `index` of the rotated columns of all queries. 32 bits suffice: the host refuses 2^31 rows of q and more,
// and copies where rows times units of a row would not fit.
template <typename Unit>
__device__ __forceinline__ void place_query(const AppendParams& p, unsigned index) {
  const unsigned units = static_cast<unsigned>(p.row_bytes - p.latent_bytes) / sizeof(Unit);  // of a row
  const unsigned row = index / units;
  if (row >= p.q_rows) return;
  const int64 byte = index % units * sizeof(Unit);
  const int64 head = row % p.num_heads;
  const int64 token = row / p.num_heads % p.seqlen_q;
  const int64 request = row / p.num_heads / p.seqlen_q;
  const char* source =
      p.q_rope + request * p.q_rope_stride_batch + token * p.q_rope_stride_token + head * p.q_rope_stride_head;
  char* target = p.q + request * p.q_stride_batch + token * p.q_stride_token + head * p.q_stride_head;
  *reinterpret_cast<Unit*>(target + byte) = *reinterpret_cast<const Unit*>(source + byte);
}

// --- rows as they come ----------------------------------------------------------------------------------------------

// The lane's share of one pass over a row: units at `first` bytes and every WARP units from there, as far as the row
// goes.
template <typename Unit>
__device__ __forceinline__ void load(const char* latent, const char* k_rope, const AppendParams& p, int first,
                                     Unit (&units)[UNROLL]) {
#pragma unroll
  for (int i = 0; i < UNROLL; ++i) {
    const int byte = first + i * WARP * static_cast<int>(sizeof(Unit));
    if (byte < p.row_bytes) {
      const char* source = byte < p.latent_bytes ? latent + byte : k_rope + (byte - p.latent_bytes);
      units[i] = *reinterpret_cast<const Unit*>(source);
    }
  }
}

template <typename Unit>
__device__ __forceinline__ void store(char* target, const AppendParams& p, int first, const Unit (&units)[UNROLL]) {
#pragma unroll
  for (int i = 0; i < UNROLL; ++i) {
    const int byte = first + i * WARP * static_cast<int>(sizeof(Unit));
    if (byte < p.row_bytes) *reinterpret_cast<Unit*>(target + byte) = units[i];
  }
}

template <typename Unit>
__device__ __forceinline__ void append_row(const AppendParams& p) {
  constexpr int PASS = UNROLL * WARP * sizeof(Unit);  // bytes
  const unsigned warps = blockDim.x / WARP;
  const unsigned append_ctas = (p.num_rows + warps - 1) / warps;
  if (blockIdx.x >= append_ctas) {
    place_query<Unit>(p, (blockIdx.x - append_ctas) * blockDim.x + threadIdx.x);
    return;
  }
  const unsigned row = blockIdx.x * warps + threadIdx.x / WARP;
  if (row >= p.num_rows) return;
  const Source from = source_of(p, row);

  Unit units[UNROLL];
  int first = threadIdx.x % WARP * sizeof(Unit);
  const int64 slot = *reinterpret_cast<const int64*>(from.slot);
  load(from.latent, from.k_rope, p, first, units);

  char* target = target_of(p, slot, from.head);
  store(target, p, first, units);
#pragma unroll 1
  for (first += PASS; first < p.row_bytes; first += PASS) {
    load(from.latent, from.k_rope, p, first, units);
    store(target, p, first, units);
  }
}

// --- FP8 rows -------------------------------------------------------------------------------------------------------

// Two fp32 to two codes; `low` is the column of the lower address. NaN becomes 0x7f, what is past 448 becomes 448.
__device__ __forceinline__ unsigned cvt_rn_satfinite_e4m3x2(float low, float high) {
  unsigned short codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// Two fp32 to two bf16, likewise.
__device__ __forceinline__ unsigned cvt_rn_bf16x2(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float cvt_f32_f16(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

enum Dtype { BF16, FP16, FP32 };

// Columns 2 * pair and the next of those whose bytes `words` holds; exact.
template <Dtype DTYPE>
__device__ __forceinline__ float2 columns(const unsigned* words, int pair) {
  if constexpr (DTYPE == FP32) {
    return {__uint_as_float(words[2 * pair]), __uint_as_float(words[2 * pair + 1])};
  } else if constexpr (DTYPE == BF16) {
    return {__uint_as_float(words[pair] << 16), __uint_as_float(words[pair] & 0xffff0000u)};
  } else {
    return {cvt_f32_f16(static_cast<unsigned short>(words[pair])),
            cvt_f32_f16(static_cast<unsigned short>(words[pair] >> 16))};
  }
}

// The lane's columns, in as many units of 16 bytes as a column has bytes.
template <int BYTES>
__device__ __forceinline__ void load_columns(const char* source, bool is_there, unsigned (&words)[4 * BYTES]) {
#pragma unroll
  for (int i = 0; i < BYTES; ++i) {
    const uint4 unit = is_there ? reinterpret_cast<const uint4*>(source)[i] : uint4{0, 0, 0, 0};
    words[4 * i] = unit.x, words[4 * i + 1] = unit.y, words[4 * i + 2] = unit.z, words[4 * i + 3] = unit.w;
  }
}

// The scale of the lane's columns and of its seven neighbours'. As unsigned integers magnitudes are in order, with
// infinity and NaN past all others: a maximum of those, unlike fmaxf, does not pass over NaN.
template <Dtype DTYPE>
__device__ __forceinline__ float scale_of(const unsigned* words) {
  unsigned largest = 0;
#pragma unroll
  for (int pair = 0; pair < LANE_COLUMNS / 2; ++pair) {
    const float2 value = columns<DTYPE>(words, pair);
    largest = max(largest, __float_as_uint(value.x) & 0x7fffffffu);
    largest = max(largest, __float_as_uint(value.y) & 0x7fffffffu);
  }
#pragma unroll
  for (int distance = SCALE_LANES / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  const float scale = fmaxf(__fdiv_rn(__uint_as_float(largest), LARGEST), SMALLEST_SCALE);
  return largest < 0x7f800000u ? scale : __uint_as_float(0x7fc00000u);
}

// x / scale in fp32: what IEEE's division gives, wherever that decides a code. In four instructions per column, which
// overlap with those of other columns; a compiled division is a dozen and a branch, one column after the other (1,072
// instructions in append_fp8_bf16 in place of 816).
//
// `first` is off by less than two of its last bits, and what is missing, excess / scale, is found from a remainder that
// is exact in an fma unless it underflows; `up`, a power of two, keeps it from that where the quotient is 2^-11 or
// more. (Without it 132 of 1.5e9 quotients beside a tie come out on its other side where the scale is the smallest.)
// Smaller ones keep their sign and become code 0 in any case: the first tie is at 2^-10.
// tests/test_append_on_host.py has the comparison with IEEE's, for every mantissa of a scale around every tie.
struct Divisor {
  float up;
  float scale, reciprocal;  // of the scale times up
};

__device__ __forceinline__ Divisor divisor_of(float scale) {
  const float up = scale < 0x1p-60f ? 0x1p64f : 1.0f;
  return {up, __fmul_rn(scale, up), __frcp_rn(__fmul_rn(scale, up))};
}

__device__ __forceinline__ float quotient(float x, const Divisor& by) {
  const float dividend = __fmul_rn(x, by.up);
  const float first = __fmul_rn(dividend, by.reciprocal);
  // Of this sign, so that -0 stays -0: the other way round it would end as 0 - 0 * reciprocal = +0.
  const float excess = __fmaf_rn(first, by.scale, -dividend);
  return __fmaf_rn(-excess, by.reciprocal, first);
}

// Four columns, from the first of pair number `pair` on.
template <Dtype DTYPE>
__device__ __forceinline__ unsigned encode(const unsigned* words, int pair, const Divisor& by) {
  const float2 low = columns<DTYPE>(words, pair), high = columns<DTYPE>(words, pair + 1);
  return cvt_rn_satfinite_e4m3x2(quotient(low.x, by), quotient(low.y, by)) |
         cvt_rn_satfinite_e4m3x2(quotient(high.x, by), quotient(high.y, by)) << 16;
}

// The lane's columns from number `column` on, and their scale, into the row at `target`. All lanes of a warp come here.
template <Dtype DTYPE>
__device__ __forceinline__ void store_columns(char* target, const unsigned* words, int column, int kv_lora_rank) {
  const float scale = scale_of<DTYPE>(words);
  if (column >= kv_lora_rank) return;
  const Divisor by = divisor_of(scale);
  *reinterpret_cast<uint4*>(target + column) = {encode<DTYPE>(words, 0, by), encode<DTYPE>(words, 2, by),
                                                encode<DTYPE>(words, 4, by), encode<DTYPE>(words, 6, by)};
  if (column % COLUMNS_PER_SCALE == 0) {
    reinterpret_cast<float*>(target + kv_lora_rank)[column / COLUMNS_PER_SCALE] = scale;
  }
}

// Two rotated columns, in one or two words.
template <int WORDS>
__device__ __forceinline__ void load_pair(const char* source, unsigned (&words)[WORDS]) {
  if constexpr (WORDS == 1) {
    words[0] = *reinterpret_cast<const unsigned*>(source);
  } else {
    const uint2 both = *reinterpret_cast<const uint2*>(source);
    words[0] = both.x, words[1] = both.y;
  }
}

template <Dtype DTYPE>
__device__ __forceinline__ unsigned to_bf16(const unsigned* words) {
  if constexpr (DTYPE == BF16) {
    return words[0];
  } else {
    const float2 value = columns<DTYPE>(words, 0);
    return cvt_rn_bf16x2(value.x, value.y);
  }
}

// The host sees to it that latents come at multiples of 16 bytes, rotated keys at multiples of a pair, rows of the pool
// at multiples of 16 bytes; that 128 divides kv_lora_rank and 2 qk_rope_head_dim; that q's columns move by 16 bytes.
template <Dtype DTYPE>
__device__ __forceinline__ void append_fp8_row(const AppendParams& p) {
  constexpr int BYTES = DTYPE == FP32 ? 4 : 2;  // of a column as it comes
  const unsigned warps = blockDim.x / WARP;
  const unsigned append_ctas = (p.num_rows + warps - 1) / warps;
  if (blockIdx.x >= append_ctas) {
    place_query<uint4>(p, (blockIdx.x - append_ctas) * blockDim.x + threadIdx.x);
    return;
  }
  const unsigned row = blockIdx.x * warps + threadIdx.x / WARP;
  if (row >= p.num_rows) return;
  const Source from = source_of(p, row);
  const int kv_lora_rank = p.latent_bytes / BYTES;
  const int pairs = (p.row_bytes - p.latent_bytes) / (2 * BYTES);

  unsigned words[4 * BYTES], rotated[BYTES / 2];
  const int lane = threadIdx.x % WARP;
  int column = lane * LANE_COLUMNS, pair = lane;
  const int64 slot = *reinterpret_cast<const int64*>(from.slot);
  load_columns<BYTES>(from.latent + column * BYTES, column < kv_lora_rank, words);
  if (pair < pairs) load_pair(from.k_rope + pair * 2 * BYTES, rotated);

  char* target = target_of(p, slot, from.head);
  // Behind the codes and their scales: a multiple of 4 bytes, of 16 only where kv_lora_rank is one of 512.
  unsigned* k_rope = reinterpret_cast<unsigned*>(target + kv_lora_rank + kv_lora_rank / COLUMNS_PER_SCALE * 4);
  if (pair < pairs) k_rope[pair] = to_bf16<DTYPE>(rotated);
  store_columns<DTYPE>(target, words, column, kv_lora_rank);
#pragma unroll 1
  for (int pass = PASS_COLUMNS; pass < kv_lora_rank; pass += PASS_COLUMNS) {
    column += PASS_COLUMNS;
    load_columns<BYTES>(from.latent + column * BYTES, column < kv_lora_rank, words);
    store_columns<DTYPE>(target, words, column, kv_lora_rank);
  }
#pragma unroll 1
  for (pair += WARP; pair < pairs; pair += WARP) {
    load_pair(from.k_rope + pair * 2 * BYTES, rotated);
    k_rope[pair] = to_bf16<DTYPE>(rotated);
  }
}

// --- kernels --------------------------------------------------------------------------------------------------------

// One kernel per WIDTH in bytes. Any number of whole warps per CTA up to 8; grid = rows / warps, rounded up, and then
// units of q's rotated columns / threads, rounded up.
extern "C" __global__ void __launch_bounds__(256, 6) append_rows_16(const __grid_constant__ AppendParams p) {
  append_row<uint4>(p);
}
extern "C" __global__ void __launch_bounds__(256, 6) append_rows_8(const __grid_constant__ AppendParams p) {
  append_row<uint2>(p);
}
extern "C" __global__ void __launch_bounds__(256, 6) append_rows_4(const __grid_constant__ AppendParams p) {
  append_row<unsigned>(p);
}
extern "C" __global__ void __launch_bounds__(256, 6) append_rows_2(const __grid_constant__ AppendParams p) {
  append_row<unsigned short>(p);
}

// FP8 rows: one kernel per dtype of what comes. CTAs and grid as above; units of q's rotated columns are 16 bytes.
extern "C" __global__ void __launch_bounds__(256, 5) append_fp8_bf16(const __grid_constant__ AppendParams p) {
  append_fp8_row<BF16>(p);
}
extern "C" __global__ void __launch_bounds__(256, 5) append_fp8_fp16(const __grid_constant__ AppendParams p) {
  append_fp8_row<FP16>(p);
}
extern "C" __global__ void __launch_bounds__(256, 5) append_fp8_fp32(const __grid_constant__ AppendParams p) {
  append_fp8_row<FP32>(p);
}
