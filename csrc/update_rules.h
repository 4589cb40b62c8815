// One element of each update rule: host and device, the only copy of the math.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace fastclip {

// What a step does to a tensor's momentum buffer. `first` fills it: torch's first buffer is the
// undampened gradient, not momentum * 0 + (1 - dampening) * gradient.
enum class Momentum : uint8_t { none, first, running };

// Which terms of a rule a tensor needs. With weight decay 0 the term has to be left out, not
// multiplied by 0: 0 * inf is NaN, and -0.0 + 0.0 loses its sign. The CPU compiles one loop per
// StaticTerms; a GPU decides per block, where a uniform branch costs nothing.
struct Terms {
  Momentum momentum;
  bool nesterov;
  bool weight_decay;
};
template <Momentum kMomentum, bool kNesterov, bool kWeightDecay>
struct StaticTerms {
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool nesterov = kNesterov;
  static constexpr bool weight_decay = kWeightDecay;
};

// torch.optim.SGD. `d` is the gradient after clipping (and after negation, to maximize).
// Each fma is one `add(other, alpha=...)` of torch, which its CPU kernels compute as an fma too:
// same operations in the same order, so the same bits.
template <class T>
struct SGD {
  T negative_lr;
  T momentum;
  T one_minus_dampening;
  T weight_decay;

  template <class WhichTerms>
  FASTCLIP_HD void operator()(const WhichTerms& terms, T& param, T d, T& buffer) const {
    using std::fma;
    if (terms.weight_decay) d = fma(weight_decay, param, d);
    if (terms.momentum != Momentum::none) {
      const bool first = terms.momentum == Momentum::first;
      buffer = first ? d : fma(one_minus_dampening, d, buffer * momentum);
      d = terms.nesterov ? fma(momentum, buffer, d) : buffer;
    }
    param = fma(negative_lr, d, param);
  }
};

}  // namespace fastclip
