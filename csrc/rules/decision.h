// What a step decides by the norms that it has measured: how much gradients are scaled down, or whether the step is
// left out. The only copy, for host and device.
#pragma once

#include "measure.h"
#include "norm_limit.h"

namespace fastclip {

// The limits on a change of parameters. inf: only measured.
struct ChangeLimits {
  double max_change = HUGE_VAL;
  double max_relative_change = HUGE_VAL;  // divided by the norm of the parameters
  bool measures_change = false;
  bool measures_params = false;

  bool operator==(const ChangeLimits& other) const {
    return max_change == other.max_change && max_relative_change == other.max_relative_change &&
           measures_change == other.measures_change && measures_params == other.measures_params;
  }
};

// The limits of a step: on the norm of the gradients, and on the change that they make in the end, see `kLimitsChange`
// in rule.h. Gradients are scaled down to them.
struct Limits : ChangeLimits {
  NormLimit max_norm;
  NormLimit skip_norm;  // a step with a larger norm is left out
  ChangeLimits on_delta;  // on what the step adds to the parameters, see `kMeasuresDelta`; learning rates are scaled
  double smallest_norm = 0;  // stands for the norm of smaller parameters: a model of zeros has to move, too

  bool operator==(const Limits& other) const {
    return ChangeLimits::operator==(other) && max_norm == other.max_norm && skip_norm == other.skip_norm &&
           on_delta == other.on_delta && smallest_norm == other.smallest_norm;
  }
  bool counts_params() const { return measures_params || on_delta.measures_params; }
  bool has_rules() const { return max_norm.is_rule() || skip_norm.is_rule(); }
};

// A model whose parameters have a smaller root mean square than this is limited as one that has it.
constexpr double kSmallestRms = 1e-3;

// Returns Limits::smallest_norm of a model with this number of parameters.
inline double smallest_norm(Norm norm, int64_t parameters) {
  return norm == Norm::inf ? kSmallestRms : kSmallestRms * sqrt(static_cast<double>(parameters > 0 ? parameters : 1));
}

// What they are compared with.
struct Sums {
  Measure grads;
  Measure change;
  Measure params;
};

FASTCLIP_HD void combine(Norm norm, Sums& into, const Sums& other) {
  combine(norm, into.grads, other.grads);
  combine(norm, into.change, other.change);
  combine(norm, into.params, other.params);
}

// The factor of a clip, as a product of two. A norm of 1e38 that is clipped to 1 has a coefficient below the normal
// numbers of float32. It would lose its digits, and would be 0 under torch.set_flush_denormal. Gradients are then taken
// in units of 2^-100. The value clip and its bounds are in these units too, so they cost nothing per element.
struct Scaling {
  double coefficient = 1.0;
  double unit = 1.0;

  FASTCLIP_HD double product() const { return coefficient * unit; }
};

// Returns min(1, limit / size), and NaN if the size is NaN. A limit of inf only measures.
FASTCLIP_HD_RARE Scaling scaling_to(double limit, double size) {
  if (limit == HUGE_VAL || size <= limit) return {};
  const double coefficient = limit / size;
  if (coefficient < 0x1p-126 && limit > 0 && size < HUGE_VAL) return {limit / (size * 0x1p-100), 0x1p-100};
  return {coefficient, 1.0};
}

// Returns the factor of clip_grad_norm_: min(1, max_norm / (norm + 1e-6)).
FASTCLIP_HD Scaling scaling_of(double norm, double max_norm) { return scaling_to(max_norm, norm + 1e-6); }

// Returns one scaling after another.
FASTCLIP_HD Scaling both(const Scaling& a, const Scaling& b) {
  return {a.coefficient * b.coefficient, a.unit * b.unit};
}

// Returns the smaller one, or one that is NaN.
FASTCLIP_HD Scaling smaller(const Scaling& a, const Scaling& b) {
  return b.product() < a.product() || b.coefficient != b.coefficient ? b : a;
}

// Returns the factor of a change to its limits. `params` is the norm of the parameters, where that is measured, and
// `smallest` stands for that of smaller ones. Parameters that are not finite limit nothing.
FASTCLIP_HD_RARE Scaling scaling_of_change(const ChangeLimits& limits, double change, double params, double smallest) {
  const Scaling scaling = scaling_to(limits.max_change, change);
  if (!limits.measures_params) return scaling;
  const double size = larger(smallest, params);
  return smaller(scaling, scaling_to(size < HUGE_VAL ? limits.max_relative_change * size : HUGE_VAL, change));
}

// The consequence of what was measured for a step.
struct Decision {
  double total_norm;
  double max_norm;  // the values of the limits
  double skip_norm;
  double change;  // that the scaled gradients make in the end
  Scaling scaling;
  bool skip;
};

FASTCLIP_HD_RARE Decision decision_at(double norm, const Limits& limits, Levels levels) {
  Decision decision{
      norm, value_of(limits.max_norm, levels.max_norm, norm), value_of(limits.skip_norm, levels.skip_norm, norm), 0, {},
      false};
  decision.scaling = scaling_of(norm, decision.max_norm);
  decision.skip = decision.skip_norm < HUGE_VAL && !(norm <= decision.skip_norm);
  return decision;
}

// Returns the decision of a step that AMP skips.
FASTCLIP_HD Decision skipped(const Limits& limits, Levels levels) {
  Decision decision = decision_at(HUGE_VAL, limits, levels);
  decision.skip = true;
  return decision;
}

FASTCLIP_HD Decision decide(Norm norm, const Sums& sums, const Limits& limits, Levels levels, bool skip_nonfinite) {
  Decision decision = decision_at(total_norm(norm, sums.grads), limits, levels);
  // No sum of finite gradients overflows, so this is not 0 exactly if a gradient is not finite.
  const Measure& sum = sums.grads;
  const double zero = (sum.small - sum.small) + (sum.medium - sum.medium) + (sum.big - sum.big);
  decision.skip |= skip_nonfinite && zero != 0;
  if (!limits.measures_change) return decision;
  const double change = total_norm(norm, sums.change);
  const double params = limits.measures_params ? total_norm(norm, sums.params) : 0;
  decision.scaling = smaller(decision.scaling, scaling_of_change(limits, change, params, limits.smallest_norm));
  decision.change = decision.skip ? 0 : change * decision.scaling.product();
  return decision;
}

// The results of a step, in the memory of its device. Nothing waits for them; they are read when a caller asks.
struct Outcome {
  Sums sums;  // over this device
  Levels levels;  // as they were before the step
  double total_norm;  // norm over all devices
  double max_norm;
  double skip_norm;
  double coefficient;
  double change;
  uint64_t skipped;  // this step: 0 or 1
  uint64_t skipped_steps;  // since the engine was made
  uint32_t arrived;  // blocks at the barrier; 0 between steps
  uint32_t opened;  // number of times that the barrier has opened
  uint32_t finished;  // blocks that have updated; 0 between steps
  uint32_t unused;
};

FASTCLIP_HD void record(Outcome& outcome, const Decision& decision, bool counts) {
  outcome.total_norm = decision.total_norm;
  outcome.max_norm = decision.max_norm;
  outcome.skip_norm = decision.skip_norm;
  outcome.coefficient = decision.scaling.product();
  outcome.change = decision.change;
  outcome.skipped = decision.skip;
  outcome.skipped_steps += decision.skip && counts;
}

}  // namespace fastclip
