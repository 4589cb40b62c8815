// What the rules among the limits remember, on a GPU: read by the block that opens the barrier, changed by block 0
// behind it.
#pragma once

#include "table.cuh"

namespace fastclip::cuda {
namespace {

// The lanes of a warp, all together.
struct Warp {
  uint32_t lane = threadIdx.x % kWarp;

  __device__ bool is_first() const { return lane == 0; }
  __device__ void sync() const { __syncwarp(); }
  __device__ int count_below(const double* numbers, int count, double bound) const {
    int below = 0;
    for (int first = 0; first < count; first += kWarp) {
      const int i = first + static_cast<int>(lane);
      below += __popc(__ballot_sync(0xffffffffu, i < count && numbers[i] < bound));
    }
    return below;
  }
  __device__ void move(double* to, const double* from, int count) const {
    const int rounds = (count + kWarp - 1) / kWarp;
    for (int round = 0; round < rounds; ++round) {
      // No round writes what a later one reads.
      const int i = (to < from ? round : rounds - 1 - round) * kWarp + static_cast<int>(lane);
      const double moved = i < count ? from[i] : 0;
      __syncwarp();
      if (i < count) to[i] = moved;
      __syncwarp();
    }
  }
};

__device__ __noinline__ void read_levels(const Header& header) {
  header.outcome->levels = {level_of(header.limits.max_norm, header.clip_history),
                            level_of(header.limits.skip_norm, header.skip_history)};
}

__device__ __noinline__ void push_norm(const Header& header, double norm) {
  push(header.limits.max_norm, header.clip_history, norm, false, Warp{});
  push(header.limits.skip_norm, header.skip_history, norm, true, Warp{});
}

__device__ __forceinline__ Levels levels_of(const Header& header) {
  const volatile Levels& levels = *header.levels;
  return {{levels.max_norm.center, levels.max_norm.deviation}, {levels.skip_norm.center, levels.skip_norm.deviation}};
}

}  // namespace
}  // namespace fastclip::cuda
