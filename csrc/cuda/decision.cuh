// What follows from the norm, on a GPU, and what the rules among the limits remember: read by the block that opens the
// barrier, changed by block 0 behind it. Each kernel has its own copy of what it calls, so all of it is kept small:
// called and not inlined, and with loops that are not unrolled.
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
#pragma unroll 1
    for (int first = 0; first < count; first += kWarp) {
      const int i = first + static_cast<int>(lane);
      below += __popc(__ballot_sync(0xffffffffu, i < count && numbers[i] < bound));
    }
    return below;
  }
  __device__ void move(double* to, const double* from, int count) const {
    const int rounds = (count + kWarp - 1) / kWarp;
#pragma unroll 1
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

__device__ __forceinline__ Levels levels_of(const Header& header) {
  const volatile Levels& levels = *header.levels;
  return {{levels.max_norm.center, levels.max_norm.deviation}, {levels.skip_norm.center, levels.skip_norm.deviation}};
}

// Decides for one block.
__device__ __noinline__ void decide_from_sums(const Header& header, Decision& decision) {
  Sums sums{};
  const auto add = [&](Measure& sum, const volatile Measure& measured) {
    combine(header.norm, sum, Measure{measured.small, measured.medium, measured.big});
  };
#pragma unroll 1
  for (int part = 0; part < header.parts; ++part) {
    const volatile Sums& of_part = header.sums[part];
    add(sums.grads, of_part.grads);
    if (!header.limits.measures_change) continue;
    add(sums.change, of_part.change);
    add(sums.params, of_part.params);
  }
  decision = decide(header.norm, sums, header.limits, levels_of(header), header.skip_nonfinite);
}

// AMP skips the step.
__device__ __noinline__ void record_skipped(const Header& header) {
  if (header.measure) read_levels(header);
  if (header.update) record(*header.outcome, skipped(header.limits, levels_of(header)), header.counts_skips);
}

__device__ __noinline__ void push_norm(const Header& header, double norm) {
  const Levels levels = levels_of(header);
  push(header.limits.max_norm, header.clip_history, levels.max_norm, norm, false, Warp{});
  push(header.limits.skip_norm, header.skip_history, levels.skip_norm, norm, true, Warp{});
}

}  // namespace
}  // namespace fastclip::cuda
