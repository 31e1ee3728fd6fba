// One function = one instruction. Names are the instructions'; what surprises is said beside it.
// Source: PTX ISA 8.x, https://docs.nvidia.com/cuda/parallel-thread-execution/
// (Over 400 lines: a list, to look things up in.)
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t& barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count));
}

// Makes the inits visible to the async proxy (TMA), which completes transactions on them, and to the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier, uint32_t count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// A fresh barrier is in phase 0, so waiting for parity 1 returns at once.
__device__ __forceinline__ bool mbarrier_test_wait(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// try_wait sleeps in hardware for a while before it answers no.
__device__ __forceinline__ void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// --- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}

// All threads of the cluster arrive and then wait. Of what they wrote fence_mbarrier_init alone is seen behind the
// wait: a release would also wait for every store to global memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// What is at `address` of this CTA's shared memory, in that of CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// At the barrier of a CTA of the cluster, whose address map_shared gave. Its scope is the CTA's: it says that this one
// has read, not what it has written, and a release for the cluster would wait for every store to global memory.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// To the shared memory of a CTA of the cluster, whose `barrier` counts the bytes once they are there.
__device__ __forceinline__ void st_async(uint32_t target, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target), "r"(value),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void st_async_v4(uint32_t target, const uint4& value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

// --- TMA ------------------------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Box at {column, row, tile, head, outer}; elements outside the tensor arrive as zeros and count as bytes.
__device__ __forceinline__ void tma_load_5d(void* target, const TensorMap& map, uint64_t& barrier, int column, int row,
                                            int tile, int head, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(tile), "r"(head), "r"(outer)
      : "memory");
}

// `bytes` in a row, which 16 divides, as do both addresses.
__device__ __forceinline__ void bulk_load(uint32_t target, const void* from, uint32_t bytes, uint64_t& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// --- matrices in shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&value)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: a lane has rows 2 * (lane % 4) and the next of column lane / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&value)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// The same, each matrix transposed: a lane's two elements of row lane / 4 go to column lane / 4.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ uint4 ld_shared_v4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 ld_shared_v2(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float ld_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void st_shared_v4(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Ordinary stores to shared memory before it become visible to what wgmma and TMA read or write after it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes to shared memory, of which the first `bytes` are there and the others zeros.
__device__ __forceinline__ void cp_async_16(uint32_t target, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}

// Until this thread's copies are there.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- loads of what no kernel in flight writes -----------------------------------------------------------------------

// Volatile: a second load of the same value is a load, not a register kept since the first.
__device__ __forceinline__ int ld_global_nc(const int* address) {
  int value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ int4 ld_global_nc(const int4* address) {
  int4 value;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// What is read but once, past L1; zero where it is not wanted, and then `address` may be anything.
__device__ __forceinline__ uint32_t ld_global_or_zero(const void* address, uint32_t is_wanted) {
  uint32_t value;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "mov.b32 %0, 0;\n"
      "@p ld.global.nc.L1::no_allocate.b32 %0, [%1];\n}"
      : "=&r"(value)
      : "l"(address), "r"(is_wanted));
  return value;
}

__device__ __forceinline__ uint2 ld_global_or_zero_v2(const void* address, uint32_t is_wanted) {
  uint2 value;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n}"
      : "=&r"(value.x), "=&r"(value.y)
      : "l"(address), "r"(is_wanted));
  return value;
}

__device__ __forceinline__ uint4 ld_global_or_zero_v4(const void* address, uint32_t is_wanted) {
  uint4 value;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(address), "r"(is_wanted));
  return value;
}

__device__ __forceinline__ void prefetch_global_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// --- synchronisation and registers ----------------------------------------------------------------------------------

__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same, and whether any of the threads said yes.
__device__ __forceinline__ bool bar_red_or(int barrier, int threads, bool vote) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.b32 q, %3, 0;\n"
      "bar.red.or.pred p, %1, %2, q;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"((uint32_t)vote)
      : "memory");
  return any != 0;
}

template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Waits until the launches before this one in the stream have completed and their writes are visible. Returns at once
// in a launch without the programmatic attribute.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next programmatic launch of the stream begin once every CTA has said so or has exited.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Read where it is needed: what the compiler derives from it is then not kept in registers across a role.
__device__ __forceinline__ int thread_index() {
  int value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
}

// True in one lane of a warp, all of whose lanes must come here.
__device__ __forceinline__ bool elect_one() {
  uint32_t is_elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(is_elected));
  return is_elected != 0;
}

// The largest of a warp's numbers, which are not negative.
__device__ __forceinline__ int reduce_max(int value) {
  int result;
  asm volatile("redux.sync.max.s32 %0, %1, 0xFFFFFFFF;" : "=r"(result) : "r"(value));
  return result;
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float ex2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float lg2(float value) {
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Two fp32 to one register of two bf16 or fp16; `low` is the element of the lower address.
template <bool IS_BF16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (IS_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

// Two fp16 of one register to fp32, the lower address first.
__device__ __forceinline__ float2 unpack_fp16(uint32_t both) {
  float2 result;
  asm("{\n.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n}"
      : "=f"(result.x), "=f"(result.y)
      : "r"(both));
  return result;
}

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// The larger magnitudes of two bf16 each; NaN where one is NaN.
__device__ __forceinline__ uint32_t max_abs_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{\n.reg .b32 abs_a, abs_b;\n"
      "abs.bf16x2 abs_a, %1;\n"
      "abs.bf16x2 abs_b, %2;\n"
      "max.NaN.bf16x2 %0, abs_a, abs_b;\n}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}

// Four fp16 of two registers as e4m3, in the order of addresses. What is too large becomes 448, NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3_of(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{\n.reg .b16 first, second;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 first, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 second, %2;\n"
      "mov.b32 %0, {first, second};\n}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}

// Four e4m3 as fp16, the lower two to `a`.
__device__ __forceinline__ void fp16_of(uint32_t codes, uint32_t& a, uint32_t& b) {
  asm("{\n.reg .b16 first, second;\n"
      "mov.b32 {first, second}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;\n}"
      : "=r"(a), "=r"(b)
      : "r"(codes));
}

// 16 * (a - b) of two fp16.
__device__ __forceinline__ uint32_t rest_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{\n.reg .b32 rest;\n"
      "sub.rn.f16x2 rest, %1, %2;\n"
      "mul.rn.f16x2 %0, rest, %3;\n}"
      : "=r"(result)
      : "r"(a), "r"(b), "r"(0x4C004C00));
  return result;
}

// Four fp16 of two registers as e4m3, and 16 times what is left of each: x = high + low / 16. In steps, not as one
// block: so the compiler converts back out of either half of a register, and else copies halves first.
__device__ __forceinline__ void split_e4m3(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  high = e4m3_of(a, b);
  uint32_t back_a, back_b;
  fp16_of(high, back_a, back_b);
  low = e4m3_of(rest_f16x2(a, back_a), rest_f16x2(b, back_b));
}

// Bytes of two registers, 0 to 3 of `a` and 4 to 7 of `b`, by the four digits of `selector`, the lowest first.
__device__ __forceinline__ uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
