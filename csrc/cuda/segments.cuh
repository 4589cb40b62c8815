// The norms of segments, on a GPU. The warp that measures the last tile of a segment adds up its tiles, so that small
// segments are summed all over the grid, while other tiles are measured. The block that opens the barrier adds up the
// large ones.
#pragma once

#include "decision.cuh"
#include "sums.cuh"
#include "tiles.cuh"

namespace fastclip::cuda {
namespace {

// Where a kernel finds what the table says of the segments.
struct Segments {
  const SegmentRow* rows;
  const NormLimit* limits;  // of the groups
  const uint32_t* by_block;  // the segments that a block sums
};

template <class K, DTypes kDTypes>
__device__ __forceinline__ Segments segments_of(const Header& header, const Table<K, kDTypes>& table) {
  const auto* const rows = reinterpret_cast<const SegmentRow*>(table.entries + header.tensors);
  const auto* const limits = reinterpret_cast<const NormLimit*>(rows + header.segments + 1);
  return {rows, limits, reinterpret_cast<const uint32_t*>(limits + header.groups)};
}

__device__ __noinline__ uint32_t segment_of(const Header& header, const SegmentRow* rows, uint32_t tile) {
  return static_cast<uint32_t>(&entry_of(rows, header.segments, tile) - rows);
}

// Writes what was measured of a segment, and the level of its limit.
__device__ __noinline__ void close_segment(const Header& header, Segments segments, uint32_t segment, Measure sum) {
  const SegmentRow& row = segments.rows[segment];
  SegmentOutcome& outcome = header.segment_outcomes[segment];
  outcome.sum = sum;
  outcome.level = level_of(segments.limits[row.group], row.history);
}

// A warp has measured a tile. If it is the last of its segment, the warp adds up all of them, in their order.
template <bool kWide>
__device__ __noinline__ void note_tile(const Header& header, Segments segments, uint32_t tile) {
  const uint32_t segment = segment_of(header, segments.rows, tile);
  const uint32_t first = segments.rows[segment].first_tile, end = segments.rows[segment + 1].first_tile;
  if (end - first > kTilesOfWarp) return;
  const uint32_t lane = threadIdx.x % kWarp;
  SegmentOutcome& outcome = header.segment_outcomes[segment];
  bool last = false;
  if (lane == 0) {
    __threadfence();
    last = atomicAdd(&outcome.measured, 1u) == end - first - 1;
  }
  if (!__shfl_sync(0xffffffffu, int{last}, 0)) return;
  __threadfence();
  const Measure of_lane = sum_of_lane<kWide>(header, header.measures, first + lane, end, kWarp);
  const Measure sum = sum_over_warp<kWide>(header.norm, of_lane);
  if (lane != 0) return;
  close_segment(header, segments, segment, sum);
  atomicExch(&outcome.measured, 0u);
}

__device__ __forceinline__ Level level_of_segment(const Header& header, uint32_t segment) {
  const volatile Level& level = header.segment_totals[segment].level;
  return {level.center, level.deviation};
}

// Decides for a segment, by the sums of all devices.
__device__ __noinline__ SegmentDecision decide_for_segment(const Header& header, Segments segments, uint32_t segment) {
  const volatile Measure& sum = header.segment_totals[segment].sum;
  return decide_for(header.norm, segments.limits[segments.rows[segment].group], level_of_segment(header, segment),
                    Measure{sum.small, sum.medium, sum.big});
}

// Returns the factor of a tile's gradients, and with kNeedsNorm their tensor's norm after it. `of_all` is the factor
// that all have in common.
template <class R>
__device__ __forceinline__ ScalingOf<R> scaling_of_tile(const Header& header, Segments segments, uint32_t tile,
                                                        const Scaling& of_all) {
  ScalingOf<R> scaling;
  static_cast<Scaling&>(scaling) = of_all;
  if (header.segments > 0) {
    const SegmentDecision decision = decide_for_segment(header, segments, segment_of(header, segments.rows, tile));
    static_cast<Scaling&>(scaling) = both(of_all, decision.scaling);
    if constexpr (R::kNeedsNorm) scaling.norm = decision.total_norm * scaling.product();
  }
  return scaling;
}

// Returns that norm again, as one thread finds it in what was recorded of the tensor's segment. Not by tiles: an empty
// tensor has none.
template <class R, class OneEntry>
__device__ __forceinline__ double norm_of_tensor(const Header& header, Segments segments, const OneEntry& entry) {
  if constexpr (R::kNeedsNorm) {
    uint32_t low = 0;  // the last row whose number is the tensor's or smaller
    for (uint32_t count = header.segments; count > 1;) {
      const uint32_t half = count / 2;
      const bool after = segments.rows[low + half].number <= entry.index;
      low = after ? low + half : low;
      count = after ? count - half : half;
    }
    const volatile SegmentOutcome& outcome = header.segment_outcomes[low];
    const volatile double& of_all = header.outcome->coefficient;
    return outcome.total_norm * (of_all * outcome.coefficient);
  } else {
    return 0;
  }
}

// Records what follows for all segments, and lets their limits remember the norms; dealt out to the warps of the grid.
__device__ __noinline__ void record_segments(const Header& header, Segments segments, bool remembers) {
  const Warp warp;
#pragma unroll 1
  for (uint32_t segment = blockIdx.x * kWarps + threadIdx.x / kWarp; segment < header.segments;
       segment += gridDim.x * kWarps) {
    const SegmentDecision decision = decide_for_segment(header, segments, segment);
    if (warp.is_first()) record(header.segment_outcomes[segment], decision);
    const SegmentRow& row = segments.rows[segment];
    if (remembers && row.history) {
      push(segments.limits[row.group], row.history, level_of_segment(header, segment), decision.total_norm, false,
           warp);
    }
  }
}

}  // namespace
}  // namespace fastclip::cuda
