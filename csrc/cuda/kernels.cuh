// The CUDA kernel: measures (if there is a norm), waits for the whole grid, updates.
#pragma once

#include "codes.cuh"
#include "decision.cuh"
#include "mixed.cuh"
#include "segments.cuh"
#include "tensors.cuh"
#include "tiles.cuh"

// The whole shared memory of a block: a Shared, then the slots.
extern __shared__ uint4 dynamic_shared_memory[];

namespace fastclip::cuda {
namespace {

struct alignas(kPackBytes) Shared {
  Measure warp_sums[kWarps];
  Decision decision;
  double factor;
  bool last;
};

__device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(dynamic_shared_memory); }

// Deals tiles out to the warps of all blocks, round after round. `backwards` goes from the last round to the first: the
// next pass still finds in L2 the tiles that this pass read last. The tiles of the first rounds have slots, the same
// slots in both directions. Calls body(tile, hyper, entry, first element, size, slot).
template <class K, DTypes kDTypes, int kTableBytes, class Body>
__device__ __forceinline__ void for_each_tile(const Arguments<kTableBytes>& arguments, bool backwards, bool slots,
                                              const Body& body) {
  const Header& header = arguments.header;
  const auto table = table_of<K, kDTypes>(arguments);
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t first = warp * gridDim.x + blockIdx.x;  // every block gets a tile before any gets a second
  const uint32_t workers = gridDim.x * kWarps;
  const uint32_t rounds = first < header.tiles ? (header.tiles - first - 1) / workers + 1 : 0;
  for (uint32_t i = 0; i < rounds; ++i) {
    const uint32_t round = backwards ? rounds - 1 - i : i;
    const uint32_t tile = first + round * workers;
    const auto& entry = entry_of(table.entries, header.tensors, tile);
    const int64_t begin = static_cast<int64_t>(tile - entry.first_tile) * header.tile;
    const int64_t rest = entry.numel - begin;
    const uint32_t slot = round * kWarps + warp;
    uint4* kept = nullptr;
    if (slots && slot < header.slots) {
      kept = dynamic_shared_memory + (sizeof(Shared) + size_t{slot} * header.slot_bytes) / sizeof(uint4);
    }
    body(tile, table.hypers[entry.hyper], entry, begin, static_cast<int>(rest < header.tile ? rest : header.tile),
         kept);
  }
}

// Sums over the threads of a block, for thread 0.
template <bool kWide>
__device__ __forceinline__ Measure sum_over_block(Norm norm, Measure sum) {
  sum = sum_over_warp<kWide>(norm, sum);
  if (threadIdx.x % kWarp == 0) shared().warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) combine(norm, sum, shared().warp_sums[warp]);
  }
  return sum;
}

// Sums a warp's share of a tile, and writes it to the tile's place among `measures`.
template <DTypes kDTypes, bool kFloat64>
__device__ __forceinline__ void write_measure(const Header& header, Norm norm, double* measures, uint32_t tile,
                                              Measure sum) {
  sum = sum_over_warp<kFloat64>(norm, sum);
  if (threadIdx.x % kWarp != 0) return;
  measures[tile] = sum.medium;
  if constexpr (kWide<kDTypes>) {
    measures[header.tiles + tile] = kFloat64 ? sum.small : 0;
    measures[2 * header.tiles + tile] = kFloat64 ? sum.big : 0;
  }
}

// Sums over some tiles, for thread 0 of one block. The whole grid waits for it.
template <bool kWide>
__device__ __noinline__ Measure sum_over_tiles(const Header& header, Norm norm, const double* measures, uint32_t first,
                                               uint32_t end) {
  return sum_over_block<kWide>(norm, sum_of_lane<kWide>(header, norm, measures, first + threadIdx.x, end, kThreads));
}

// Sums the segments that no warp has summed: those of many tiles, and those of none.
template <bool kWide, bool kLimitsChange>
__device__ __noinline__ void sum_large_segments(const Header& header, Segments segments) {
#pragma unroll 1
  for (uint32_t i = 0; i < header.segments_by_block; ++i) {
    const uint32_t segment = segments.by_block[i];
    const auto sum_of = [&](const double* measures) {
      __syncthreads();  // `warp_sums` is read
      return sum_over_tiles<kWide>(header, header.norm, measures, segments.rows[segment].first_tile,
                                   segments.rows[segment + 1].first_tile);
    };
    const Measure sum = sum_of(header.measures);
    if (threadIdx.x == 0) close_segment(header, segments, segment, sum);
    if constexpr (kLimitsChange) {
      if (!header.param_measures) continue;
      const Measure params = sum_of(header.param_measures);
      if (threadIdx.x == 0) header.segment_outcomes[segment].params = params;
    }
  }
}

