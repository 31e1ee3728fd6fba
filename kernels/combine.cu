// Merges the parts of cut requests:
//   out = sum_i w_i o_i / sum_i w_i,  w_i = 2^(lse_i - max)      fp32, in one order always, so always the same bits
// Launched programmatic: it may begin while decode still runs, reads the plan, and waits for the partial results.
// Requests that were not cut are done already. A row (query token, head) is num_parts * (2 * KV_LORA_RANK + 4 * (1 +
// SCALES)) bytes from L2 (partial.cuh). All of them are wanted at once, so there are two ways:
//   combine_row   few rows: a CTA per row and COLUMNS columns, whose groups of threads share the parts. What takes the
//                 time here is instructions: addresses are made before the wait, loads are 16 bytes wide, and every
//                 warp finds the weights for itself.
//   combine_warp  many rows: a warp per row, all columns; no barriers
// They add the parts in different orders. A deterministic plan's bits may not follow the batch, so its rows are merged
// by combine_warp always.
#include "partial.cuh"

constexpr int ROW_THREADS = 256;
constexpr int WARP_THREADS = 128;
constexpr int PARTS_IN_FLIGHT = 5;  // per group of threads: 160 parts of 64 columns, more than an H200 has SMs
constexpr int WARP_PARTS_IN_FLIGHT = 2;
constexpr int WARP_VECTOR = 4;  // columns that combine_warp loads at a time
constexpr float LN_2 = 0.6931471805599453f;

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

// The partial results of one row of a cut request.
template <int KV_LORA_RANK, class Layout>
struct Parts {
  const uint16_t* results;  // of the slot that has part 0; part p >= 1 lies p further, part 0 num_slots
  const float* log_sums;
  int64_t result_stride;  // from a slot to the next, elements
  int64_t plane_stride;   // from the log-sums to the first scales, and so on, elements
  int first;              // num_slots

  __device__ __forceinline__ Parts(const CombineParams& params, const PlanSplit& split, int row) {
    const int64_t rows = (int64_t)params.seqlen_q * params.num_heads;
    const int slots = 2 * params.num_slots;
    result_stride = rows * KV_LORA_RANK;
    plane_stride = rows * slots;
    results = params.o_partial + split.slot * result_stride + (int64_t)row * KV_LORA_RANK;
    log_sums = params.partial_sums + (int64_t)row * slots + split.slot;
    first = params.num_slots;
  }
  __device__ __forceinline__ int at(int part) const { return part == 0 ? first : part; }
  __device__ __forceinline__ float log_sum(int part) const { return log_sums[at(part)]; }
  __device__ __forceinline__ float scale(int part, int position) const {
    return log_sums[(1 + position / (KV_LORA_RANK / Layout::SCALES)) * plane_stride + at(part)];
  }
  template <class Vector>
  __device__ __forceinline__ Vector load(int part, int position) const {
    return *reinterpret_cast<const Vector*>(results + at(part) * result_stride + position);
  }
};

__device__ __forceinline__ void accumulate(float* sum, uint32_t columns, float weight) {
  const float2 two = unpack_fp16(columns);
  sum[0] = __fmaf_rn(two.x, weight, sum[0]);
  sum[1] = __fmaf_rn(two.y, weight, sum[1]);
}

