// The decode kernels on the host, in place of ptx.cuh: a thread per CUDA thread, one cluster at a time. Written from
// the PTX ISA, not from the kernels: TMA writes boxes with the 128-byte swizzle, ldmatrix, stmatrix and wgmma take
// fragments and descriptors apart as the ISA lays them out, an mbarrier's phase ends when arrivals and bytes are
// complete. What a kernel gets wrong in an address, a descriptor, a fragment or the order of its barriers comes out as
// a wrong number or a wait that never ends. TMA and stores to other CTAs finish where they are issued, or, on demand,
// as late and as far out of order as they may. Not modelled: the asynchrony of wgmma, proxies.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // clusters run one at a time; those of more than one CTA have dynamic shared memory alone
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Index {
  int x, y, z;
};
inline thread_local Index threadIdx, blockIdx;
inline int cta_threads, cluster_size;
constexpr int MOST_CTAS = 2, MOST_THREADS = 512;  // of a cluster, and of a CTA
inline thread_local int cta_rank;
inline int thread_index() { return threadIdx.x; }
inline int cluster_thread() { return cta_rank * cta_threads + threadIdx.x; }

// --- waiting --------------------------------------------------------------------------------------------------------

// Set when a wait took too long; then no wait waits any more, and the kernel runs to its end with wrong numbers.
inline std::atomic<bool> is_stuck = false;
inline std::mutex lock;
inline std::condition_variable changed;
constexpr auto PATIENCE = std::chrono::seconds(20);
// Counts what the threads do: barriers and matrix products. Where it stands still, they wait for TMA.
inline std::atomic<int64_t> progress = 0;

// Or all CUDA threads on one thread of the host, each until it waits: several times as fast, always in one order.
struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool has_begun = false, has_ended = false;
  std::vector<char> stack = std::vector<char>(1 << 16);
};
inline bool are_fibers = false;
// The warpgroup of the cluster whose fibers go on as long as they can before others have a turn, to be ahead wherever
// it may; < 0: none.
inline int favoured = -1;
// The warp of the cluster whose fibers have a turn only when no others can go on; < 0: none.
inline int delayed = -1;
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> of_fiber;

inline void switch_fiber() {
  if (_setjmp(fibers[cluster_thread()].here) == 0) _longjmp(scheduler, 1);
}
inline void begin_fiber() {
  of_fiber();
  fibers[cluster_thread()].has_ended = true;
  _longjmp(scheduler, 1);
}
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.has_begun) _longjmp(fiber.here, 1);
  fiber.has_begun = true;
  setcontext(&fiber.start);
}

template <class Condition>
void wait_until(std::unique_lock<std::mutex>& held, std::condition_variable& event, Condition condition) {
  if (are_fibers) {
    for (; !is_stuck && !condition(); held.lock()) held.unlock(), switch_fiber();
    ++progress;
    return;
  }
  if (!event.wait_for(held, PATIENCE, [&] { return is_stuck || condition(); })) is_stuck = true;
}

struct Barrier {
  std::mutex lock;
  std::condition_variable all_here;
  int here = 0, generation = 0;
  bool votes = false, result = false;

  // Returns whether any of the threads voted yes.
  bool wait(int threads, bool vote = false) {
    std::unique_lock<std::mutex> held(lock);
    ++progress;
    const int mine = generation;
    votes |= vote;
    if (++here == threads) {
      here = 0;
      ++generation;
      result = votes;
      votes = false;
      all_here.notify_all();
    } else {
      wait_until(held, all_here, [&] { return generation != mine; });
    }
    return result;  // the next generation cannot end without this thread
  }

  // After a kernel that got stuck.
  void reset() { here = 0, votes = false; }
};

inline Barrier named_barriers[MOST_CTAS][16];
inline Barrier warp_barriers[MOST_CTAS * MOST_THREADS / 32];

inline bool bar_red_or(int barrier, int threads, bool vote) {
  return named_barriers[cta_rank][barrier].wait(threads, vote);
}
inline void bar_sync(int barrier, int threads) { bar_red_or(barrier, threads, false); }
inline void __syncthreads() { bar_sync(0, cta_threads); }
inline void __syncwarp() { warp_barriers[cluster_thread() / 32].wait(32); }