// The same for tensors.
template <class K, DTypes kDTypes>
__device__ __noinline__ void sum_large_tensors(const Header& header, Table<K, kDTypes> table, Segments segments,
                                               Tensors tensors) {
#pragma unroll 1
  for (uint32_t i = 0; i < header.tensors_by_block; ++i) {
    const uint32_t tensor = tensors.by_block[i];
    const TensorRow& row = tensors.rows[tensor];
    TensorOutcome& outcome = header.tensor_outcomes[tensor];
#pragma unroll 1
    for (int j = 0; j < K::kSums; ++j) {
      __syncthreads();  // `warp_sums` is read
      const Measure sum = sum_over_tiles<kWide<kDTypes>>(header, Norm::two, measures_of_sum(header, j), row.first_tile,
                                                         (&row + 1)->first_tile);
      if (threadIdx.x == 0) outcome.sums[j] = sum;
    }
    if (threadIdx.x == 0) close_tensor(header, table, segments, row, outcome);
  }
}

// Applies the limits on what is added to all tensors, or to a segment of several, in one block.
__device__ __noinline__ void limit_deltas_of_segments(const Header& header, Segments segments) {
  const bool of_all = header.segments == 0;
  if (!of_all && !header.limits_segments) return;
#pragma unroll 1
  for (uint32_t segment = 0; segment < (of_all ? 1 : header.segments); ++segment) {
    const SegmentRow& row = segments.rows[segment];
    const ChangeLimits& limits = of_all ? header.limits.on_delta : segments.changes[row.group];
    const uint32_t first = of_all ? 0 : row.first_tensor, end = of_all ? header.tensor_rows : (&row + 1)->first_tensor;
    if (header.segments_are_tensors && first < end) continue;  // its warp has done it
    double change = 0;
    if (limits.measures_change) {
      Measure delta{}, params{};
#pragma unroll 1
      for (uint32_t tensor = first + threadIdx.x; tensor < end; tensor += kThreads) {
        const volatile TensorOutcome& outcome = header.tensor_outcomes[tensor];
        combine(Norm::two, delta, multiplied(Norm::two, measured(outcome.sums[0]), outcome.factor));
        combine(Norm::two, params, measured(outcome.sums[2]));
      }
      __syncthreads();  // `warp_sums` is read
      delta = sum_over_block<true>(Norm::two, delta);
      __syncthreads();
      params = sum_over_block<true>(Norm::two, params);
      if (threadIdx.x == 0) {
        const double smallest = of_all ? header.limits.smallest_norm : row.smallest_norm;
        shared().factor = limit_deltas(limits, delta, params, smallest, change);
      }
      __syncthreads();
#pragma unroll 1
      for (uint32_t tensor = first + threadIdx.x; tensor < end; tensor += kThreads) {
        volatile double& factor = header.tensor_outcomes[tensor].factor;
        factor = factor * shared().factor;
      }
    }
    if (threadIdx.x == 0) (of_all ? header.outcome->change : header.segment_outcomes[segment].change) = change;
  }
  __syncthreads();  // all factors are written
}

// What is left to one block when all tiles have been measured for what an update would add.
template <class K, DTypes kDTypes>
__device__ __forceinline__ void finish_deltas(const Header& header, Table<K, kDTypes> table, Segments segments,
                                              Tensors tensors) {
  sum_large_tensors(header, table, segments, tensors);
  __syncthreads();  // all is summed
  limit_deltas_of_segments(header, segments);
}

