// The clips of a gradient before the update rule sees it. The only copy, for host and device.
#pragma once

#include <cmath>

#include "decision.h"
#include "rule.h"

namespace fastclip {

// unscale (AMP, and a deferred clip) -> value clip -> norm clip -> sign (maximize). A part that is not asked for has a
// neutral constant (1, or an infinite bound); a product with 1 changes no bits.
template <class T>
struct Clip {
  T unscale;
  T low;
  T high;
  T coefficient;  // of the norm, negated to maximize

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

// What somebody else asks of the gradients of a step, before its own clips; in device memory.
struct Asked {
  const float* grad_scale = nullptr;  // AMP: gradients are divided by it
  const double* grad_factor = nullptr;  // a clip that was deferred to this step: they are multiplied by it
};

// Returns the clip of a group's gradients. It unscales them as GradScaler.unscale_ does: one reciprocal in double,
// rounded to float, then products.
template <class T>
FASTCLIP_HD Clip<T> clip_of(const SharedHyper& hyper, const Asked& asked, const Scaling& scaling) {
  T unscale = asked.grad_scale ? static_cast<float>(1.0 / *asked.grad_scale) : 1.0f;
  if (asked.grad_factor) unscale *= static_cast<T>(*asked.grad_factor);
  const T unit = T(scaling.unit);
  return {unit * unscale, unit * T(hyper.clip_low), unit * T(hyper.clip_high),
          T(hyper.maximize ? -scaling.coefficient : scaling.coefficient)};
}

// Returns a bound as clamp_ has it: rounded to the dtype of the gradients.
inline double rounded_bound(DType dtype, double bound) {
  const auto narrow = static_cast<float>(bound);
  const auto by_way_of = [&](auto stored) {
    store(stored, narrow);
    return double{load(stored)};
  };
  switch (dtype) {
    case DType::float32: return narrow;
    case DType::bfloat16: return by_way_of(BFloat16{});
    case DType::float16: return by_way_of(Float16{});
    case DType::float64: break;
  }
  return bound;
}

inline bool clips_value(const SharedHyper& hyper) { return hyper.clip_low > -HUGE_VAL || hyper.clip_high < HUGE_VAL; }

}  // namespace fastclip
