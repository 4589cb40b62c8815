// The clips of a gradient before the update rule sees it, and the norm that decides one of them. The only copy, for
// host and device.
#pragma once

#include <cmath>

#include "rule.h"

namespace fastclip {

enum class Norm : uint8_t { none, two, inf };

// unscale (AMP) -> value clip -> norm clip -> sign (maximize). A part that is not asked for has a neutral constant (1,
// or an infinite bound); a product with 1 changes no bits.
template <class T>
struct Clip {
  T unscale;
  T low;
  T high;
  T coefficient;  // the norm clip's, negated to maximize

  // Returns the value that the norm is taken over. It compares as clamp_ does: NaN stays NaN, and a zero that equals a
  // zero bound keeps its sign.
  FASTCLIP_HD T value(T x) const {
    x = x * unscale;
    x = x < low ? low : x;
    return x > high ? high : x;
  }

  // Returns whether the value clip changes x. It leaves a NaN as it is.
  FASTCLIP_HD bool clamps(T x) const {
    const T unscaled = x * unscale;
#if defined(__CUDA_ARCH__)
    return unscaled < low || unscaled > high;
#else
    return std::islessgreater(value(x), unscaled);  // one comparison less: value(x) is computed anyway
#endif
  }

  // Returns the value to measure. With see_nonfinite, an inf or NaN is measured as it is: a value clip would hide an
  // inf.
  FASTCLIP_HD T measured(T x, bool see_nonfinite) const {
    const T unscaled = x * unscale;
    return see_nonfinite && !(unscaled - unscaled == T(0)) ? unscaled : value(x);
  }

  FASTCLIP_HD T operator()(T x) const { return value(x) * coefficient; }
};

// A sum of squares (or a maximum) over some gradients, in double. float32 and narrower gradients need only `medium`:
// their squares are exact in double, and can neither overflow nor vanish. Squares of float64 can, so magnitudes below
// and above the safe range are summed scaled by a power of two (Blue, 1978).
struct Measure {
  double small;
  double medium;  // for the inf norm: the largest magnitude
  double big;
};

constexpr double kSmall = 0x1p-500, kScaleSmall = 0x1p600;
constexpr double kBig = 0x1p480, kScaleBig = 0x1p-600;

// Returns the larger number. Once it is NaN, it stays NaN: no comparison with NaN is true, and only NaN differs from
// itself.
template <class T>
FASTCLIP_HD T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// Adds x to the parts of a Measure, which are passed one by one: a CPU keeps many sums in three arrays. Sum is double;
// for the inf norm it may be the type of the gradients.
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
    // The square is exact, so rounding it changes no bits.
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

// The factor of a norm clip, as a product of two. A norm of 1e38 that is clipped to 1 has a coefficient below the
// normal numbers of float32. It would lose its digits, and would be 0 under torch.set_flush_denormal. Gradients are
// then taken in units of 2^-100. The value clip and its bounds are in these units too, so they cost nothing per
// element.
struct Scaling {
  double coefficient = 1.0;
  double unit = 1.0;

  FASTCLIP_HD double product() const { return coefficient * unit; }
};

// Returns the factor of clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), and NaN if the norm is NaN. max_norm = inf
// only measures.
FASTCLIP_HD Scaling scaling_of(double norm, double max_norm) {
  if (max_norm == HUGE_VAL) return {};
  const double coefficient = max_norm / (norm + 1e-6);
  if (coefficient < 0x1p-126 && max_norm > 0 && norm < HUGE_VAL) {
    return {max_norm / ((norm + 1e-6) * 0x1p-100), 0x1p-100};
  }
  return {coefficient > 1.0 ? 1.0 : coefficient, 1.0};
}

// Returns the clip of a group's gradients. It unscales them as GradScaler.unscale_ does: one reciprocal in double,
// rounded to float, then products.
template <class T>
FASTCLIP_HD Clip<T> clip_of(const SharedHyper& hyper, const float* grad_scale, const Scaling& scaling) {
  const float unscale = grad_scale ? static_cast<float>(1.0 / *grad_scale) : 1.0f;
  const T unit = T(scaling.unit);
  return {unit * unscale, unit * T(hyper.clip_low), unit * T(hyper.clip_high),
          T(hyper.maximize ? -scaling.coefficient : scaling.coefficient)};
}

inline bool clips_value(const SharedHyper& hyper) { return hyper.clip_low > -HUGE_VAL || hyper.clip_high < HUGE_VAL; }

// The consequence of the measured gradients for a step.
struct Decision {
  double total_norm;
  Scaling scaling;
  bool skip;
};
// Returns the decision of a step that AMP skips.
FASTCLIP_HD Decision skipped(double max_norm) { return {HUGE_VAL, scaling_of(HUGE_VAL, max_norm), true}; }

FASTCLIP_HD Decision decide(Norm norm, const Measure& sum, double max_norm, bool skip_nonfinite) {
  // No sum of finite gradients overflows, so this is not 0 exactly if a gradient is not finite.
  const double zero = (sum.small - sum.small) + (sum.medium - sum.medium) + (sum.big - sum.big);
  const double total = total_norm(norm, sum);
  return {total, scaling_of(total, max_norm), skip_nonfinite && zero != 0};
}

// The results of a step, in the memory of its device. Nothing waits for them; they are read when a caller asks.
struct Outcome {
  Measure sum;  // sum over the gradients of this device
  double total_norm;  // norm over all devices
  double coefficient;
  uint64_t skipped;  // this step: 0 or 1
  uint64_t skipped_steps;  // since the engine was made
  uint32_t arrived;  // blocks at the barrier; 0 between steps
  uint32_t opened;  // number of times that the barrier has opened
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
