// Sums of measures over the lanes of a warp, and over tiles, on a GPU: always in the same order.
#pragma once

#include "table.cuh"

namespace fastclip::cuda {
namespace {

// Sums over the lanes of a warp, for lane 0. Called, as each kernel has its own copy of what it calls, and in a loop.
// kWide: all three parts are in use, not only `medium`.
template <bool kWide>
__device__ __noinline__ Measure sum_over_warp(Norm norm, Measure sum) {
#pragma unroll 1
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Measure other{kWide ? __shfl_down_sync(0xffffffffu, sum.small, offset) : 0,
                        __shfl_down_sync(0xffffffffu, sum.medium, offset),
                        kWide ? __shfl_down_sync(0xffffffffu, sum.big, offset) : 0};
    combine(norm, sum, other);
  }
  return sum;
}

// Sums one lane's share of the tiles up to `end`, `stride` apart. Several loads are under way at once. `volatile`, as
// other blocks have written the measures. A 0 changes no sum and no maximum.
template <bool kWide>
__device__ __noinline__ Measure sum_of_lane(const Header& header, Norm norm, const double* measures, uint32_t first,
                                            uint32_t end, uint32_t stride) {
  constexpr int kAtOnce = 8;
  const volatile double* const medium = measures;
  const volatile double* const small = medium + header.tiles;
  const volatile double* const big = small + header.tiles;
  Measure sum{};
#pragma unroll 1
  for (; first < end; first += kAtOnce * stride) {
    Measure loaded[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t tile = first + k * stride;
      const bool inside = tile < end;
      loaded[k] = {kWide && inside ? small[tile] : 0, inside ? medium[tile] : 0, kWide && inside ? big[tile] : 0};
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) combine(norm, sum, loaded[k]);
  }
  return sum;
}

// Whether the tile that a warp has measured is the last of `count`, of which `measured` are. Then the measures of all
// others can be read.
__device__ __forceinline__ bool is_last_tile(uint32_t& measured, uint32_t count) {
  bool last = false;
  if (threadIdx.x % kWarp == 0) {
    __threadfence();
    last = atomicAdd(&measured, 1u) == count - 1;
  }
  if (!__shfl_sync(0xffffffffu, int{last}, 0)) return false;
  __syncwarp();  // a shuffle orders no memory
  __threadfence();
  return true;
}

}  // namespace
}  // namespace fastclip::cuda
