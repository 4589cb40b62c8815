// Stands in for the CUDA runtime, so that a C++ compiler takes the update kernels and a test runs their threads one after
// the other. Enough for kernels without barriers: the measure kernels compile, and can't run here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

inline double __shfl_down_sync(unsigned, double value, int) { return value; }
inline void __syncthreads() {}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}
