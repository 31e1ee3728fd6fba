// Merges the parts of cut requests:
//   out = sum_i w_i o_i / sum_i w_i,  w_i = 2^(lse_i - max)      fp32, in one order always, so always the same bits
// Launched programmatic: it may begin while decode still runs, reads the plan, and waits for the partial results.
// Requests that were not cut are done already. A row (query token, head) is num_parts * (KV_LORA_RANK + 1) * 4 bytes
// from L2. All of them are wanted at once, so there are two ways, the first in three sizes:
//   combine_row   few rows: a CTA per row and COLUMNS columns, its groups of threads share the parts. All CTAs must be
//                 resident at once (64 registers x 256 threads: four per SM), or a second wave doubles the time. The
//                 fewest rows get CTAs of 512 threads: twice the parts in flight.
//   combine_warp  many rows: a warp per row, all columns; no barriers
// Up to eight parts, what a deterministic plan makes, are added one after another by combine_warp and by combine_row
// over 128 columns (eight groups or more, a part each): the same bits from both, so the form may follow the batch.
#include "params.cuh"

constexpr int FEW_THREADS = 512;
constexpr int ROW_THREADS = 256;
constexpr int WARP_THREADS = 128;
constexpr int VECTOR = 4;  // fp32 elements per load: 16 bytes
constexpr int ROW_PARTS_IN_FLIGHT = 8;
constexpr int WARP_PARTS_IN_FLIGHT = 2;  // each KV_LORA_RANK / 128 loads
constexpr int MAX_PARTS = 1024;          // of combine_row; the launch sees to it
constexpr float LN_2 = 0.6931471805599453f;

template <int THREADS>
struct Shared {
  float weight[MAX_PARTS];
  float4 sum[THREADS];
  float warp_top[THREADS / 32];
  float warp_sum[THREADS / 32];
};

// The request that CTA `index` of the grid merges, or -1. Counted by slots: a cut request is found at the slot of its
// second part, so that each is found once.
__device__ __forceinline__ int cut_request(const CombineParams& params, int index, PlanSplit& split) {
  int request = params.first_request + index;
  if (params.by_slot) {
    if (index == 0) return -1;
    const PlanItem item = params.items[index];
    if (item.request < 0 || item.begin == 0) return -1;
    request = item.request;
  }
  split = params.splits[request];
  split.slot -= params.first_slot;
  if (split.num_parts < 2 || (params.by_slot && split.slot + 1 != index)) return -1;
  return request;
}

__device__ __forceinline__ int64_t partial_row(const CombineParams& params, const PlanSplit& split, int part, int row) {
  // Part 0 lies behind all slots, part p >= 1 at its slot.
  const int index = part == 0 ? params.num_slots + split.slot : split.slot + part;
  return (int64_t)index * params.seqlen_q * params.num_heads + row;
}

// Products are rounded before they are added, so that it does not matter which of them a group of threads begins with.
__device__ __forceinline__ void accumulate(float4& sum, const float4& value, float weight) {
  sum.x = __fadd_rn(sum.x, __fmul_rn(value.x, weight));
  sum.y = __fadd_rn(sum.y, __fmul_rn(value.y, weight));
  sum.z = __fadd_rn(sum.z, __fmul_rn(value.z, weight));
  sum.w = __fadd_rn(sum.w, __fmul_rn(value.w, weight));
}

template <bool IS_BF16>
__device__ __forceinline__ void store_columns(const CombineParams& params, int64_t offset, const float4& sum,
                                              float scale) {
  uint2 packed;
  packed.x = pack<IS_BF16>(sum.x * scale, sum.y * scale);
  packed.y = pack<IS_BF16>(sum.z * scale, sum.w * scale);
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.out) + offset) = packed;
}

__device__ __forceinline__ void store_lse(const CombineParams& params, int request, int row, float top, float total) {
  const int query = row / params.num_heads, head = row % params.num_heads;
  params.lse[((int64_t)request * params.num_heads + head) * params.seqlen_q + query] =
      total == 0.f ? infinity() : (top + lg2(total)) * LN_2;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  return value;
}

// Grid: (requests or slots, rows, column chunks).
template <int KV_LORA_RANK, int COLUMNS, int THREADS, bool IS_BF16>
__device__ __forceinline__ void combine_row(const CombineParams& params) {
  constexpr int LANES = COLUMNS / VECTOR;        // threads across the columns
  constexpr int GROUPS = THREADS / LANES;        // groups of them share the parts
  static_assert(COLUMNS != 128 || GROUPS >= 8);  // a part each, in order: the head of this file
  __shared__ Shared<THREADS> shared;
  griddepcontrol_launch_dependents();
  PlanSplit split;
  // The plan is older than the launch of decode, which has begun.
  const int request = cut_request(params, blockIdx.x, split);
  // Every CTA waits, also those with nothing to do: the launch after this one may begin when all have exited, and
  // relies on decode's results then.
  griddepcontrol_wait();
  if (request < 0) return;

  const int row = blockIdx.y;
  const int column = blockIdx.z * COLUMNS + threadIdx.x % LANES * VECTOR;
  const int group = threadIdx.x / LANES;
  float4 ahead[ROW_PARTS_IN_FLIGHT];  // requested before the weights are known
#pragma unroll
  for (int i = 0; i < ROW_PARTS_IN_FLIGHT; ++i) {
    const int part = group + i * GROUPS;
    if (part < split.num_parts) {
      ahead[i] = *reinterpret_cast<const float4*>(params.o_partial +
                                                  partial_row(params, split, part, row) * KV_LORA_RANK + column);
    }
  }
  float top = -infinity();
  for (int part = threadIdx.x; part < split.num_parts; part += THREADS) {
    const float value = params.lse_partial[partial_row(params, split, part, row)];
    shared.weight[part] = value;
    top = fmaxf(top, value);
  }
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) shared.warp_top[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) top = fmaxf(top, shared.warp_top[warp]);
  const float reference = top == -infinity() ? 0.f : top;
  float total = 0.f;
  for (int part = threadIdx.x; part < split.num_parts; part += THREADS) {
    const float weight = ex2(shared.weight[part] - reference);
    shared.weight[part] = weight;
    total += weight;
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) shared.warp_sum[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += shared.warp_sum[warp];

  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < ROW_PARTS_IN_FLIGHT; ++i) {
    const int part = group + i * GROUPS;
    if (part < split.num_parts) accumulate(sum, ahead[i], shared.weight[part]);
  }
  for (int part = group + ROW_PARTS_IN_FLIGHT * GROUPS; part < split.num_parts; part += GROUPS) {
    const int64_t offset = partial_row(params, split, part, row) * KV_LORA_RANK + column;
    accumulate(sum, *reinterpret_cast<const float4*>(params.o_partial + offset), shared.weight[part]);
  }
  shared.sum[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int other = 1; other < GROUPS; ++other) accumulate(sum, shared.sum[other * LANES + threadIdx.x], 1.f);
  const int64_t out_row = (int64_t)request * params.seqlen_q * params.num_heads + row;
  store_columns<IS_BF16>(params, out_row * KV_LORA_RANK + column, sum, total > 0.f ? 1.f / total : 0.f);
  if (threadIdx.x == 0 && blockIdx.z == 0) store_lse(params, request, row, top, total);
}

