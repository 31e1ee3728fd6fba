// Writes new tokens into their pages: row slots[b, j] of the pool becomes [latent[b, j] | k_rope[b, j]], per latent
// head.
//
// Rows are moved as bytes, in units of WIDTH bytes: 16 where every address, stride and length allows it, else 8, 4
// or 2. One warp moves one row (DeepSeek's: 512 + 64 columns of 2 bytes = 72 units of 16 bytes, up to 3 per lane). Its
// first 2 KiB are on their way before the slot is known and before anything is stored: 48 warps per SM (40 registers
// each) have 54 KiB of such rows in flight, where 27 to 33 KiB keep HBM busy.
//
// The same launch may place the rotated columns of the queries behind the latent ones (absorbed form: `q` gets its
// latent columns from a matrix product that writes there directly). They take CTAs of their own, one unit per thread.

using int64 = long long;

constexpr int WARP = 32;
// Units per lane in flight. 4 x 32 x 16 bytes = 2 KiB, a whole row of every published model in 2-byte dtypes.
constexpr int UNROLL = 4;

// Mirrored in src/flash_mla/backends/cuda/append.py.
struct AppendParams {
  char* kv_cache;      // [num_blocks, block_size, h_kv, d_qk]
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
  int latent_bytes;     // kv_lora_rank columns
  int row_bytes;        // kv_lora_rank + qk_rope_head_dim columns
  unsigned num_heads;   // of q
  unsigned q_rows;      // batch * seqlen_q * num_heads; 0: no queries are to be placed
};
static_assert(sizeof(AppendParams) == 216);

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
  const unsigned head = row % p.h_kv;
  const int64 token = row / p.h_kv % p.seqlen_q;
  const int64 request = row / p.h_kv / p.seqlen_q;
  const char* latent =
      p.latent + request * p.latent_stride_batch + token * p.latent_stride_token + head * p.latent_stride_head;
  const char* k_rope =
      p.k_rope + request * p.rope_stride_batch + token * p.rope_stride_token + head * p.rope_stride_head;

  Unit units[UNROLL];
  int first = threadIdx.x % WARP * sizeof(Unit);
  const char* place = p.slots + request * p.slots_stride_batch + token * p.slots_stride_token;
  const int64 slot = *reinterpret_cast<const int64*>(place);
  load(latent, k_rope, p, first, units);

  // The host refuses pools of 2^32 tokens and more (4.5 TiB in DeepSeek's shape), so a slot is divided in 32 bits; the
  // quotient is widened before it is multiplied: block x 73,728 bytes overflows int32 from block 29,128 on.
  const int64 block = static_cast<unsigned>(slot) / p.block_size;
  const int64 offset = static_cast<unsigned>(slot) % p.block_size;
  char* target = p.kv_cache + block * p.kv_stride_block + offset * p.kv_stride_token + head * p.kv_stride_head;
  store(target, p, first, units);
#pragma unroll 1
  for (first += PASS; first < p.row_bytes; first += PASS) {
    load(latent, k_rope, p, first, units);
    store(target, p, first, units);
  }
}

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