// Applies the clip that a rule has of its own to each group, in one block; by the norms after all other clips.
template <class K, DTypes kDTypes>
__device__ __noinline__ void clip_groups(const Header& header, Table<K, kDTypes> table, Segments segments,
                                         Tensors tensors) {
  using R = typename K::Rule;
  __syncthreads();  // all is summed
  if (threadIdx.x == 0) decide_from_sums(header, shared().decision);
  __syncthreads();
  const bool skip = shared().decision.skip;
  __syncthreads();  // thread 0 decides once more
  if (skip) return;
#pragma unroll 1
  for (uint32_t group = 0; group < header.groups; ++group) {
    const GroupRow& clipped = tensors.groups[group];
    if (!clipped.norms || clipped.first_tensor == clipped.end_tensor) continue;
    double square = 0;
#pragma unroll 1
    for (uint32_t i = clipped.first_tensor + threadIdx.x; i < clipped.end_tensor; i += kThreads) {
      const TensorRow& row = tensors.rows[i];
      const auto& entry = table.entries[row.first_entry];
      const SegmentDecision own = decide_for_segment<K>(header, segments, row.segment);
      const auto& settings = table.hypers[entry.hyper].template of<R>();
      const double norm = own.total_norm * both(shared().decision.scaling, own.scaling).product() *
                          R::weight(settings, numel_of(table, row), progress_of(entry).scalar);
      square += norm * norm;
    }
    __syncthreads();  // `warp_sums` and `factor` are read
    square = sum_over_block<false>(Norm::two, {0, square, 0}).medium;
    if (threadIdx.x == 0) {
      const auto& entry = table.entries[tensors.rows[clipped.first_tensor].first_entry];
      const WeightedClip clip = R::clip(table.hypers[entry.hyper].template of<R>());
      shared().factor =
          coefficient_of_step(clip, clipped.norms, static_cast<int64_t>(progress_of(entry).step) - 1, sqrt(square));
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = clipped.first_tensor + threadIdx.x; i < clipped.end_tensor; i += kThreads) {
      header.tensor_outcomes[i].factor = shared().factor;
    }
  }
  __syncthreads();  // all factors are written
}

