// What a step adds to a tensor, measured before anything is written. Limits on it scale the tensor's learning rate: the
// optimizer's states see the whole gradient. The only copy, for host and device.
#pragma once

#include "decision.h"

namespace fastclip {

// What is measured, as bits.
using DeltaParts = uint32_t;
constexpr DeltaParts kDelta = 1;  // what is added
constexpr DeltaParts kRelative = 2;  // each gradient over the root of its average square
constexpr DeltaParts kParam = 4;

// Returns what limits on it need.
FASTCLIP_HD DeltaParts parts_of(const ChangeLimits& limits) {
  return (limits.measures_change ? kDelta : 0) | (limits.measures_params ? kParam : 0);
}

struct DeltaSums {
  Measure delta;
  Measure relative;
  Measure param;
};

FASTCLIP_HD void combine(DeltaSums& into, const DeltaSums& other) {
  combine(Norm::two, into.delta, other.delta);
  combine(Norm::two, into.relative, other.relative);
  combine(Norm::two, into.param, other.param);
}

struct DeltaNorms {
  double delta;
  double relative;
  double param;
};

FASTCLIP_HD DeltaNorms norms_of(const DeltaSums& sums) {
  return {total_norm(Norm::two, sums.delta), total_norm(Norm::two, sums.relative), total_norm(Norm::two, sums.param)};
}

// Returns min(1, max_rms / root mean square), for `numel` numbers of this norm.
FASTCLIP_HD double factor_to_rms(double max_rms, double norm, double numel) {
  return scaling_to(max_rms, numel > 0 ? norm / sqrt(numel) : 0).product();
}

// Returns the factor of learning rates to the limits on what is added, of which this is measured, and sets `change` to
// what is then added. `smallest` as in scaling_of_change.
FASTCLIP_HD double limit_deltas(const ChangeLimits& limits, const Measure& delta, const Measure& params,
                                double smallest, double& change) {
  const double norm = total_norm(Norm::two, delta);
  const double factor = scaling_of_change(limits, norm, total_norm(Norm::two, params), smallest).product();
  change = norm * factor;
  return factor;
}

// Returns a gradient over the root of its average square, which is corrected by the square of `correction_root`; or
// over eps, where that is larger. NaN stays.
template <class T>
FASTCLIP_HD T relative_gradient(T d, T square, T correction_root, T eps) {
  using std::sqrt;  // for T, not for double
  const T root = sqrt(square) / correction_root;
  return d / (root < eps ? eps : root);
}

}  // namespace fastclip
