// Merges the parts of cut requests:
//   out = sum_i w_i o_i / sum_i w_i,  w_i = 2^(lse_i - max)      fp32, parts in order, so always the same bits
// One CTA = some query rows (token, head) of one request x COLUMNS columns. Launched programmatic: it may begin while
// decode still runs, reads the plan, and waits for the partial results. Requests that were not cut are done already.
//
// Bytes per row: num_parts * (KV_LORA_RANK + 1) * 4, all from L2; a thread has PARTS_IN_FLIGHT loads of 16 bytes out.
#include "params.cuh"

constexpr int THREADS = 128;
constexpr int VECTOR = 4;  // fp32 elements per load
constexpr int PARTS_IN_FLIGHT = 8;
constexpr int MAX_PARTS = 1024;  // at least a device's SMs; parts beyond take more rounds
constexpr float LN_2 = 0.6931471805599453f;

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

__device__ __forceinline__ void accumulate(float4& sum, const float4& value, float weight) {
  sum.x += value.x * weight;
  sum.y += value.y * weight;
  sum.z += value.z * weight;
  sum.w += value.w * weight;
}

// Maximum and, with its help, sum over the CTA of one value per thread.
__device__ __forceinline__ float block_max(float value, float (&scratch)[THREADS / 32]) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < THREADS / 32; ++warp) value = fmaxf(value, scratch[warp]);
  return value;
}

__device__ __forceinline__ float block_sum(float value, float (&scratch)[THREADS / 32]) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.f;
  for (int warp = 0; warp < THREADS / 32; ++warp) value += scratch[warp];
  return value;
}

template <int KV_LORA_RANK, int COLUMNS, bool IS_BF16>
__device__ __forceinline__ void combine(const CombineParams& params) {
  constexpr int LANES = COLUMNS / VECTOR;    // threads across the columns
  constexpr int GROUPS = THREADS / LANES;    // groups of them share the parts
  __shared__ Shared shared;
  griddepcontrol_launch_dependents();
  PlanSplit split;
  // The plan is older than the launch of decode, which has begun.
  const int request = cut_request(params, blockIdx.x, split);
  // Every CTA waits, also those with nothing to do: the launch after this one may begin when all have exited, and
  // relies on decode's results then.
  griddepcontrol_wait();
  if (request < 0) return;

  const int rows = params.seqlen_q * params.num_heads;
  const int column = blockIdx.z * COLUMNS + threadIdx.x % LANES * VECTOR;
  const int group = threadIdx.x / LANES;
  const int first_row = blockIdx.y * params.rows_per_cta;
  for (int row = first_row; row < min(first_row + params.rows_per_cta, rows); ++row) {
    // Part 0 lies behind all slots, part p >= 1 at its slot.
    const auto partial_row = [&](int part) {
      const int index = part == 0 ? params.num_slots + split.slot : split.slot + part;
      return (int64_t)index * rows + row;
    };
    float4 ahead[PARTS_IN_FLIGHT];  // requested before the weights are known
#pragma unroll
    for (int i = 0; i < PARTS_IN_FLIGHT; ++i) {
      const int part = group + i * GROUPS;
      if (part < split.num_parts) {
        ahead[i] = *reinterpret_cast<const float4*>(params.o_partial + partial_row(part) * KV_LORA_RANK + column);
      }
    }
    float top = -infinity();
    for (int part = threadIdx.x; part < split.num_parts; part += THREADS) {
      const float value = params.lse_partial[partial_row(part)];
      shared.weight[part] = value;
      top = fmaxf(top, value);
    }
    top = block_max(top, shared.warp_top);
    const float reference = top == -infinity() ? 0.f : top;
    float total = 0.f;
    for (int part = threadIdx.x; part < split.num_parts; part += THREADS) {
      const float weight = ex2(shared.weight[part] - reference);
      shared.weight[part] = weight;
      total += weight;
    }
    total = block_sum(total, shared.warp_sum);  // its barrier publishes the weights too

    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < PARTS_IN_FLIGHT; ++i) {
      const int part = group + i * GROUPS;
      if (part < split.num_parts) accumulate(sum, ahead[i], shared.weight[part]);
    }
    for (int part = group + PARTS_IN_FLIGHT * GROUPS; part < split.num_parts; part += GROUPS) {
      const float4 value =
          *reinterpret_cast<const float4*>(params.o_partial + partial_row(part) * KV_LORA_RANK + column);
      accumulate(sum, value, shared.weight[part]);
    }
    if constexpr (GROUPS > 1) {
      shared.sum[threadIdx.x] = sum;
      __syncthreads();
      if (group == 0) {
#pragma unroll
        for (int other = 1; other < GROUPS; ++other) accumulate(sum, shared.sum[other * LANES + threadIdx.x], 1.f);
      }
    }
    if (group == 0) {
      const float scale = total > 0.f ? 1.f / total : 0.f;
      uint2 packed;
      packed.x = pack<IS_BF16>(sum.x * scale, sum.y * scale);
      packed.y = pack<IS_BF16>(sum.z * scale, sum.w * scale);
      const int64_t out_row = (int64_t)request * rows + row;
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.out) + out_row * KV_LORA_RANK + column) = packed;
      if (threadIdx.x == 0 && blockIdx.z == 0) {
        const int query = row / params.num_heads, head = row % params.num_heads;
        params.lse[((int64_t)request * params.num_heads + head) * params.seqlen_q + query] =
            total > 0.f ? (top + lg2(total)) * LN_2 : infinity();
      }
    }
    __syncthreads();  // the next row writes weights and sums
  }
}

#define COMBINE_KERNELS(DTYPE, IS_BF16, KV_LORA_RANK)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
      flash_fwd_mla_combine_kernel_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) {       \
    combine<KV_LORA_RANK, KV_LORA_RANK, IS_BF16>(params);                                                         \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
      flash_fwd_mla_combine_kernel_few_##DTYPE##_##KV_LORA_RANK(const __grid_constant__ CombineParams params) {   \
    combine<KV_LORA_RANK, 128, IS_BF16>(params);                                                                  \
  }

COMBINE_KERNELS(bf16, true, 512)
COMBINE_KERNELS(fp16, false, 512)
COMBINE_KERNELS(bf16, true, 256)
COMBINE_KERNELS(fp16, false, 256)
COMBINE_KERNELS(bf16, true, 128)
COMBINE_KERNELS(fp16, false, 128)