// All threads of a cluster.
struct ClusterBarrier {
  std::mutex lock;
  std::condition_variable all_here;
  int here = 0, generation = 0;
  int arrived_in[MOST_CTAS * MOST_THREADS];

  void arrive() {
    std::lock_guard<std::mutex> held(lock);
    ++progress;
    arrived_in[cluster_thread()] = generation;
    if (++here < cluster_size * cta_threads) return;
    here = 0;
    ++generation;
    all_here.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> held(lock);
    wait_until(held, all_here, [&] { return generation != arrived_in[cluster_thread()]; });
  }
};
inline ClusterBarrier cluster_barrier;
inline void cluster_arrive() { cluster_barrier.arrive(); }
inline void cluster_wait() { cluster_barrier.wait(); }
inline uint32_t cluster_rank() { return cta_rank; }

struct Mbarrier {
  uint16_t expected, pending;
  int32_t bytes : 24;
  uint32_t phase : 8;
};
static_assert(sizeof(Mbarrier) == 8);

inline void update(uint64_t& barrier, int arrivals, int bytes) {
  std::lock_guard<std::mutex> held(lock);
  ++progress;
  Mbarrier& state = reinterpret_cast<Mbarrier&>(barrier);
  if (state.pending < arrivals) is_stuck = true;  // more arrivals than the phase has
  state.pending -= arrivals;
  state.bytes += bytes;
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.expected;
    state.phase ^= 1;
    changed.notify_all();
  }
}

inline void mbarrier_init(uint64_t& barrier, uint32_t count) {
  reinterpret_cast<Mbarrier&>(barrier) = {(uint16_t)count, (uint16_t)count, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t& barrier, uint32_t count = 1) { update(barrier, count, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t& barrier, uint32_t bytes) { update(barrier, 1, bytes); }
inline bool mbarrier_test_wait(uint64_t& barrier, uint32_t parity) {
  std::lock_guard<std::mutex> held(lock);
  return reinterpret_cast<Mbarrier&>(barrier).phase != parity;
}
inline void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  std::unique_lock<std::mutex> held(lock);
  wait_until(held, changed, [&] { return reinterpret_cast<Mbarrier&>(barrier).phase != parity; });
}

inline void fence_proxy_async() {}
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}
template <int REGISTERS>
void setmaxnreg_inc() {}
template <int REGISTERS>
void setmaxnreg_dec() {}

// --- a warp ---------------------------------------------------------------------------------------------------------

inline uint32_t exchanged[MOST_CTAS * MOST_THREADS][4];

// Each lane's four registers, to be read by the others until the next __syncwarp.
inline const uint32_t (*share(uint32_t a, uint32_t b = 0, uint32_t c = 0, uint32_t d = 0))[4] {
  uint32_t* mine = exchanged[cluster_thread()];
  mine[0] = a, mine[1] = b, mine[2] = c, mine[3] = d;
  __syncwarp();
  return exchanged + cluster_thread() / 32 * 32;
}

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = share(bits)[lane][0];
  __syncwarp();
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return shuffle(value, threadIdx.x % 32 ^ distance);
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  const auto votes = share(vote);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (uint32_t)(votes[lane][0] != 0) << lane;
  __syncwarp();
  return result;
}
inline bool elect_one() { return threadIdx.x % 32 == 0; }
inline int reduce_max(int value) {
  const auto values = share((uint32_t)value);
  int result = value;
  for (int lane = 0; lane < 32; ++lane) result = max(result, (int)values[lane][0]);
  __syncwarp();
  return result;
}
inline bool __any_sync(unsigned, bool vote) {
  const auto votes = share(vote);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= votes[lane][0] != 0;
  __syncwarp();
  return any;
}

inline bool __all_sync(unsigned mask, bool vote) { return !__any_sync(mask, !vote); }

// --- shared memory --------------------------------------------------------------------------------------------------

constexpr uint32_t SHARED_BASE = 1024;  // where dynamic_shared begins, as the kernel sees addresses
constexpr uint32_t SHARED_SIZE = 232448;
alignas(1024) inline uint8_t cluster_shared[MOST_CTAS][SHARED_SIZE];
#define dynamic_shared cluster_shared[cta_rank]

