// The clip of ScaledAdam (icefall): the norm of a group's gradients, each tensor's times a weight, is limited to a
// multiple of the median of past ones. The only copy, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace fastclip {

struct WeightedClip {
  double scale = 0;    // of the median; 0 without a clip
  int32_t period = 1;  // the number of steps after which the limit follows the norms again

  FASTCLIP_HD bool is_set() const { return scale > 0; }
};

// What it remembers, in the optimizer's state. The norms of the last `period` steps follow.
struct ModelNorms {
  double threshold;    // 0 before there is one
  double clipped;      // number of steps since then that were scaled down
  double was_clipped;  // the same in the time before, of `were` steps
  double were;
};
constexpr int64_t kDoublesOfModelNorms = sizeof(ModelNorms) / sizeof(double);

inline int64_t doubles_of_norms(const WeightedClip& clip) { return kDoublesOfModelNorms + clip.period; }

FASTCLIP_HD double* norms_of(ModelNorms* memory) { return reinterpret_cast<double*>(memory) + kDoublesOfModelNorms; }

// The steps, counted from 0, in which the limit follows the norms: each `period`th, and three early ones.
FASTCLIP_HD bool is_early(const WeightedClip& clip, int64_t step) {
  return (step == 10 || step == 20 || step == 40) && step < clip.period;
}
FASTCLIP_HD bool is_due(const WeightedClip& clip, int64_t step) {
  return step > 0 && (step % clip.period == 0 || is_early(clip, step));
}

// Returns the number that is larger than `rank` others.
FASTCLIP_HD double number_of_rank(const double* numbers, int count, int rank) {
  for (int i = 0; i < count; ++i) {
    int below = 0;
    for (int j = 0; j < count; ++j) below += numbers[j] < numbers[i] || (numbers[j] == numbers[i] && j < i);
    if (below == rank) return numbers[i];
  }
  return numbers[0];  // of NaN, which no step remembers
}

// Remembers the norm of a step, which enters the limit on itself, and returns the factor of its gradients. The first
// step of all is not limited, nor remembered.
FASTCLIP_HD double coefficient_of_step(const WeightedClip& clip, ModelNorms* memory, int64_t step, double norm) {
  if (step == 0) return 1;
  double* const norms = norms_of(memory);
  norms[step % clip.period] = norm;
  if (is_due(clip, step)) {
    const bool early = is_early(clip, step);
    const int count = early ? static_cast<int>(step) : clip.period;  // early on, the others are 0
    const int middle = count / 4 * 2 < count - 1 ? count / 4 * 2 : count - 1;
    const double median = number_of_rank(norms, clip.period, clip.period - count + middle);
    memory->threshold = clip.scale * median * (early ? 2 : 1);
    memory->was_clipped = memory->clipped;
    memory->were = count;
    memory->clipped = 0;
  }
  if (memory->threshold == 0) return 1;
  const double coefficient = memory->threshold / (norm + 1e-20);
  if (!(coefficient < 1)) return 1;
  memory->clipped += 1;
  return coefficient;
}

}  // namespace fastclip
