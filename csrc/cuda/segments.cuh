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
  const Hyper* hypers;
  const SegmentRow* rows;
  const NormLimit* limits;  // of the groups
  const ChangeLimits* changes;  // the same, or nothing
  const uint32_t* by_block;  // the segments that a block sums
};

template <class K, DTypes kDTypes>
__device__ __forceinline__ Segments segments_of(const Header& header, Table<K, kDTypes> table) {
  const auto* const rows = reinterpret_cast<const SegmentRow*>(table.entries + header.tensors);
  const auto* const limits = reinterpret_cast<const NormLimit*>(rows + header.segments + 1);
  const auto* const changes = reinterpret_cast<const ChangeLimits*>(limits + header.groups);
  const uint32_t of_changes = header.limits_segments ? header.groups : 0;
  return {table.hypers, rows, limits, changes, reinterpret_cast<const uint32_t*>(changes + of_changes)};
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
template <bool kWide, bool kLimitsChange>
__device__ __noinline__ void note_tile(const Header& header, Segments segments, uint32_t tile) {
  const uint32_t segment = segment_of(header, segments.rows, tile);
  const uint32_t first = segments.rows[segment].first_tile, end = segments.rows[segment + 1].first_tile;
  SegmentOutcome& outcome = header.segment_outcomes[segment];
  if (end - first > kTilesOfWarp || !is_last_tile(outcome.measured, end - first)) return;
  const uint32_t lane = threadIdx.x % kWarp;
  const auto sum_of = [&](const double* measures) {
    return sum_over_warp<kWide>(header.norm,
                                sum_of_lane<kWide>(header, header.norm, measures, first + lane, end, kWarp));
  };
  const Measure sum = sum_of(header.measures);
  if constexpr (kLimitsChange) {
    if (header.param_measures) {
      const Measure params = sum_of(header.param_measures);
      if (lane == 0) outcome.params = params;
    }
  }
  if (lane != 0) return;
  close_segment(header, segments, segment, sum);
  atomicExch(&outcome.measured, 0u);
}

// What was measured by another block.
__device__ __forceinline__ Measure measured(const volatile Measure& sum) { return {sum.small, sum.medium, sum.big}; }

__device__ __forceinline__ Level level_of_segment(const Header& header, uint32_t segment) {
  const volatile Level& level = header.segment_totals[segment].level;
  return {level.center, level.deviation};
}

// Decides for a segment, by the sums of all devices.
template <class K>
__device__ __noinline__ SegmentDecision decide_for_segment(const Header& header, Segments segments, uint32_t segment) {
  const SegmentRow& row = segments.rows[segment];
  const SegmentOutcome& of_all = header.segment_totals[segment];
  SegmentDecision decision =
      decide_for(header.norm, segments.limits[row.group], level_of_segment(header, segment), measured(of_all.sum));
  if constexpr (K::kLimitsChange) {
    if (header.limits_segments && row.first_tensor < (&row + 1)->first_tensor) {
      const Hyper& hyper = segments.hypers[row.hyper];
      const double of_norm = K::Rule::change(hyper.of<typename K::Rule>(), lr_of(hyper));
      limit_change(segments.changes[row.group], of_norm, total_norm(header.norm, measured(of_all.params)),
                   row.smallest_norm, decision);
    }
  }
  return decision;
}

// Returns the factor of a tile's gradients, and with kNeedsNorm their tensor's norm after it. `of_all` is the factor
// that all have in common.
template <class K>
__device__ __forceinline__ FactorsOf<K> factors_of_tile(const Header& header, Segments segments, uint32_t tile,
                                                        const Scaling& of_all) {
  FactorsOf<K> factors;
  static_cast<Scaling&>(factors) = of_all;
  if (header.segments > 0) {
    const SegmentDecision decision = decide_for_segment<K>(header, segments, segment_of(header, segments.rows, tile));
    static_cast<Scaling&>(factors) = both(of_all, decision.scaling);
    if constexpr (K::Rule::kNeedsNorm) factors.sums.norm = decision.total_norm * factors.product();
  }
  return factors;
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
template <class K>
__device__ __noinline__ void record_segments(const Header& header, Segments segments, bool remembers) {
  const Warp warp;
#pragma unroll 1
  for (uint32_t segment = blockIdx.x * kWarps + threadIdx.x / kWarp; segment < header.segments;
       segment += gridDim.x * kWarps) {
    const SegmentDecision decision = decide_for_segment<K>(header, segments, segment);
    const SegmentRow& row = segments.rows[segment];
    if (warp.is_first()) {
      SegmentOutcome& outcome = header.segment_outcomes[segment];
      record(outcome, decision);
      if constexpr (K::kLimitsChange) outcome.change = decision.change;
      if constexpr (K::kMeasuresProducts) {
        const volatile TensorOutcome& of_tensor = header.tensor_outcomes[row.first_tensor];
        if (row.first_tensor < (&row + 1)->first_tensor) outcome.coefficient *= of_tensor.factor;
      }
    }
    if (remembers && row.history) {
      push(segments.limits[row.group], row.history, level_of_segment(header, segment), decision.total_norm, false,
           warp);
    }
  }
}

}  // namespace
}  // namespace fastclip::cuda