inline uint32_t shared_address(const void* pointer) {
  return (uint32_t)(static_cast<const uint8_t*>(pointer) - cluster_shared[cta_rank]) + SHARED_BASE;
}
inline uint8_t* at(uint32_t address) {
  if (address - SHARED_BASE >= SHARED_SIZE) return is_stuck = true, cluster_shared[cta_rank];
  return cluster_shared[cta_rank] + (address - SHARED_BASE);
}
// 128-byte swizzle: of a 1,024-byte pattern, the 16-byte chunk (bits 4..6) is exclusive-ored with the row (bits 7..9).
inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
// 64-byte swizzle: of a 512-byte pattern, the 16-byte chunk (bits 4..5) with bits 7..8.
inline uint32_t swizzle64(uint32_t address) { return address ^ (address >> 7 & 3) << 4; }

// Lane l holds elements 2 * (l % 4) and the next of row l / 4 of each 8 x 8 matrix; lane 8 m + r has row r of matrix m.
inline void ldmatrix_x4(uint32_t (&value)[4], uint32_t address) {
  const auto addresses = share(address);
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) memcpy(&value[m], at(addresses[8 * m + lane / 4][0]) + lane % 4 * 4, 4);
  __syncwarp();
}
// Transposed: lane l holds rows 2 * (l % 4) and the next, column l / 4.
inline void ldmatrix_x4_trans(uint32_t (&value)[4], uint32_t address) {
  const auto addresses = share(address);
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    uint16_t elements[2];
    for (int pair = 0; pair < 2; ++pair) {
      memcpy(&elements[pair], at(addresses[8 * m + lane % 4 * 2 + pair][0]) + lane / 4 * 2, 2);
    }
    memcpy(&value[m], elements, 4);
  }
  __syncwarp();
}
inline void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const auto addresses = share(address);
  const int lane = threadIdx.x % 32;
  const uint32_t value[4] = {a, b, c, d};
  for (int m = 0; m < 4; ++m) memcpy(at(addresses[8 * m + lane / 4][0]) + lane % 4 * 4, &value[m], 4);
  __syncwarp();
}
// Transposed: what lane l holds is rows 2 * (l % 4) and the next, column l / 4, of the matrix in memory.
inline void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const auto addresses = share(address);
  const int lane = threadIdx.x % 32;
  const uint32_t value[4] = {a, b, c, d};
  for (int m = 0; m < 4; ++m) {
    for (int pair = 0; pair < 2; ++pair) {
      const uint16_t element = (uint16_t)(value[m] >> 16 * pair);
      memcpy(at(addresses[8 * m + lane % 4 * 2 + pair][0]) + lane / 4 * 2, &element, 2);
    }
  }
  __syncwarp();
}

inline uint4 ld_shared_v4(uint32_t address) {
  uint4 value;
  memcpy(&value, at(address), 16);
  return value;
}
inline uint2 ld_shared_v2(uint32_t address) {
  uint2 value;
  memcpy(&value, at(address), 8);
  return value;
}
inline float ld_shared(uint32_t address) {
  float value;
  memcpy(&value, at(address), 4);
  return value;
}
inline void st_shared(uint32_t address, uint32_t value) { memcpy(at(address), &value, 4); }
inline void st_shared_v4(uint32_t address, const uint4& value) { memcpy(at(address), &value, 16); }

// Of a CTA of the cluster; only what is made for them takes such an address.
constexpr uint32_t CTA_WINDOW = 1 << 24;
inline uint32_t map_shared(uint32_t address, uint32_t rank) { return (rank + 1) * CTA_WINDOW + address; }
inline std::atomic<int> running_threads[MOST_CTAS];
inline uint8_t* at_cta(uint32_t address) {
  const int rank = (int)(address / CTA_WINDOW) - 1;
  const uint32_t offset = address % CTA_WINDOW - SHARED_BASE;
  // Of a CTA that has ended shared memory is another's.
  if (rank < 0 || rank >= cluster_size || running_threads[rank] == 0 || offset >= SHARED_SIZE) {
    return is_stuck = true, cluster_shared[0];
  }
  return cluster_shared[rank] + offset;
}