// Lets all blocks meet. The last block to arrive does what is to be done by one, then lets the others go on. If nothing
// follows in this launch, no block waits.
template <class Body>
__device__ __forceinline__ void meet(const Header& header, bool goes_on, const Body& last) {
  volatile Outcome& outcome = *header.outcome;
  uint32_t opened = 0;
  __syncthreads();  // the block's tiles are measured
  if (threadIdx.x == 0) {
    opened = outcome.opened;
    __threadfence();
    shared().last = atomicAdd(&header.outcome->arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (shared().last) {
    __threadfence();
    last();
    if (threadIdx.x == 0) {
      atomicExch(&header.outcome->arrived, 0u);
      __threadfence();
      outcome.opened = opened + 1;
    }
  } else if (goes_on && threadIdx.x == 0) {
    while (outcome.opened == opened) __nanosleep(64);
    __threadfence();
  }
}

// Lets all blocks meet that have measured gradients, and one add up the measures.
template <class K, DTypes kDTypes>
__device__ __forceinline__ void meet_and_sum(const Header& header, Table<K, kDTypes> table, Segments segments,
                                             Tensors tensors) {
  meet(header, header.update, [&] {
    if (threadIdx.x == kThreads - 1) read_levels(header);  // meanwhile
    Sums sums{};
    sums.grads = sum_over_tiles<kWide<kDTypes>>(header, header.norm, header.measures, 0, header.tiles);
    if constexpr (K::kLimitsChange) {
      if (header.change_measures) {
        __syncthreads();  // `warp_sums` is read
        sums.change = sum_over_tiles<kWide<kDTypes>>(header, header.norm, header.change_measures, 0, header.tiles);
      }
      if (header.param_measures) {
        __syncthreads();
        sums.params = sum_over_tiles<kWide<kDTypes>>(header, header.norm, header.param_measures, 0, header.tiles);
      }
    }
    if (header.segments_by_block > 0) sum_large_segments<kWide<kDTypes>, K::kLimitsChange>(header, segments);
    if (threadIdx.x == 0) header.outcome->sums = sums;
    if constexpr (K::kMeasuresProducts) {
      sum_large_tensors(header, table, segments, tensors);
      clip_groups(header, table, segments, tensors);
    }
    if constexpr (K::kMeasuresDelta) {
      if (header.deltas_at_once) finish_deltas(header, table, segments, tensors);
    }
  });
}

// Decides by the norm, and returns the decision to all threads of the block.
template <class K>
__device__ __forceinline__ const Decision& decide_for_block(const Header& header) {
  if (threadIdx.x == 0) {
    Decision& decision = shared().decision;
    decide_from_sums(header, decision);
    if (K::kMeasuresDelta && header.tensor_outcomes) {  // what was measured beside the norm, or what will be
      const volatile double& change = header.outcome->change;
      decision.change = decision.skip ? 0 : change;
    }
    if (header.update && blockIdx.x == 0) record(*header.outcome, decision, header.counts_skips);
  }
  __syncthreads();
  const bool remembers = header.update && (header.clip_history || header.skip_history);
  if (remembers && blockIdx.x == 0 && threadIdx.x < kWarp) push_norm(header, shared().decision.total_norm);
  return shared().decision;
}

// Writes the block's own count. Together, the blocks zero the unused counts. The host adds them up on request.
__device__ __forceinline__ void publish_clamped(double* counts, uint32_t clamped) {
  const double sum = sum_over_block<false>(Norm::two, {0, static_cast<double>(clamped), 0}).medium;
  for (uint32_t i = threadIdx.x * gridDim.x + blockIdx.x; i < kMaxBlocks; i += kThreads * gridDim.x) {
    counts[i] = i == blockIdx.x ? sum : 0;
  }
}

// Counts the step of every tensor, in the last block to finish: until then, other blocks may still read the counts.
template <class K, DTypes kDTypes, int kTableBytes>
__device__ __forceinline__ void count_steps(const Arguments<kTableBytes>& arguments, Segments segments,
                                            Tensors tensors) {
  if constexpr (kCounts<K, kDTypes>) {
    const Header& header = arguments.header;
    if (!header.has_step_counts) return;
    __syncthreads();  // the block's tiles are updated
    if (threadIdx.x == 0) {
      __threadfence();
      shared().last = atomicAdd(&header.outcome->finished, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!shared().last) return;
    const auto table = table_of<K, kDTypes>(arguments);
    using R = typename K::Rule;
    if constexpr (K::kMeasuresProducts) {
      for (uint32_t tensor = threadIdx.x; tensor < header.tensor_rows; tensor += kThreads) {
        const TensorRow& row = tensors.rows[tensor];
        const auto& entry = table.entries[row.first_entry];
        Factors factors;
        static_cast<Scaling&>(factors) =
            both(shared().decision.scaling, decide_for_segment<K>(header, segments, row.segment).scaling);
        add_tensor<K>(header, table, tensors, tensor, factors);
        advance<R>(entry, table.hypers[entry.hyper], factors.sums, factors.numel);
      }
    } else {
      for (uint32_t i = threadIdx.x; i < header.tensors; i += kThreads) {
        const auto& entry = table.entries[i];
        if (!entry.first_of_tensor) continue;
        advance<R>(entry, table.hypers[entry.hyper], {norm_of_tensor<R>(header, segments, entry)}, 0);
      }
    }
    if (threadIdx.x == 0) atomicExch(&header.outcome->finished, 0u);
  }
}

// Measures the parameters that somebody else has written to, or that no step has measured yet.
template <class K, DTypes kDTypes, int kTableBytes>
__device__ __noinline__ void measure_all_params(const Arguments<kTableBytes>& arguments) {
  if constexpr (K::kLimitsChange) {
    const Header& header = arguments.header;
    for_each_tile<K, kDTypes>(
        arguments, false, false,
        [&](uint32_t tile, const Hyper&, const Entry<K, kDTypes>& entry, int64_t begin, int size, const uint4*) {
          if (entry.param_is_measured) return;
          with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
            using Stored = decltype(stored);
            constexpr bool kAsMixture = kMixed<K, kDTypes> && sizeof(Stored) < sizeof(double);
            constexpr int kTaken = kAsMixture ? kElements : kPackBytes / int{sizeof(Stored)};
            write_measure<kDTypes, sizeof(Stored) == sizeof(double)>(
                header, header.norm, header.param_measures, tile,
                measure_params<Stored, kTaken>(header, entry, begin, size));
          });
        });
  }
}

// Calls note(whether it is float64, the measure of this lane) for the gradients of a tile.
template <class K, DTypes kDTypes, class Note>
__device__ __forceinline__ void measure_any_tile(const Header& header, const Hyper& hyper,
                                                 const Entry<K, kDTypes>& entry, int64_t begin, int size, uint4* slot,
                                                 const Note& note) {
  const bool has_none = K::kHasUnstepped && !entry.grad;
  const DType dtype = grad_dtype_of(entry);
  const auto measured_as = [&](auto stored) {
    using Stored = decltype(stored);
    if (has_none) return Measure{};
    return header.norm == Norm::inf ? measure_tile<Norm::inf, Stored>(header, hyper, entry, begin, size, slot)
                                    : measure_tile<Norm::two, Stored>(header, hyper, entry, begin, size, slot);
  };
  if constexpr (kDTypes == DTypes::float32 || kDTypes == DTypes::bfloat16) {
    with_dtype<kDTypes>(dtype, [&](auto stored) { note(std::false_type{}, measured_as(stored)); });
    return;
  }
  if constexpr (kDTypes == DTypes::any) {
    if (dtype == DType::float64) return note(std::true_type{}, measured_as(double{}));
  }
  Measure sum{};
  if (!has_none) {
    sum = header.norm == Norm::inf ? measure_mixed_tile<Norm::inf>(header, hyper, entry, dtype, begin, size, slot)
                                   : measure_mixed_tile<Norm::two>(header, hyper, entry, dtype, begin, size, slot);
  }
  note(std::false_type{}, sum);
}

// Calls note(value of the stored type, what the update tells) for the update of a tile, or for what it would add.
template <class K, DTypes kDTypes, class Note>
__device__ __forceinline__ void update_any_tile(const Header& header, const Hyper& hyper,
                                                const Entry<K, kDTypes>& entry, int64_t begin, int size,
                                                const FactorsOf<K>& factors, const uint4* slot, const Note& note) {
  const auto update_mixed = [&](auto computed) {  // not all kernels have it
    note(computed, update_mixed_tile<K>(header, hyper, entry, begin, size, factors, slot));
  };
  if constexpr (kTakesCodes<K, kDTypes>) {
    if (entry.scales[0]) {
      return note(float{}, update_codes_tile<K>(header, hyper, entry, begin, size, factors, slot));
    }
  }
  if constexpr (kDTypes == DTypes::mixed) {
    update_mixed(float{});
  } else if constexpr (kMixed<K, kDTypes>) {
    if (entry.dtype != DType::float64) return update_mixed(float{});
    note(double{}, update_tile<K, double>(header, hyper, entry, begin, size, factors, slot));
  } else {
    with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
      note(stored, update_tile<K, decltype(stored)>(header, hyper, entry, begin, size, factors, slot));
    });
  }
}