// Grid: (requests or slots, rows / 4).
template <int KV_LORA_RANK, bool IS_BF16>
__device__ __forceinline__ void combine_warp(const CombineParams& params) {
  constexpr int VECTORS = KV_LORA_RANK / (32 * VECTOR);  // loads per part
  griddepcontrol_launch_dependents();
  PlanSplit split;
  const int request = cut_request(params, blockIdx.x, split);
  griddepcontrol_wait();  // every CTA, as in combine_row
  const int row = blockIdx.y * (WARP_THREADS / 32) + threadIdx.x / 32;
  if (request < 0 || row >= params.seqlen_q * params.num_heads) return;

  const int lane = threadIdx.x % 32;
  const auto load = [&](int part, int vector) {
    return *reinterpret_cast<const float4*>(params.o_partial + partial_row(params, split, part, row) * KV_LORA_RANK +
                                            (vector * 32 + lane) * VECTOR);
  };
  float4 ahead[WARP_PARTS_IN_FLIGHT][VECTORS];  // requested before the weights are known; a cut request has two parts
#pragma unroll
  for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) ahead[i][vector] = load(i, vector);
  }
  float top = -infinity();
  for (int part = lane; part < split.num_parts; part += 32) {
    top = fmaxf(top, params.lse_partial[partial_row(params, split, part, row)]);
  }
  top = warp_max(top);
  const float reference = top == -infinity() ? 0.f : top;
  float4 sum[VECTORS] = {};
  float total = 0.f;
  for (int first = 0; first < split.num_parts; first += 32) {
    float weight = 0.f;  // of part first + lane
    if (first + lane < split.num_parts) {
      weight = ex2(params.lse_partial[partial_row(params, split, first + lane, row)] - reference);
    }
    total += warp_sum(weight);
    for (int part = first; part < min(first + 32, split.num_parts); part += WARP_PARTS_IN_FLIGHT) {
#pragma unroll
      for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
        if (part + i >= split.num_parts) break;
        const float part_weight = __shfl_sync(0xFFFFFFFF, weight, part + i - first);
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) accumulate(sum[vector], ahead[i][vector], part_weight);
      }
#pragma unroll
      for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
        const int next = part + WARP_PARTS_IN_FLIGHT + i;
        if (next >= split.num_parts) break;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) ahead[i][vector] = load(next, vector);
      }
    }
  }
  const int64_t out_row = (int64_t)request * params.seqlen_q * params.num_heads + row;
#pragma unroll
  for (int vector = 0; vector < VECTORS; ++vector) {
    store_columns<IS_BF16>(params, out_row * KV_LORA_RANK + (vector * 32 + lane) * VECTOR, sum[vector],
                           total > 0.f ? 1.f / total : 0.f);
  }
  if (lane == 0) store_lse(params, request, row, top, total);
}

#define COMBINE_KERNELS(DTYPE, IS_BF16, KV_LORA_RANK)                                                             \
  extern "C" __global__ void __launch_bounds__(FEW_THREADS, 2)                                                    \
      flash_fwd_mla_combine_kernel_few_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) {   \
    combine_row<KV_LORA_RANK, 128, FEW_THREADS, IS_BF16>(params);                                                 \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS, 4)                                                    \
      flash_fwd_mla_combine_kernel_chunk_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) { \
    combine_row<KV_LORA_RANK, 128, ROW_THREADS, IS_BF16>(params);                                                 \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS, 4)                                                    \
      flash_fwd_mla_combine_kernel_row_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) {   \
    combine_row<KV_LORA_RANK, KV_LORA_RANK, ROW_THREADS, IS_BF16>(params);                                        \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(WARP_THREADS)                                                      \
      flash_fwd_mla_combine_kernel_warp_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) {  \
    combine_warp<KV_LORA_RANK, IS_BF16>(params);                                                                  \
  }

COMBINE_KERNELS(bf16, true, 512)
COMBINE_KERNELS(fp16, false, 512)
COMBINE_KERNELS(bf16, true, 256)
COMBINE_KERNELS(fp16, false, 256)
COMBINE_KERNELS(bf16, true, 128)
COMBINE_KERNELS(fp16, false, 128)