// What the host packs in place of CUtensorMap: of 2-byte elements; strides in bytes, of dimension 1 on.
struct alignas(64) TensorMap {
  uint64_t address, sizes[5], strides[4], box[5], swizzle;
};
static_assert(sizeof(TensorMap) == 128);

inline void load_box(void* target, const TensorMap& map, uint64_t& barrier, const int (&start)[5]) {
  uint32_t address = shared_address(target);
  if (address % 128 || (map.swizzle == 128 && map.box[0] != 64)) is_stuck = true;
  uint64_t i[5] = {};
  int bytes = 0;
  for (i[4] = 0; i[4] < map.box[4]; ++i[4])
    for (i[3] = 0; i[3] < map.box[3]; ++i[3])
      for (i[2] = 0; i[2] < map.box[2]; ++i[2])
        for (i[1] = 0; i[1] < map.box[1]; ++i[1])
          for (i[0] = 0; i[0] < map.box[0]; ++i[0], address += 2, bytes += 2) {
            uint16_t element = 0;
            uint64_t from = map.address;
            bool is_inside = true;
            for (int dim = 0; dim < 5; ++dim) {
              const int64_t at = start[dim] + (int64_t)i[dim];
              is_inside &= at >= 0 && at < (int64_t)map.sizes[dim];
              from += at * (dim ? map.strides[dim - 1] : 2);
            }
            if (is_inside) element = *reinterpret_cast<const uint16_t*>(from);
            memcpy(at(map.swizzle == 128 ? swizzle128(address) : address), &element, 2);
          }
  update(barrier, 0, -bytes);
}

// No order is promised among loads, nor among what goes to other CTAs: late ones come only when nothing else can go on,
// the last issued first.
inline bool loads_are_late = false;
inline std::vector<std::function<void()>> late_loads;  // of the cluster, under `lock`
constexpr auto STANDSTILL = std::chrono::milliseconds(20);

// Now, or late and then as this CTA.
template <class Load>
void issue(const Load& load) {
  if (!loads_are_late) return load();
  std::lock_guard<std::mutex> held(lock);
  ++progress;
  late_loads.push_back([load, rank = cta_rank] {
    const int before = cta_rank;
    cta_rank = rank;
    load();
    cta_rank = before;
  });
}

inline void tma_load_5d(void* target, const TensorMap& map, uint64_t& barrier, int column, int row, int tile, int head,
                        int outer) {
  issue([=, &map, &barrier] { load_box(target, map, barrier, {column, row, tile, head, outer}); });
}

inline void bulk_load(uint32_t target, const void* from, uint32_t bytes, uint64_t& barrier) {
  if (target % 16 || bytes % 16 || reinterpret_cast<uint64_t>(from) % 16) is_stuck = true;
  issue([=, &barrier] {
    if (is_stuck) return;    // then `from` may be anything
    at(target + bytes - 1);  // which says so if that is not in shared memory
    memcpy(at(target), from, bytes);
    update(barrier, 0, -(int)bytes);
  });
}

// One per lane.
template <class Send>
void send(const Send& to_there) {
  if (!are_fibers) return to_there();  // a standstill of threads takes 20 ms to be seen
  issue(to_there);
}
// Copies that a thread still waits for.
inline std::atomic<int> copies[MOST_CTAS * MOST_THREADS];
inline void cp_async_16(uint32_t target, const void* from, uint32_t bytes) {
  if (target % 16 || reinterpret_cast<uint64_t>(from) % 16) is_stuck = true;
  uint8_t* const to = at(target);
  std::atomic<int>& mine = copies[cluster_thread()];
  ++mine;
  send([=, &mine] {
    memset(to, 0, 16);
    if (!is_stuck) memcpy(to, from, bytes);
    std::lock_guard<std::mutex> held(lock);
    ++progress;
    --mine;
    changed.notify_all();
  });
}
inline void cp_async_wait_all() {
  std::unique_lock<std::mutex> held(lock);
  wait_until(held, changed, [] { return copies[cluster_thread()] == 0; });
}

