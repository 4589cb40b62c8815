// What is done to a gradient before the update rule sees it, and the norm that decides it:
// host and device, the only copy.
#pragma once

#include <cmath>

#include "rule.h"

namespace fastclip {

enum class Norm : uint8_t { none, two, inf };

// unscale (AMP) -> value clip -> norm clip -> sign (maximize). Where a part is not asked for its
// constant is neutral (1, or an infinite bound), and a product with 1 changes no bits.
template <class T>
struct Clip {
  T unscale;
  T low;
  T high;
  T coefficient;  // of the norm clip, negated to maximize

  // What the norm is taken of. The comparisons are those of clamp_: NaN stays NaN, and a zero
  // that equals a zero bound keeps its sign.
  FASTCLIP_HD T value(T x) const {
    x = x * unscale;
    x = x < low ? low : x;
    return x > high ? high : x;
  }

  // Whether the value clip moves it. A NaN stays where it is.
  FASTCLIP_HD bool clamps(T x) const {
    const T unscaled = x * unscale;
#if defined(__CUDA_ARCH__)
    return unscaled < low || unscaled > high;
#else
    return std::islessgreater(value(x), unscaled);  // one comparison less, of a value that is there anyway
#endif
  }

  // To skip a step whose gradients hold an inf or NaN, the measure has to see what a value clip would hide.
  FASTCLIP_HD T measured(T x, bool see_nonfinite) const {
    const T unscaled = x * unscale;
    return see_nonfinite && !(unscaled - unscaled == T(0)) ? unscaled : value(x);
  }

  FASTCLIP_HD T operator()(T x) const { return value(x) * coefficient; }
};

// A sum of squares (or a maximum) over some gradients, in double. float32 and narrower need only
// `medium`: there their squares are exact and can neither overflow nor vanish. Squares of float64 can,
// so those below and above the safe range are summed scaled by a power of two (Blue, 1978).
struct Measure {
  double small;
  double medium;  // for the inf norm: the largest magnitude
  double big;
};

constexpr double kSmall = 0x1p-500, kScaleSmall = 0x1p600;
constexpr double kBig = 0x1p480, kScaleBig = 0x1p-600;

// A NaN, once met, stays: no comparison with it is true, and only NaN differs from itself.
template <class T>
FASTCLIP_HD T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// The parts of a Measure come one by one, so that a CPU can keep many sums in three arrays. Sum is double; for
// the inf norm it may be the type of the gradients.
template <Norm kNorm, bool kFloat64, class Sum>
FASTCLIP_HD void measure(double& small, Sum& medium, double& big, Sum x) {
  const Sum magnitude = fabs(x);
  if constexpr (kNorm == Norm::inf) {
    medium = larger(medium, magnitude);
  } else if constexpr (kFloat64) {
    const double s = magnitude < kSmall ? x * kScaleSmall : 0.0;
    const double b = magnitude > kBig ? x * kScaleBig : 0.0;
    const double m = magnitude < kSmall || magnitude > kBig ? 0.0 : x;  // NaN goes here
    small += s * s;
    medium += m * m;
    big += b * b;
  } else {
    // The square is exact, so it makes no difference to the bits whether it is rounded.
#if defined(__CUDA_ARCH__)
    medium = fma(x, x, medium);
#else
    medium += x * x;
#endif
  }
}

FASTCLIP_HD void combine(Norm norm, Measure& into, const Measure& other) {
  if (norm == Norm::inf) {
    into.medium = larger(into.medium, other.medium);
  } else {
    into.small += other.small;
    into.medium += other.medium;
    into.big += other.big;
  }
}

FASTCLIP_HD double total_norm(Norm norm, const Measure& m) {
  if (norm == Norm::inf) return m.medium;
  if (m.big > 0) return sqrt(m.big + (m.medium * kScaleBig) * kScaleBig) / kScaleBig;
  if (m.small > 0 && m.medium < 1e-200) {
    return sqrt(m.small + (m.medium * kScaleSmall) * kScaleSmall) / kScaleSmall;
  }
  return sqrt(m.medium);
}

// What a norm clip multiplies by is the product of the two. A coefficient below the normal numbers of float32, as of a
// norm of 1e38 that is clipped to 1, would lose its digits, and be 0 under torch.set_flush_denormal. So gradients are
// then taken in units of 2^-100: before the value clip, and its bounds with them, so that it costs nothing per element.
struct Scaling {
  double coefficient = 1.0;
  double unit = 1.0;

  FASTCLIP_HD double product() const { return coefficient * unit; }
};

// clip_grad_norm_: gradients are scaled by min(1, max_norm / (norm + 1e-6)), and by NaN if the norm
// is NaN. max_norm = inf asks for the norm only.
FASTCLIP_HD Scaling scaling_of(double norm, double max_norm) {
  if (max_norm == HUGE_VAL) return {};
  const double coefficient = max_norm / (norm + 1e-6);
  if (coefficient < 0x1p-126 && max_norm > 0 && norm < HUGE_VAL) {
    return {max_norm / ((norm + 1e-6) * 0x1p-100), 0x1p-100};
  }
  return {coefficient > 1.0 ? 1.0 : coefficient, 1.0};
}

// The clip of a group's gradients. They are unscaled as GradScaler.unscale_ does it: one reciprocal in double, rounded to
// float, then products.
template <class T>
FASTCLIP_HD Clip<T> clip_of(const SharedHyper& hyper, const float* grad_scale, const Scaling& scaling) {
  const float unscale = grad_scale ? static_cast<float>(1.0 / *grad_scale) : 1.0f;
  const T unit = T(scaling.unit);
  return {unit * unscale, unit * T(hyper.clip_low), unit * T(hyper.clip_high),
          T(hyper.maximize ? -scaling.coefficient : scaling.coefficient)};
}

inline bool clips_value(const SharedHyper& hyper) { return hyper.clip_low > -HUGE_VAL || hyper.clip_high < HUGE_VAL; }

// What the measured gradients mean for a step.
struct Decision {
  double total_norm;
  Scaling scaling;
  bool skip;
};
// Of a step that AMP found to be skipped.
FASTCLIP_HD Decision skipped(double max_norm) { return {HUGE_VAL, scaling_of(HUGE_VAL, max_norm), true}; }

FASTCLIP_HD Decision decide(Norm norm, const Measure& sum, double max_norm, bool skip_nonfinite) {
  // No sum of finite gradients overflows, so this is true exactly where one is not finite.
  const double zero = (sum.small - sum.small) + (sum.medium - sum.medium) + (sum.big - sum.big);
  const double total = total_norm(norm, sum);
  return {total, scaling_of(total, max_norm), skip_nonfinite && zero != 0};
}

// What a step leaves behind, in the memory of its device: read by whoever asks, never waited for.
struct Outcome {
  Measure sum;        // over the gradients of this device
  double total_norm;  // over those of all devices
  double coefficient;
  uint64_t skipped;        // this step: 0 or 1
  uint64_t skipped_steps;  // since the plan was made
  uint32_t arrived;   // blocks at the barrier; 0 between steps
  uint32_t opened;    // how often the barrier has opened
  uint32_t finished;  // blocks that have updated; 0 between steps
  uint32_t unused;
};

FASTCLIP_HD void record(Outcome& outcome, const Decision& decision, bool counts) {
  outcome.total_norm = decision.total_norm;
  outcome.coefficient = decision.scaling.product();
  outcome.skipped = decision.skip;
  outcome.skipped_steps += decision.skip && counts;
}

}  // namespace fastclip
