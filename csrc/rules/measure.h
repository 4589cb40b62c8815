// The norm of many numbers, from sums that add up over tiles, tensors, devices and ranks.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule.h"

namespace fastclip {

enum class Norm : uint8_t { none, two, inf };

// A sum of squares (or a maximum) over some numbers, in double. float32 and narrower numbers need only `medium`:
// their squares are exact in double, and can neither overflow nor vanish. Squares of float64 can, so magnitudes below
// and above the safe range are summed scaled by a power of two (Blue, 1978).
struct Measure {
  double small;
  double medium;  // for the inf norm: the largest magnitude
  double big;
};
constexpr int kParts = 3;  // of a Measure

constexpr double kSmall = 0x1p-500, kScaleSmall = 0x1p600;
constexpr double kBig = 0x1p480, kScaleBig = 0x1p-600;

// Returns the larger number. Once it is NaN, it stays NaN: no comparison with NaN is true, and only NaN differs from
// itself.
template <class T>
FASTCLIP_HD T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// Adds x to the parts of a Measure, which are passed one by one: a CPU keeps many sums in three arrays. Sum is double;
// for the inf norm it may be the type of the gradients. kFma: the CPU has an instruction for it.
template <Norm kNorm, bool kFloat64, bool kFma = false, class Sum>
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
    medium = kFma ? std::fma(x, x, medium) : medium + x * x;
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

FASTCLIP_HD_RARE double total_norm(Norm norm, Measure m) {
  if (norm == Norm::inf) return m.medium;
  if (m.big != 0) return sqrt(m.big + (m.medium * kScaleBig) * kScaleBig) / kScaleBig;
  if (m.small > 0 && m.medium < 1e-200) {
    return sqrt(m.small + (m.medium * kScaleSmall) * kScaleSmall) / kScaleSmall;
  }
  return sqrt(m.medium);
}

// Returns the measure of the same numbers, each multiplied by `factor`. With 0 nothing is left, not even of an inf.
FASTCLIP_HD Measure multiplied(Norm norm, const Measure& m, double factor) {
  if (factor == 0) return {};
  if (norm == Norm::inf) return {0, m.medium * factor, 0};
  const double square = factor * factor;
  return {m.small * square, m.medium * square, m.big * square};
}

}  // namespace fastclip