// To another CTA.
inline void mbarrier_arrive_cluster(uint32_t barrier) {
  send([=] { update(*reinterpret_cast<uint64_t*>(at_cta(barrier)), 1, 0); });
}
template <class T>
void store_late(uint32_t target, const T& value, uint32_t barrier) {
  if (target % sizeof(T) || target / CTA_WINDOW != barrier / CTA_WINDOW) is_stuck = true;
  send([=] {
    memcpy(at_cta(target), &value, sizeof(T));
    update(*reinterpret_cast<uint64_t*>(at_cta(barrier)), 0, -(int)sizeof(T));
  });
}
inline void st_async(uint32_t target, uint32_t value, uint32_t barrier) { store_late(target, value, barrier); }
inline void st_async_v4(uint32_t target, const uint4& value, uint32_t barrier) { store_late(target, value, barrier); }

// A thread that does the late loads until the cluster has ended.
inline void do_late_loads(const std::atomic<bool>& has_ended) {
  int64_t seen = -1;
  while (!has_ended) {
    std::this_thread::sleep_for(STANDSTILL);
    if (seen != progress) {
      seen = progress;
      continue;
    }
    std::function<void()> load;
    {
      std::lock_guard<std::mutex> held(lock);
      if (late_loads.empty()) continue;
      load = late_loads.back();
      late_loads.pop_back();
    }
    load();
  }
}

// --- global memory and arithmetic -----------------------------------------------------------------------------------

template <class T>
T ld_global_nc(const T* address) {
  return *address;
}
template <class T>
T load_or_zero(const void* address, uint32_t is_wanted) {
  T value{};
  if (is_wanted && !is_stuck) memcpy(&value, address, sizeof(T));
  return value;
}
inline uint32_t ld_global_or_zero(const void* address, uint32_t is_wanted) {
  return load_or_zero<uint32_t>(address, is_wanted);
}
inline uint2 ld_global_or_zero_v2(const void* address, uint32_t is_wanted) {
  return load_or_zero<uint2>(address, is_wanted);
}
inline uint4 ld_global_or_zero_v4(const void* address, uint32_t is_wanted) {
  return load_or_zero<uint4>(address, is_wanted);
}
inline void prefetch_global_l2(const void*) {}
inline uint32_t max_abs_bf16x2(uint32_t a, uint32_t b) {  // of positive numbers bits are in their order, NaN above
  const uint32_t low = std::max(a & 0x7FFF, b & 0x7FFF), high = std::max(a >> 16 & 0x7FFF, b >> 16 & 0x7FFF);
  return low | high << 16;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float ex2(float value) { return exp2f(value); }
inline float lg2(float value) { return log2f(value); }
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }

