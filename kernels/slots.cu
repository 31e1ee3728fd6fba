// Where the new tokens of a forward go: token number n of a request, counted without padding, goes to slot
// block_table[request, n / block_size] * block_size + n % block_size. Once per forward, for all its layers; in torch
// the same takes a dozen launches. One warp per request walks over its new tokens, 32 at a time.

using int64 = long long;

constexpr int WARP = 32;

// Mirrored in src/flash_mla/backends/cuda/slots.py. Strides in elements.
struct SlotsParams {
  const int* block_table;      // [batch, max_blocks]
  const int* cache_seqlens;    // [batch], tokens before this forward
  const unsigned char* valid;  // bool [batch, seqlen_q], 0 = padding; null: all are tokens
  int64* slots;                // [batch, seqlen_q], contiguous; 0 where nothing is to be stored
  int* lengths;                // [batch], tokens with those of this forward
  int64 table_stride_batch, table_stride_block;
  int64 cache_seqlens_stride;
  int64 valid_stride_batch, valid_stride_token;
  int seqlen_q;
  int block_size;
  int max_blocks;  // >= 1
  int capacity;    // tokens that a request can hold; what comes past it is not stored
};
static_assert(sizeof(SlotsParams) == 96);

// grid = batch, one warp.
extern "C" __global__ void __launch_bounds__(32) next_slots(const SlotsParams p) {
  const int64 request = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  const int before = max(p.cache_seqlens[request * p.cache_seqlens_stride], 0);
  const int* table = p.block_table + request * p.table_stride_batch;
  int counted = 0;  // tokens in front of this pass, stored or not
  int stored = 0;
  for (int first = 0; first < p.seqlen_q; first += WARP) {
    const int token = first + lane;
    bool is_token = token < p.seqlen_q;
    if (is_token && p.valid != nullptr) {
      is_token = p.valid[request * p.valid_stride_batch + token * p.valid_stride_token] != 0;
    }
    const unsigned tokens = __ballot_sync(0xFFFFFFFF, is_token);
    const int number = before + counted + __popc(tokens & ((1u << lane) - 1));
    const bool fits = is_token && number < p.capacity;
    if (token < p.seqlen_q) {
      int64 slot = 0;
      if (fits) {
        const int block = min(number / p.block_size, p.max_blocks - 1);
        slot = static_cast<int64>(table[block * p.table_stride_block]) * p.block_size + number % p.block_size;
      }
      p.slots[request * p.seqlen_q + token] = slot;
    }
    counted += __popc(tokens);
    stored += __popc(__ballot_sync(0xFFFFFFFF, fits));
  }
  if (lane == 0) p.lengths[request] = before + stored;
}
