// Parts of a model that have a norm, and a limit on it, of their own: groups, or parameters. The only copy, for host
// and device.
#pragma once

#include "decision.h"

namespace fastclip {

// Over which max_norm takes the norm.
enum class Scope : uint8_t { global, group, parameter };

// A segment of a step, in memory of its device: what was measured of it, and what follows.
struct SegmentOutcome {
  Measure sum;  // over this device
  Level level;  // as it was before the step
  double total_norm;  // over all devices
  double max_norm;    // the value of the limit
  double coefficient;
  double change;  // after the limits on it
  Measure params;  // the norm of its parameters, with a limit that is relative to it
  uint32_t measured;  // on a GPU: its tiles that are measured; 0 between steps
  uint32_t unused;
};

// What follows from a segment's norm.
struct SegmentDecision {
  double total_norm;
  double max_norm;
  Scaling scaling;
  double change;  // that the scaled gradients make in the end, with kLimitsChange
};

// Decides for a segment, by its sum over all devices.
FASTCLIP_HD SegmentDecision decide_for(Norm norm, const NormLimit& limit, Level level, const Measure& sum) {
  const double size = total_norm(norm, sum);
  const double max_norm = value_of(limit, level, size);
  return {size, max_norm, scaling_of(size, max_norm), 0};
}

// Scales it down to the limits on its change, too. `of_norm` is the change that a gradient of norm 1 makes in the end,
// `params` the norm of the parameters, and `smallest` as in scaling_of_change.
FASTCLIP_HD void limit_change(const ChangeLimits& limits, double of_norm, double params, double smallest,
                              SegmentDecision& decision) {
  if (!limits.measures_change) return;
  const double change = of_norm == 0 ? 0 : of_norm * decision.total_norm;  // 0, also of an inf
  decision.scaling = smaller(decision.scaling, scaling_of_change(limits, change, params, smallest));
  decision.change = change * decision.scaling.product();
}

FASTCLIP_HD void record(SegmentOutcome& outcome, const SegmentDecision& decision) {
  outcome.total_norm = decision.total_norm;
  outcome.max_norm = decision.max_norm;
  outcome.coefficient = decision.total_norm == 0 ? 1 : decision.scaling.product();  // of zeros, nothing is scaled
}

// Returns whether the norms of segments are remembered in a step that is decided so: those of a step that is left out
// for an inf or NaN are not.
FASTCLIP_HD bool remembers_segments(const Decision& decision) {
  return !decision.skip || decision.total_norm < HUGE_VAL;
}

}  // namespace fastclip