// To the nearest bf16, ties to even; NaN stays NaN.
inline uint16_t to_bf16_bits(float value) {
  const uint32_t bits = (uint32_t)__float_as_int(value);
  return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <bool IS_BF16>
uint32_t pack(float low, float high) {
  if (IS_BF16) return to_bf16_bits(low) | (uint32_t)to_bf16_bits(high) << 16;
  const _Float16 both[2] = {(_Float16)low, (_Float16)high};
  uint32_t result;
  memcpy(&result, both, 4);
  return result;
}
inline float half(const void* address) {
  _Float16 value;
  memcpy(&value, address, 2);
  return value;
}
inline float brain(const void* address) {
  uint16_t bits;
  memcpy(&bits, address, 2);
  return __int_as_float(bits << 16);
}
template <bool IS_BF16>
float number(const void* address) {
  return IS_BF16 ? brain(address) : half(address);
}
inline float2 unpack_fp16(uint32_t both) { return {half(&both), half(reinterpret_cast<const uint8_t*>(&both) + 2)}; }

// Of both halves, rounded once: what a product and a sum of bf16 need fits in a double.
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int half) {
    const auto at = [&](const uint32_t& both) {
      return (double)brain(reinterpret_cast<const uint8_t*>(&both) + 2 * half);
    };
    const double exact = at(a) * at(b) + at(c);
    float rounded = (float)exact;  // to odd, so that rounding twice is rounding once
    if (rounded != exact && std::isfinite(rounded)) {
      int bits = __float_as_int(rounded);
      if (std::fabs((double)rounded) > std::fabs(exact)) --bits;
      rounded = __int_as_float(bits | 1);
    }
    return (uint32_t)to_bf16_bits(rounded);
  };
  return one(0) | one(1) << 16;
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000); }

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN, the largest is 448.
inline float from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp((float)mantissa, -9) : std::ldexp(8.f + mantissa, exponent - 10);
  if ((code & 0x7F) == 0x7F) value = std::numeric_limits<float>::quiet_NaN();
  return code & 0x80 ? -value : value;
}
// To the nearest, ties to even mantissas; what is too large becomes the largest.
inline uint8_t to_e4m3(float value) {
  if (value != value) return 0x7F;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fmin(std::fabs(value), 448.f);
  int exponent = -6;
  if (magnitude >= 0x1p-6f) std::frexp(magnitude, &exponent), --exponent;
  const float steps = std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 0 to 16
  return sign | (uint8_t)((exponent + 6) * 8 + (int)steps);
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  const float2 x = unpack_fp16(a), y = unpack_fp16(b);
  return pack<false>(x.x * y.x, x.y * y.y);
}
inline void fp16_of(uint32_t codes, uint32_t& a, uint32_t& b) {
  a = pack<false>(from_e4m3(codes & 0xFF), from_e4m3(codes >> 8 & 0xFF));
  b = pack<false>(from_e4m3(codes >> 16 & 0xFF), from_e4m3(codes >> 24));
}
inline void split_e4m3(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const float2 first = unpack_fp16(a), second = unpack_fp16(b);
  const float values[4] = {first.x, first.y, second.x, second.y};
  high = low = 0;
  for (int i = 0; i < 4; ++i) {
    const uint8_t code = to_e4m3(values[i]);
    const _Float16 rest = (_Float16)((_Float16)values[i] - (_Float16)from_e4m3(code));
    high |= (uint32_t)code << 8 * i;
    low |= (uint32_t)to_e4m3((float)(_Float16)(rest * (_Float16)16)) << 8 * i;
  }
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

inline void wgmma_fence() {}
inline void wgmma_commit_group() {}
// Groups that may be pending are complete too: nobody may rely on that they are not. Nor on that the other warps' rows
// of a wgmma are, whose operands those still read.
template <int PENDING>
void wgmma_wait_group() {}

// Element (row, k) of an operand in shared memory, as its descriptor says: K-major, or MN-major where `is_transposed`.
template <bool IS_BF16>
float element(uint64_t descriptor, int row, int k, bool is_transposed) {
  const uint32_t address = (descriptor & 0x3FFF) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 == 0 && !is_transposed) {  // core matrices of 8 rows x 16 bytes
    return number<IS_BF16>(at(address + row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2));
  }
  if (descriptor >> 62 != 1) return is_stuck = true, 0.f;
  if (is_transposed) {  // 8 rows of 64 elements along the operand's rows
    return number<IS_BF16>(at(swizzle128(address + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2)));
  }
  return number<IS_BF16>(at(swizzle128(address + row / 8 * stride + row % 8 * 128 + k * 2)));
}

template <bool IS_BF16, int N, class A>
void multiply(float* d, const A& a, uint64_t b, bool is_transposed, bool accumulate) {
  ++progress;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  for (int half = 0; half < 2; ++half) {
    float row[16];
    for (int k = 0; k < 16; ++k) row[k] = a(16 * warp + 8 * half + lane / 4, k);
    for (int n8 = 0; n8 < N / 8; ++n8) {
      for (int pair = 0; pair < 2; ++pair) {
        float& sum = d[4 * n8 + 2 * half + pair];
        if (!accumulate) sum = 0.f;
        for (int k = 0; k < 16; ++k)
          sum += row[k] * element<IS_BF16>(b, 8 * n8 + 2 * (lane % 4) + pair, k, is_transposed);
      }
    }
  }
}

