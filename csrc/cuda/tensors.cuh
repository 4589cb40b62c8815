// What is measured of each tensor besides the norm of its gradient, on a GPU, and what follows: factors of learning
// rates, and the clip that a rule has of its own. Summed as segments are, see segments.cuh.
#pragma once

#include "segments.cuh"

namespace fastclip::cuda {
namespace {

// Where a kernel finds what the table says of the tensors.
struct Tensors {
  const TensorRow* rows;
  const GroupRow* groups;  // with products
  const uint32_t* by_block;  // the tensors that a block sums
};

template <class K, int kTableBytes>
__device__ __forceinline__ Tensors tensors_of(const Arguments<kTableBytes>& arguments) {
  const Header& header = arguments.header;
  const unsigned char* bytes = header.table ? header.table : arguments.table;
  const auto* const rows = reinterpret_cast<const TensorRow*>(bytes + header.tensors_at);
  const auto* const groups = reinterpret_cast<const GroupRow*>(rows + header.tensor_rows + 1);
  const uint32_t of_groups = K::kMeasuresProducts ? header.groups : 0;
  return {rows, groups, reinterpret_cast<const uint32_t*>(groups + of_groups)};
}

__device__ __noinline__ uint32_t tensor_of(const Header& header, const TensorRow* rows, uint32_t tile) {
  return static_cast<uint32_t>(&entry_of(rows, header.tensor_rows, tile) - rows);
}

// A tensor has one entry, or two.
template <class K, DTypes kDTypes>
__device__ __forceinline__ double numel_of(Table<K, kDTypes> table, const TensorRow& row) {
  int64_t numel = 0;
  for (uint32_t i = row.first_entry; i < (&row + 1)->first_entry; ++i) numel += table.entries[i].numel;
  return static_cast<double>(numel);
}

// The parts of DeltaSums that a tensor needs: those of its rule, and those of the limits on a change. Without a
// gradient, it counts in the norm of the parameters alone.
template <class R>
__device__ __forceinline__ DeltaParts delta_parts(const Header& header, Segments segments, const TensorRow& row,
                                                  const Hyper& hyper, bool has_grad) {
  const ChangeLimits& limits =
      header.limits_segments ? segments.changes[segments.rows[row.segment].group] : header.limits.on_delta;
  const DeltaParts parts = R::measured(hyper, hyper.of<R>()) | parts_of(limits);
  return has_grad ? parts : parts & kParam;
}

// Writes the factor of a tensor's learning rate that follows from its sums. A limit on the change of a segment that is
// this tensor is applied here; others wait for all of their tensors.
template <class K, DTypes kDTypes>
__device__ __noinline__ void close_tensor(const Header& header, Table<K, kDTypes> table, Segments segments,
                                          const TensorRow& row, TensorOutcome& outcome) {
  outcome.factor = 1;
  if constexpr (K::kMeasuresDelta) {
    using R = typename K::Rule;
    const auto& entry = table.entries[row.first_entry];
    const DeltaSums deltas{outcome.sums[0], outcome.sums[1], outcome.sums[2]};
    if (entry.grad) {
      SharedHyper hyper = table.hypers[entry.hyper];
      hyper.lr = lr_of(table.hypers[entry.hyper]);
      const auto& settings = table.hypers[entry.hyper].template of<R>();
      outcome.factor = R::lr_factor(hyper, settings, numel_of(table, row), norms_of(deltas));
    }
    if (!header.limits_segments || !header.segments_are_tensors) return;
    const SegmentRow& segment = segments.rows[row.segment];
    const ChangeLimits& limits = segments.changes[segment.group];
    double change = 0;
    if (limits.measures_change) {
      const Measure scaled = multiplied(Norm::two, deltas.delta, outcome.factor);
      outcome.factor *= limit_deltas(limits, scaled, deltas.param, segment.smallest_norm, change);
    }
    header.segment_outcomes[row.segment].change = change;
  }
}

__device__ __forceinline__ double* measures_of_sum(const Header& header, int sum) {
  return header.tensor_measures + size_t{header.tiles} * kParts * sum;
}

// A warp has measured a tile. If it is the last of its tensor, the warp adds up all of them, in their order.
template <class K, DTypes kDTypes>
__device__ __noinline__ void note_tile_of_tensor(const Header& header, Table<K, kDTypes> table, Segments segments,
                                                 Tensors tensors, uint32_t tensor) {
  const TensorRow& row = tensors.rows[tensor];
  const uint32_t first = row.first_tile, end = (&row + 1)->first_tile;
  TensorOutcome& outcome = header.tensor_outcomes[tensor];
  if (end - first > kTilesOfWarp || !is_last_tile(outcome.measured, end - first)) return;
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = 0; i < K::kSums; ++i) {
    const Measure sum = sum_over_warp<kWide<kDTypes>>(
        Norm::two,
        sum_of_lane<kWide<kDTypes>>(header, Norm::two, measures_of_sum(header, i), first + lane, end, kWarp));
    if (lane == 0) outcome.sums[i] = sum;
  }
  if (lane != 0) return;
  close_tensor(header, table, segments, row, outcome);
  atomicExch(&outcome.measured, 0u);
}

// What was measured of a tensor's products, after all clips; and the factor of a tile of it.
template <class K, DTypes kDTypes>
__device__ __forceinline__ void add_tensor(const Header& header, Table<K, kDTypes> table, Tensors tensors,
                                           uint32_t tensor, Factors& factors) {
  const volatile TensorOutcome& outcome = header.tensor_outcomes[tensor];
  if constexpr (K::kMeasuresDelta) {
    factors.lr_factor = outcome.factor;
  } else {
    const double own = outcome.factor;
    factors.coefficient *= own;
    factors.sums.norm *= own;
    factors.sums.param_times_grad = outcome.sums[0].medium * factors.product();
    factors.sums.param_squared = outcome.sums[1].medium;
    factors.numel = numel_of(table, tensors.rows[tensor]);
  }
}

}  // namespace
}  // namespace fastclip::cuda
