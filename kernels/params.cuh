// Parameter structs, each passed by value as a kernel's only argument. src/flash_mla/backends/cuda/params.py packs the
// same bytes; a test compares sizes and offsets.
#pragma once

#include "ptx.cuh"

// A plan's row: part [begin, end) of a request in 2^-30 of its length, and the row of the slot's next item or -1.
struct alignas(16) PlanItem {
  int request;
  int begin;
  int end;
  int next;
};

constexpr int PLAN_WHOLE = 1 << 30;

// Where a request's first part runs and how many parts it has.
struct alignas(8) PlanSplit {
  int slot;
  int num_parts;
};

struct DecodeParams {
  // Columns are two dimensions, 64 and d_qk / 64, where 64 divides d_qk; else d_qk and 1.
  TensorMap q_map;           // {columns, rows, tiles, h_kv, batch}, box {64, 16, 32 or 64, tiles, 1, 1}
  TensorMap kv_map;          // {columns, block_size, tiles, h_kv, num_blocks}, box {64, box_rows, tiles, 3 or 1, 1, 1}
  void* out;                 // [batch, seqlen_q, num_heads, KV_LORA_RANK], contiguous
  float* lse;                // [batch, num_heads, seqlen_q], contiguous, natural log
  uint16_t* o_partial;       // fp16 [2 * num_slots, seqlen_q, num_heads, KV_LORA_RANK], each row divided by its sum
  float* partial_sums;       // [1 + scales, seqlen_q, num_heads, 2 * num_slots]: log-sums (log2), then the scales
  const PlanItem* items;     // [num_slots + batch]
  const PlanSplit* splits;   // [batch]
  const int* block_table;    // [batch, max_blocks]
  const int* cache_seqlens;  // [batch], tokens
  int64_t table_stride_request;  // elements
  int64_t table_stride_page;     // elements
  int64_t seqlens_stride;        // elements
  float softmax_scale_log2;      // softmax_scale * log2(e)
  int batch;
  int max_blocks;
  int seqlen_q;
  int num_heads;
  int group;      // num_heads / h_kv
  int row_tiles;  // ceil(seqlen_q * group / query rows of a CTA)
  int tiles;      // row_tiles * h_kv: CTAs per slot
  int num_slots;
  int block_size;  // tokens
  int box_rows;    // tokens that one TMA box moves: gcd(block_size, 64)
  int is_causal;
};

// Of FP8 rows (src/flash_mla/codec.py), which TMA moves as elements of 2 bytes.
struct Fp8DecodeParams {
  DecodeParams decode;       // q_map: rotated keys, {64, block_size, 1, h_kv, num_blocks}, box {64, box_rows, 1, 1, 1};
                             // kv_map: latents, {64, block_size, 4, h_kv, num_blocks}, box {64, box_rows, 4 or 1, 1, 1}
  TensorMap scale_map;       // {8, block_size, 1, h_kv, num_blocks}, box {8, box_rows, 1, 1, 1}, not swizzled
  const uint16_t* q;         // bf16 [batch, rows, h_kv, d_qk]
  int64_t q_stride_request;  // elements
  int64_t q_stride_row;      // elements
  int64_t q_stride_head;     // elements
};

// Of rows that are fetched one by one: named by index, or, FP8 rows for 64 query rows, of pages. (q is for up to 32.)
struct GatherParams {
  DecodeParams decode;       // by index: a request is a query, block_table its indices [batch, topk], into the pool's
                             // rows; kv_map is not used, q_map for 64 query rows alone
  const uint16_t* q;         // bf16 [batch, rows, h_kv, d_qk]
  int64_t q_stride_request;  // elements
  int64_t q_stride_row;      // elements
  int64_t q_stride_head;     // elements
  const uint8_t* pool;       // [num_blocks, block_size, h_kv, row]
  uint32_t row_stride;       // in steps of 16 bytes, of which the pool has fewer than 2^32; by index: of all its rows
  int num_places;            // of the pool: rows, or pages; other numbers name none
  uint32_t page_stride;      // in steps of 16 bytes, for rows of pages
  uint32_t head_stride;
};

struct CombineParams {
  void* out;  // as in DecodeParams
  float* lse;
  const uint16_t* o_partial;
  const float* partial_sums;
  const PlanItem* items;
  const PlanSplit* splits;
  int by_slot;        // 1: grid.x counts slots, 0: requests; whichever is fewer
  int first_request;  // of this launch, where a batch is run in pieces
  int first_slot;     // of this launch, as `splits` counts
  int seqlen_q;
  int num_heads;
  int num_slots;
};