// Measures what the update of a tile would add.
template <class K, DTypes kDTypes>
__device__ __forceinline__ void measure_delta_of_tile(const Header& header, Table<K, kDTypes> table, Segments segments,
                                                      Tensors tensors, uint32_t tile, const Hyper& hyper,
                                                      const Entry<K, kDTypes>& entry, int64_t begin, int size,
                                                      Factors factors, const uint4* slot) {
  const uint32_t tensor = tensor_of(header, tensors.rows, tile);
  factors.measures = delta_parts<typename K::Rule>(header, segments, tensors.rows[tensor], hyper, entry.grad);
  // Sums are written where they are returned: carried on to one place, those of float64 would be in local memory.
  const auto write = [&](const auto& updated) {
    const Measure measures[] = {updated.delta, updated.relative, updated.param};
#pragma unroll
    for (int i = 0; i < K::kSums; ++i) {
      write_measure<kDTypes, kWide<kDTypes>>(header, Norm::two, measures_of_sum(header, i), tile, measures[i]);
    }
  };
  if (factors.measures) {
    update_any_tile<K, kDTypes>(header, hyper, entry, begin, size, factors, slot,
                                [&](auto, const auto& updated) { write(updated); });
  } else {
    write(Updated<K::kBeside, false>{});
  }
  note_tile_of_tensor<K>(header, table, segments, tensors, tensor);
}

// Returns the smallest number of blocks on a multiprocessor. It caps the registers, so that enough loads are in flight.
// float64 needs more than half of them. So does a kernel that measures what an update would add: one function does
// both.
template <class K, DTypes kDTypes>
constexpr int min_blocks() {
  return kDTypes == DTypes::any || K::kMeasuresDelta ? 1 : 2;
}