__device__ __forceinline__ void accumulate(float (&sum)[VECTOR], const uint4& columns, float weight) {
  accumulate(sum + 0, columns.x, weight);
  accumulate(sum + 2, columns.y, weight);
  accumulate(sum + 4, columns.z, weight);
  accumulate(sum + 6, columns.w, weight);
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
template <int KV_LORA_RANK, class Layout, int COLUMNS, bool IS_BF16>
__device__ __forceinline__ void combine_row(const CombineParams& params) {
  constexpr int LANES = COLUMNS / VECTOR;  // threads across the columns
  constexpr int GROUPS = ROW_THREADS / LANES;
  constexpr int ROUNDS = (PARTS_IN_FLIGHT * GROUPS + 31) / 32;    // of 32 log-sums
  constexpr int SLICES = LANES < 32 ? ROW_THREADS / 32 : GROUPS;  // sums that are left when warps have added theirs
  static_assert(32 % GROUPS == 0 && (LANES >= 32 || 32 % LANES == 0));
  __shared__ float4 sums[SLICES][COLUMNS / 4];
  griddepcontrol_launch_dependents();
  PlanSplit split = {0, 0};
  // The plan is older than the launch of decode, which has begun.
  const int request = cut_request(params, blockIdx.x, split);
  const int row = blockIdx.y;
  const int lane = threadIdx.x % 32, group = threadIdx.x / LANES;
  const int position = blockIdx.z * COLUMNS + threadIdx.x % LANES * VECTOR;
  const Parts<KV_LORA_RANK, Layout> parts(params, split, row);
  // Every CTA waits, also those with nothing to do: the launch after this one may begin when all have exited, and
  // relies on decode's results then.
  griddepcontrol_wait();
  if (request < 0) return;

  // All that is wanted is asked for before anything is used, the log-sums first: a part per lane and round.
  float weight[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int part = round * 32 + lane;
    weight[round] = part < split.num_parts ? parts.log_sum(part) : -infinity();
  }
  uint4 columns[PARTS_IN_FLIGHT];
  float scale[PARTS_IN_FLIGHT];
#pragma unroll
  for (int i = 0; i < PARTS_IN_FLIGHT; ++i) {
    const int part = group + i * GROUPS;
    columns[i] = make_uint4(0, 0, 0, 0);
    scale[i] = 0.f;
    if (part < split.num_parts) {
      columns[i] = parts.template load<uint4>(part, position);
      scale[i] = parts.scale(part, position);
    }
  }
  float top = weight[0];
#pragma unroll
  for (int round = 1; round < ROUNDS; ++round) top = fmaxf(top, weight[round]);
  for (int part = ROUNDS * 32 + lane; part < split.num_parts; part += 32) top = fmaxf(top, parts.log_sum(part));
  top = warp_max(top);
  const float reference = top == -infinity() ? 0.f : top;

  float total = 0.f;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    weight[round] = ex2(weight[round] - reference);
    total += weight[round];
  }
  for (int part = ROUNDS * 32 + lane; part < split.num_parts; part += 32) total += ex2(parts.log_sum(part) - reference);
  float sum[VECTOR] = {};
#pragma unroll
  for (int i = 0; i < PARTS_IN_FLIGHT; ++i) {
    // Part group + i * GROUPS is lane group + i * GROUPS % 32's of its round.
    const float by = __shfl_sync(0xFFFFFFFF, weight[i * GROUPS / 32], group + i * GROUPS % 32);
    accumulate(sum, columns[i], by * scale[i]);
  }
  for (int part = group + PARTS_IN_FLIGHT * GROUPS; part < split.num_parts; part += GROUPS) {
    const float by = ex2(parts.log_sum(part) - reference);
    accumulate(sum, parts.template load<uint4>(part, position), by * parts.scale(part, position));
  }
  total = warp_sum(total);

#pragma unroll
  for (int distance = LANES; distance < 32; distance *= 2) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum[i] += __shfl_xor_sync(0xFFFFFFFF, sum[i], distance);
  }
  if (LANES >= 32 || lane < LANES) {
    float4* slice = sums[LANES < 32 ? threadIdx.x / 32 : group] + threadIdx.x % LANES * (VECTOR / 4);
    slice[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    slice[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  const float scale_all = total > 0.f ? 1.f / total : 0.f;
  const int64_t out_row = (int64_t)request * params.seqlen_q * params.num_heads + row;
  uint16_t* out = static_cast<uint16_t*>(params.out) + out_row * KV_LORA_RANK;
#pragma unroll
  for (int pair = threadIdx.x; pair < COLUMNS / 2; pair += ROW_THREADS) {
    const int at = Layout::pair_position(pair);
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      const float* of_slice = reinterpret_cast<const float*>(sums[slice]);
      low += of_slice[at];
      high += of_slice[at + Layout::DISTANCE];
    }
    *reinterpret_cast<uint32_t*>(out + Layout::template column<KV_LORA_RANK>(blockIdx.z * COLUMNS + at)) =
        pack<IS_BF16>(low * scale_all, high * scale_all);
  }
  if (threadIdx.x == 0 && blockIdx.z == 0) store_lse(params, request, row, top, total);
}

// Grid: requests or slots x rows / 4, the rows first.
template <int KV_LORA_RANK, class Layout, bool IS_BF16>
__device__ __forceinline__ void combine_warp(const CombineParams& params) {
  constexpr int VECTORS = KV_LORA_RANK / (32 * WARP_VECTOR);  // loads per part
  __shared__ float4 sums[WARP_THREADS / 32][KV_LORA_RANK / 4];
  griddepcontrol_launch_dependents();
  const int row_ctas = (params.seqlen_q * params.num_heads + WARP_THREADS / 32 - 1) / (WARP_THREADS / 32);
  PlanSplit split = {0, 0};
  const int request = cut_request(params, blockIdx.x / row_ctas, split);
  griddepcontrol_wait();  // every CTA, as in combine_row
  const int row = blockIdx.x % row_ctas * (WARP_THREADS / 32) + threadIdx.x / 32;
  if (request < 0 || row >= params.seqlen_q * params.num_heads) return;

  const int lane = threadIdx.x % 32;
  const Parts<KV_LORA_RANK, Layout> parts(params, split, row);
  const auto position = [&](int vector) { return (vector * 32 + lane) * WARP_VECTOR; };
  uint2 ahead[WARP_PARTS_IN_FLIGHT][VECTORS];  // requested before the weights are known; a cut request has two parts
  float scale[WARP_PARTS_IN_FLIGHT][VECTORS];
#pragma unroll
  for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
      ahead[i][vector] = parts.template load<uint2>(i, position(vector));
      scale[i][vector] = parts.scale(i, position(vector));
    }
  }
  float top = -infinity();
  for (int part = lane; part < split.num_parts; part += 32) top = fmaxf(top, parts.log_sum(part));
  top = warp_max(top);
  const float reference = top == -infinity() ? 0.f : top;
  float sum[VECTORS][WARP_VECTOR] = {};
  float total = 0.f;
  for (int first = 0; first < split.num_parts; first += 32) {
    float weight = 0.f;  // of part first + lane
    if (first + lane < split.num_parts) weight = ex2(parts.log_sum(first + lane) - reference);
    total += warp_sum(weight);
    for (int part = first; part < min(first + 32, split.num_parts); part += WARP_PARTS_IN_FLIGHT) {
#pragma unroll
      for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
        if (part + i >= split.num_parts) break;
        const float by = __shfl_sync(0xFFFFFFFF, weight, part + i - first);
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
          accumulate(sum[vector] + 0, ahead[i][vector].x, by * scale[i][vector]);
          accumulate(sum[vector] + 2, ahead[i][vector].y, by * scale[i][vector]);
        }
      }
