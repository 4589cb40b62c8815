// The CUDA kernel: measures (if there is a norm), waits for the whole grid, updates.
#pragma once

#include "decision.cuh"
#include "mixed.cuh"
#include "segments.cuh"
#include "tiles.cuh"

// The whole shared memory of a block: a Shared, then the slots.
extern __shared__ uint4 dynamic_shared_memory[];

namespace fastclip::cuda {
namespace {

struct alignas(kPackBytes) Shared {
  Measure warp_sums[kWarps];
  Decision decision;
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
template <DTypes kDTypes, bool kWide>
__device__ __forceinline__ void write_measure(const Header& header, double* measures, uint32_t tile, Measure sum) {
  sum = sum_over_warp<kWide>(header.norm, sum);
  if (threadIdx.x % kWarp != 0) return;
  measures[tile] = sum.medium;
  if constexpr (kDTypes == DTypes::any) {
    measures[header.tiles + tile] = kWide ? sum.small : 0;
    measures[2 * header.tiles + tile] = kWide ? sum.big : 0;
  }
}

// Sums over some tiles, for thread 0 of one block. The whole grid waits for it.
template <bool kWide>
__device__ __noinline__ Measure sum_over_tiles(const Header& header, const double* measures, uint32_t first,
                                               uint32_t end) {
  return sum_over_block<kWide>(header.norm, sum_of_lane<kWide>(header, measures, first + threadIdx.x, end, kThreads));
}

// Sums the segments that no warp has summed: those of many tiles, and those of none.
template <bool kWide>
__device__ __noinline__ void sum_large_segments(const Header& header, Segments segments) {
#pragma unroll 1
  for (uint32_t i = 0; i < header.segments_by_block; ++i) {
    const uint32_t segment = segments.by_block[i];
    __syncthreads();  // `warp_sums` is read
    const Measure sum = sum_over_tiles<kWide>(header, header.measures, segments.rows[segment].first_tile,
                                              segments.rows[segment + 1].first_tile);
    if (threadIdx.x == 0) close_segment(header, segments, segment, sum);
  }
}

// Lets all blocks meet. The last block to arrive adds up the measures, then lets the others go on. If nothing follows
// in this launch, no block waits.
template <class K, DTypes kDTypes>
__device__ __forceinline__ void meet_and_sum(const Header& header, Segments segments) {
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
    if (threadIdx.x == kThreads - 1) read_levels(header);  // meanwhile
    constexpr bool kWide = kDTypes == DTypes::any;  // only float64 has more than one part
    Sums sums{};
    sums.grads = sum_over_tiles<kWide>(header, header.measures, 0, header.tiles);
    if constexpr (K::kLimitsChange) {
      __syncthreads();  // `warp_sums` is read
      sums.change = sum_over_tiles<kWide>(header, header.change_measures, 0, header.tiles);
      if (header.param_measures) {
        __syncthreads();
        sums.params = sum_over_tiles<kWide>(header, header.param_measures, 0, header.tiles);
      }
    }
    if (header.segments_by_block > 0) sum_large_segments<kWide>(header, segments);
    if (threadIdx.x == 0) {
      header.outcome->sums = sums;
      atomicExch(&header.outcome->arrived, 0u);
      __threadfence();
      outcome.opened = opened + 1;
    }
  } else if (header.update && threadIdx.x == 0) {
    while (outcome.opened == opened) __nanosleep(64);
    __threadfence();
  }
}

// Decides by the norm, and returns the decision to all threads of the block.
__device__ __forceinline__ const Decision& decide_for_block(const Header& header) {
  if (threadIdx.x == 0) decide_from_sums(header, shared().decision);
  __syncthreads();
  const bool remembers = header.clip_history || header.skip_history;
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
__device__ __forceinline__ void count_steps(const Arguments<kTableBytes>& arguments, Segments segments) {
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
    for (uint32_t i = threadIdx.x; i < header.tensors; i += kThreads) {
      const auto& entry = table.entries[i];
      if (!entry.first_of_tensor) continue;
      const double norm = norm_of_tensor<typename K::Rule>(header, segments, entry);
      advance<typename K::Rule>(entry, table.hypers[entry.hyper], {norm});
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
          bool mixed = false;
          if constexpr (kMixed<K, kDTypes>) mixed = kDTypes == DTypes::mixed || !entry.uniform;
          with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
            using Stored = decltype(stored);
            constexpr int kFull = kPackBytes / sizeof(Stored);
            const auto measure = [&](auto full) {
              write_measure<kDTypes, sizeof(Stored) == sizeof(double)>(
                  header, header.param_measures, tile,
                  measure_params<Stored, decltype(full)::value>(header, entry, begin, size));
            };
            if constexpr (kMixed<K, kDTypes> && sizeof(Stored) < sizeof(double)) {
              if (mixed) return measure(std::integral_constant<int, kElements>{});
            }
            measure(std::integral_constant<int, kFull>{});
          });
        });
  }
}

