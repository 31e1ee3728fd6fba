// A CUDA block on the host: a thread per CUDA thread, barriers for __syncthreads and the warp's instructions. Enough of
// CUDA C++ to run kernels/plan.cu and slots.cu where there is no GPU; nothing of its memory model or its speed.
#pragma once

#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

using std::max;
using std::min;
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
struct Index {
  int x;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline thread_local Index threadIdx, blockIdx;
inline pthread_barrier_t block_barrier, warp_barriers[32];
inline long long exchanged[1024];

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline int __ffs(unsigned mask) { return ffs(static_cast<int>(mask)); }
inline int __popc(unsigned mask) { return __builtin_popcount(mask); }

inline long long __shfl_xor_sync(unsigned, long long value, int distance) {
  pthread_barrier_t* barrier = &warp_barriers[threadIdx.x / 32];
  exchanged[threadIdx.x] = value;
  pthread_barrier_wait(barrier);
  const long long other = exchanged[threadIdx.x ^ distance];
  pthread_barrier_wait(barrier);  // read by all before it is written again
  return other;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = vote ? 1u << threadIdx.x % 32 : 0u;
  for (int distance = 16; distance > 0; distance /= 2) {
    votes |= static_cast<unsigned>(__shfl_xor_sync(0, votes, distance));
  }
  return votes;
}

template <typename Kernel, typename Params>
void launch_on_host(Kernel kernel, const Params& params, int blocks, int threads) {
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&warp_barriers[warp], nullptr, 32);
  for (int block = 0; block < blocks; ++block) {
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &params] {
        blockIdx.x = block;
        threadIdx.x = thread;
        kernel(params);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}