#pragma unroll
      for (int i = 0; i < WARP_PARTS_IN_FLIGHT; ++i) {
        const int next = part + WARP_PARTS_IN_FLIGHT + i;
        if (next >= split.num_parts) break;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
          ahead[i][vector] = parts.template load<uint2>(next, position(vector));
          scale[i][vector] = parts.scale(next, position(vector));
        }
      }
    }
  }
  // In shared memory from the order of the layout to that of the row.
  float* mine = reinterpret_cast<float*>(sums[threadIdx.x / 32]);
#pragma unroll
  for (int vector = 0; vector < VECTORS; ++vector) {
    sums[threadIdx.x / 32][vector * 32 + lane] =
        make_float4(sum[vector][0], sum[vector][1], sum[vector][2], sum[vector][3]);
  }
  __syncwarp();
  const float scale_all = total > 0.f ? 1.f / total : 0.f;
  const int64_t out_row = (int64_t)request * params.seqlen_q * params.num_heads + row;
  uint16_t* out = static_cast<uint16_t*>(params.out) + out_row * KV_LORA_RANK;
#pragma unroll
  for (int pair = lane; pair < KV_LORA_RANK / 2; pair += 32) {
    const int at = Layout::pair_position(pair);
    *reinterpret_cast<uint32_t*>(out + Layout::template column<KV_LORA_RANK>(at)) =
        pack<IS_BF16>(mine[at] * scale_all, mine[at + Layout::DISTANCE] * scale_all);
  }
  if (lane == 0) store_lse(params, request, row, top, total);
}

#define COMBINE_KERNEL(NAME, THREADS, CTAS, FUNCTION)                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, CTAS)                             \
      flash_fwd_mla_combine_kernel_##NAME(const __grid_constant__ CombineParams params) { \
    FUNCTION(params);                                                                     \
  }

#define COMBINE_KERNELS(SUFFIX, KV_LORA_RANK, LAYOUT, IS_BF16)                                             \
  COMBINE_KERNEL(columns64_##SUFFIX, ROW_THREADS, 4, (combine_row<KV_LORA_RANK, LAYOUT, 64, IS_BF16>))     \
  COMBINE_KERNEL(columns128_##SUFFIX, ROW_THREADS, 4, (combine_row<KV_LORA_RANK, LAYOUT, 128, IS_BF16>))   \
  COMBINE_KERNEL(row_##SUFFIX, ROW_THREADS, 4, (combine_row<KV_LORA_RANK, LAYOUT, KV_LORA_RANK, IS_BF16>)) \
  COMBINE_KERNEL(warp_##SUFFIX, WARP_THREADS, 1, (combine_warp<KV_LORA_RANK, LAYOUT, IS_BF16>))

COMBINE_KERNELS(bf16_512, 512, TileLayout, true)
COMBINE_KERNELS(fp16_512, 512, TileLayout, false)
COMBINE_KERNELS(bf16_256, 256, TileLayout, true)
COMBINE_KERNELS(fp16_256, 256, TileLayout, false)
COMBINE_KERNELS(bf16_128, 128, TileLayout, true)
COMBINE_KERNELS(fp16_128, 128, TileLayout, false)
COMBINE_KERNELS(few_bf16_512, 512, FewLayout, true)
COMBINE_KERNELS(few_fp16_512, 512, FewLayout, false)
COMBINE_KERNELS(pair_bf16_512, 512, PairLayout, true)