// Register r of lane l holds elements k = 8 * (r / 2) + 2 * (l % 4) and the next of row l / 4 + 8 * (r % 2).
template <bool IS_BF16, int N>
void multiply_registers(float* d, const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const auto shared = share(a[0], a[1], a[2], a[3]);
  const auto from_registers = [&](int row, int k) {
    const uint32_t& pair = shared[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row % 16 / 8];
    return number<IS_BF16>(reinterpret_cast<const uint8_t*>(&pair) + k % 2 * 2);
  };
  multiply<IS_BF16, N>(d, from_registers, b, false, accumulate);
  __syncwarp();
}
template <bool IS_BF16>
void wgmma_m64n64k16_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  multiply_registers<IS_BF16, 64>(d, a, b, accumulate);
}
template <int REGISTERS>
void wgmma_m64k16_narrow_registers(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b) {
  multiply_registers<true, 2 * REGISTERS>(d, a, b, true);
}
template <bool IS_BF16>
void wgmma_m64n64k16_shared(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  multiply<IS_BF16, 64>(d, [&](int row, int k) { return element<IS_BF16>(a, row, k, false); }, b, false, accumulate);
}
template <bool IS_BF16, int REGISTERS>
void wgmma_m64k16_transposed(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  const auto from_memory = [&](int row, int k) { return element<IS_BF16>(a, row, k, false); };
  multiply<IS_BF16, 2 * REGISTERS>(d, from_memory, b, true, accumulate);
}
template <bool IS_BF16, bool IS_A_TRANSPOSED, int REGISTERS>
void wgmma_m64k16_narrow(float (&d)[REGISTERS], uint64_t a, uint64_t b) {
  const auto from_memory = [&](int row, int k) { return element<IS_BF16>(a, row, k, IS_A_TRANSPOSED); };
  multiply<IS_BF16, 2 * REGISTERS>(d, from_memory, b, false, true);
}

// e4m3: element (row, k) of a K-major operand in shared memory, 128- or 64-byte swizzle.
inline float code_at(uint64_t descriptor, int row, int k) {
  const uint32_t address = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 == 1) return from_e4m3(*at(swizzle128(address + row / 8 * stride + row % 8 * 128 + k)));
  if (descriptor >> 62 == 2) return from_e4m3(*at(swizzle64(address + row / 8 * stride + row % 8 * 64 + k)));
  return is_stuck = true, 0.f;
}
// Of each product and of what has been added up, bits below 2^-13 of the largest are lost, by exponents: a subnormal
// code has that of the smallest normal one.
inline int exponent_of(float code) {
  int exponent = -5;
  if (std::fabs(code) >= 0x1p-6f) std::frexp(code, &exponent);
  return exponent - 1;
}
template <int N, class A>
void multiply_codes(float* d, const A& a, uint64_t b, bool accumulate) {
  ++progress;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  for (int half = 0; half < 2; ++half) {
    float row[32];
    for (int k = 0; k < 32; ++k) row[k] = a(16 * warp + 8 * half + lane / 4, k);
    for (int n8 = 0; n8 < N / 8; ++n8) {
      for (int pair = 0; pair < 2; ++pair) {
        float& sum = d[4 * n8 + 2 * half + pair];
        float terms[33];
        int largest = -200;
        terms[32] = accumulate ? sum : 0.f;
        if (terms[32] != 0.f) std::frexp(terms[32], &largest), --largest;
        for (int k = 0; k < 32; ++k) {
          const float other = code_at(b, 8 * n8 + 2 * (lane % 4) + pair, k);
          terms[k] = row[k] * other;
          if (terms[k] != 0.f) largest = std::max(largest, exponent_of(row[k]) + exponent_of(other));
        }
        const float unit = std::ldexp(1.f, std::max(largest, -100) - 13);
        sum = 0.f;
        for (float term : terms) sum += std::isfinite(term) ? std::trunc(term / unit) * unit : term;
      }
    }
  }
}
template <int REGISTERS>
void wgmma_m64k32_e4m3(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  multiply_codes<2 * REGISTERS>(d, [&](int row, int k) { return code_at(a, row, k); }, b, accumulate);
}
// Register r of lane l holds elements k = 16 * (r / 2) + 4 * (l % 4) and the next three of row l / 4 + 8 * (r % 2).
template <int REGISTERS>
void wgmma_m64k32_e4m3_registers(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const auto shared = share(a[0], a[1], a[2], a[3]);
  const auto from_registers = [&](int row, int k) {
    return from_e4m3((uint8_t)(shared[row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row % 16 / 8] >> k % 4 * 8));
  };
  multiply_codes<2 * REGISTERS>(d, from_registers, b, accumulate);
  __syncwarp();
}

