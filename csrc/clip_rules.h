// What is done to a gradient before the update rule sees it, and the norm that decides it:
// host and device, the only copy.
#pragma once

#include <cmath>

#include "dtypes.h"

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

  FASTCLIP_HD T operator()(T x) const { return value(x) * coefficient; }
};

// A sum of squares (or a maximum) over some gradients, in double: as a double, or as a vector of
// them, one sum per lane. float32 and narrower need only `medium`: there their squares are exact
// and can neither overflow nor vanish. Squares of float64 can, so those below and above the safe
// range are summed scaled by a power of two (Blue, 1978).
template <class V>
struct MeasureOf {
  V small;
  V medium;  // for the inf norm: the largest magnitude
  V big;
};
using Measure = MeasureOf<double>;

constexpr double kSmall = 0x1p-500, kScaleSmall = 0x1p600;
constexpr double kBig = 0x1p480, kScaleBig = 0x1p-600;

// A NaN, once met, stays: no comparison with it is true, and only NaN differs from itself.
template <class V>
FASTCLIP_HD V larger(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

template <Norm kNorm, bool kFloat64, class V>
FASTCLIP_HD void measure(MeasureOf<V>& m, V x) {
  const V zero{};
  const V magnitude = x < zero ? -x : x;
  if constexpr (kNorm == Norm::inf) {
    m.medium = larger(m.medium, magnitude);
  } else if constexpr (kFloat64) {
    const V s = magnitude < kSmall ? x * kScaleSmall : zero;
    const V b = magnitude > kBig ? x * kScaleBig : zero;
    const V mid = (magnitude < kSmall) | (magnitude > kBig) ? zero : x;  // NaN goes here
    m.small += s * s;
    m.medium += mid * mid;
    m.big += b * b;
  } else {
    m.medium += x * x;
  }
}

template <class V>
FASTCLIP_HD void combine(Norm norm, MeasureOf<V>& into, const MeasureOf<V>& other) {
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

// clip_grad_norm_: gradients are scaled by min(1, max_norm / (norm + 1e-6)), and by NaN if the norm
// is NaN. max_norm = inf asks for the norm only.
FASTCLIP_HD double clip_coefficient(double norm, double max_norm) {
  if (max_norm == HUGE_VAL) return 1.0;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

}  // namespace fastclip