// Measures and updates in one launch, if all blocks run at the same time. If not, one launch measures and the next
// updates; between them, another one may measure what is added.
template <class K, DTypes kDTypes, int kTableBytes>
__global__ void __launch_bounds__(kThreads, min_blocks<K, kDTypes>())
    step_kernel(const __grid_constant__ Arguments<kTableBytes> arguments) {
  const Header& header = arguments.header;
  if (header.found_inf && *header.found_inf != 0) {
    // The next step takes all parameters for measured.
    if (header.measure && header.has_unmeasured_params) measure_all_params<K, kDTypes>(arguments);
    if (blockIdx.x == 0 && threadIdx.x == 0) record_skipped(header);
    return;
  }
  const bool keep = header.measure && header.update;
  const auto table = table_of<K, kDTypes>(arguments);
  const Segments segments = segments_of(header, table);
  Tensors tensors{};
  if constexpr (K::kMeasuresTensors) tensors = tensors_of<K>(arguments);
  if (header.measure) {
    if (header.has_unmeasured_params) measure_all_params<K, kDTypes>(arguments);
    for_each_tile<K, kDTypes>(
        arguments, false, keep,
        [&](uint32_t tile, const Hyper& hyper, const auto& entry, int64_t begin, int size, uint4* slot) {
          measure_any_tile<K, kDTypes>(
              header, hyper, entry, begin, size, slot, [&](auto is_float64, const Measure& sum) {
                constexpr bool kFloat64 = decltype(is_float64)::value;
                write_measure<kDTypes, kFloat64>(header, header.norm, header.measures, tile, sum);
                if constexpr (K::kLimitsChange) {
                  if (!header.change_measures) return;
                  // Without a gradient, a learning rate that is a tensor may be on another device.
                  const double change = entry.grad ? K::Rule::change(hyper.of<typename K::Rule>(), lr_of(hyper)) : 0;
                  write_measure<kDTypes, kFloat64>(header, header.norm, header.change_measures, tile,
                                                   multiplied(header.norm, sum, change));
                }
              });
          if (header.segments > 0) note_tile<kWide<kDTypes>, K::kLimitsChange>(header, segments, tile);
          if constexpr (K::kMeasuresTensors) __syncwarp();  // the slot is filled
          if constexpr (K::kMeasuresProducts) {
            const Products products = measure_products(header, hyper, entry, begin, size, slot);
            const double sums[] = {products.with_grad, products.squared};
#pragma unroll
            for (int i = 0; i < K::kSums; ++i) {
              write_measure<kDTypes, false>(header, Norm::two, measures_of_sum(header, i), tile, {0, sums[i], 0});
            }
            note_tile_of_tensor<K>(header, table, segments, tensors, tensor_of(header, tensors.rows, tile));
          }
          if constexpr (K::kMeasuresDelta) {
            if (header.deltas_at_once) {
              measure_delta_of_tile<K>(header, table, segments, tensors, tile, hyper, entry, begin, size, {}, slot);
            }
          }
        });
    meet_and_sum<K>(header, table, segments, tensors);
  }
  if (!header.update && !(K::kMeasuresDelta && header.measures_deltas)) return;
  Scaling scaling;
  if (header.sums) {
    const Decision& decision = decide_for_block<K>(header);
    if (header.update && header.segments > 0) record_segments<K>(header, segments, remembers_segments(decision));
    if (decision.skip) return;
    scaling = decision.scaling;
    if (K::Rule::kClipsInPlace && scaling.coefficient == 1.0) return;
  }
  if constexpr (K::kMeasuresDelta) {
    if (header.measures_deltas) {
      for_each_tile<K, kDTypes>(arguments, keep, keep,
                                [&](uint32_t tile, const Hyper& hyper, const Entry<K, kDTypes>& entry, int64_t begin,
                                    int size, const uint4* slot) {
                                  measure_delta_of_tile<K>(header, table, segments, tensors, tile, hyper, entry, begin,
                                                           size, factors_of_tile<K>(header, segments, tile, scaling),
                                                           slot);
                                });
      meet(header, header.update, [&] { finish_deltas(header, table, segments, tensors); });
      __syncthreads();  // the others wait for thread 0
      if (!header.update) return;
    }
  }
  uint32_t clamped = 0;
  for_each_tile<K, kDTypes>(
      arguments, keep && !(K::kMeasuresDelta && header.measures_deltas), keep,
      [&](uint32_t tile, const Hyper& hyper, const Entry<K, kDTypes>& entry, int64_t begin, int size,
          const uint4* slot) {
        if (K::kHasUnstepped && !entry.grad) return;
        auto factors = factors_of_tile<K>(header, segments, tile, scaling);
        if constexpr (K::kMeasuresTensors) {
          if (header.tensor_outcomes) {
            add_tensor(header, table, tensors, tensor_of(header, tensors.rows, tile), factors);
          }
        }
        update_any_tile<K, kDTypes>(
            header, hyper, entry, begin, size, factors, slot, [&](auto stored, const auto& updated) {
              clamped += updated.clamped;
              if constexpr (K::kLimitsChange) {
                constexpr bool kFloat64 = sizeof(stored) == sizeof(double);
                if (header.param_measures) {
                  write_measure<kDTypes, kFloat64>(header, header.norm, header.param_measures, tile, updated.params);
                }
              }
            });
      });
  if (!K::Rule::kClipsInPlace && header.clamped) publish_clamped(header.clamped, clamped);
  count_steps<K, kDTypes>(arguments, segments, tensors);
}

}  // namespace
}  // namespace fastclip::cuda