// --- launch ---------------------------------------------------------------------------------------------------------

// A cluster in turns; a turn in which nothing goes on is the end of it, or of the wait for a late load.
inline void run_fibers(const Index* blocks, const std::function<void()>& function) {
  const int threads = cluster_size * cta_threads;
  of_fiber = function;
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, begin_fiber, 0);
  }
  for (int running = threads; running > 0;) {
    const int64_t before = progress;
    const int running_before = running;
    bool is_late_turn = false;
    const auto turn = [&](int from, int to) {
      for (int thread = from; thread < to; ++thread) {
        if (fibers[thread].has_ended || (thread / 32 == delayed && !is_late_turn)) continue;
        cta_rank = thread / cta_threads;
        blockIdx = blocks[cta_rank], threadIdx = {thread % cta_threads, 0, 0};
        resume(fibers[thread]);
        running -= fibers[thread].has_ended;
        running_threads[thread / cta_threads] -= fibers[thread].has_ended;
      }
    };
    for (int64_t seen = -1; favoured >= 0 && seen != progress;) {
      seen = progress;
      turn(128 * favoured, 128 * favoured + 128);
    }
    turn(0, threads);
    if (progress != before || running != running_before) continue;
    is_late_turn = true;
    if (delayed >= 0) turn(32 * delayed, 32 * delayed + 32);
    if (progress != before || running != running_before) continue;
    if (late_loads.empty()) {
      is_stuck = true;
      continue;
    }
    const auto load = late_loads.back();
    late_loads.pop_back();
    load();
  }
}

// What shared memory holds when a CTA begins.
inline uint32_t garbage = 0xFFFFFFFF;

// Returns whether every wait ended and every address was one of shared memory. `cluster`: CTAs of one, in x.
template <class Kernel, class Params>
bool launch_on_host(Kernel kernel, const Params& params, Index grid, int threads, int cluster = 1) {
  cta_threads = threads;
  cluster_size = cluster;
  is_stuck = cluster > MOST_CTAS || threads > MOST_THREADS || grid.x % cluster != 0;
  is_stuck = is_stuck || favoured >= cluster * threads / 128 || delayed >= cluster * threads / 32;
  for (int block = 0; block < grid.x * grid.y * grid.z && !is_stuck; block += cluster) {
    Index blocks[MOST_CTAS];
    for (int rank = 0; rank < cluster; ++rank) {
      blocks[rank] = {block % grid.x + rank, block / grid.x % grid.y, block / grid.x / grid.y};
      running_threads[rank] = threads;
      for (uint32_t at = 0; at < SHARED_SIZE; at += 4) memcpy(cluster_shared[rank] + at, &garbage, 4);
      for (Barrier& barrier : named_barriers[rank]) barrier.reset();
    }
    for (Barrier& barrier : warp_barriers) barrier.reset();
    cluster_barrier.here = 0;
    if (are_fibers) {
      run_fibers(blocks, [&] { kernel(params); });
      is_stuck = is_stuck || !late_loads.empty();
      late_loads.clear();
      continue;
    }
    std::atomic<bool> has_ended = false;
    std::thread late([&] {
      if (loads_are_late) do_late_loads(has_ended);
    });
    std::vector<std::thread> running;
    for (int thread = 0; thread < cluster * threads; ++thread) {
      running.emplace_back([=, &params] {
        cta_rank = thread / threads;
        blockIdx = blocks[cta_rank];
        threadIdx = {thread % threads, 0, 0};
        kernel(params);
        --running_threads[cta_rank];
      });
    }
    for (std::thread& thread : running) thread.join();
    has_ended = true;
    late.join();
    is_stuck = is_stuck || !late_loads.empty();
    late_loads.clear();
  }
  return !is_stuck;
}