// Returns the smallest number of blocks on a multiprocessor. It caps the registers, so that enough loads are in flight.
constexpr int min_blocks(DTypes dtypes) { return dtypes == DTypes::any ? 1 : 2; }

// Measures and updates in one launch, if all blocks run at the same time. If not, one launch measures and the next
// updates.
template <class K, DTypes kDTypes, int kTableBytes>
__global__ void __launch_bounds__(kThreads, min_blocks(kDTypes))
    step_kernel(const __grid_constant__ Arguments<kTableBytes> arguments) {
  const Header& header = arguments.header;
  if (header.found_inf && *header.found_inf != 0) {
    // The next step takes all parameters for measured.
    if (header.measure && header.has_unmeasured_params) measure_all_params<K, kDTypes>(arguments);
    if (blockIdx.x == 0 && threadIdx.x == 0) record_skipped(header);
    return;
  }
  const bool keep = header.measure && header.update;
  const Segments segments = segments_of(header, table_of<K, kDTypes>(arguments));
  if (header.measure) {
    if (header.has_unmeasured_params) measure_all_params<K, kDTypes>(arguments);
    for_each_tile<K, kDTypes>(
        arguments, false, keep,
        [&](uint32_t tile, const Hyper& hyper, const auto& entry, int64_t begin, int size, uint4* slot) {
          with_dtype<kDTypes>(grad_dtype_of(entry), [&](auto stored) {
            using Stored = decltype(stored);
            constexpr bool kFloat64 = sizeof(Stored) == sizeof(double);
            Measure sum{};
            if (K::kLimitsChange && !entry.grad) {
              // Nothing is added.
            } else if (header.norm == Norm::inf) {
              sum = measure_tile<Norm::inf, Stored>(header, hyper, entry, begin, size, slot);
            } else {
              sum = measure_tile<Norm::two, Stored>(header, hyper, entry, begin, size, slot);
            }
            write_measure<kDTypes, kFloat64>(header, header.measures, tile, sum);
            if constexpr (K::kLimitsChange) {
              const double change = K::Rule::change(hyper.of<typename K::Rule>(), lr_of(hyper));
              write_measure<kDTypes, kFloat64>(header, header.change_measures, tile,
                                               multiplied(header.norm, sum, change));
            }
          });
          if (header.segments > 0) note_tile<kDTypes == DTypes::any>(header, segments, tile);
        });
    meet_and_sum<K, kDTypes>(header, segments);
  }
  if (!header.update) return;
  Scaling scaling;
  if (header.sums) {
    const Decision& decision = decide_for_block(header);
    if (header.segments > 0) record_segments(header, segments, remembers_segments(decision));
    if (decision.skip) return;
    scaling = decision.scaling;
    if (K::Rule::kClipsInPlace && scaling.coefficient == 1.0) return;
  }
  uint32_t clamped = 0;
  for_each_tile<K, kDTypes>(
      arguments, keep, keep,
      [&](uint32_t tile, const Hyper& hyper, const Entry<K, kDTypes>& entry, int64_t begin, int size,
          const uint4* slot) {
        if (K::kLimitsChange && !entry.grad) return;
        const auto of_tile = scaling_of_tile<typename K::Rule>(header, segments, tile, scaling);
        const auto note = [&](auto stored, const Updated<K::kLimitsChange>& updated) {
          clamped += updated.clamped;
          if constexpr (K::kLimitsChange) {
            constexpr bool kFloat64 = sizeof(stored) == sizeof(double);
            if (header.param_measures) {
              write_measure<kDTypes, kFloat64>(header, header.param_measures, tile, updated.params);
            }
          }
        };
        if constexpr (kMixed<K, kDTypes>) {
          if (kDTypes == DTypes::mixed || !entry.uniform) {
            note(float{}, update_mixed_tile<K>(header, hyper, entry, begin, size, of_tile, slot));
            return;
          }
        }
        if constexpr (kDTypes != DTypes::mixed) {
          with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
            note(stored, update_tile<K, decltype(stored)>(header, hyper, entry, begin, size, of_tile, slot));
          });
        }
      });
  if (!K::Rule::kClipsInPlace && header.clamped) publish_clamped(header.clamped, clamped);
  count_steps<K, kDTypes>(arguments, segments);
}

}  // namespace
}  // namespace fastclip::cuda
