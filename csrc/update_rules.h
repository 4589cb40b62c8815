// One element of each update rule: host and device, the only copy of the math.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace fastclip {

enum class Rule : uint8_t {
  sgd,
  adam,
  clip_grad,  // no update: writes the clipped gradient back, as torch.nn.utils.clip_grad_*_
};

// The hyperparameters of one group, for tensors of one dtype. What a rule derives from them is derived in double
// (1 - 0.999f is off by 1e-5) and converted to the compute type.
struct Hyper {
  double lr;
  const void* lr_on_device;  // lr as a device tensor: read by the kernel, so that no host waits for it
  bool lr_is_float64;
  bool maximize;
  bool nesterov;
  bool amsgrad;
  bool decoupled_weight_decay;
  bool stochastic_rounding;  // of all that is stored in 16 bits
  uint32_t rounding_seed;
  double weight_decay;
  double clip_low;  // -inf where there is no value clip
  double clip_high;
  double momentum;  // SGD
  double dampening;
  double beta1;  // Adam
  double beta2;
  double eps;
};

// What a step does to a tensor's momentum buffer. `first` fills it: torch's first buffer is the
// undampened gradient, not momentum * 0 + (1 - dampening) * gradient.
enum class Momentum : uint8_t { none, first, running };

// Which terms of a rule a tensor needs. With weight decay 0 the term has to be left out, not
// multiplied by 0: 0 * inf is NaN, and -0.0 + 0.0 loses its sign. The CPU compiles one loop per
// StaticTerms; a GPU decides per block, where a uniform branch costs nothing.
struct Terms {
  Momentum momentum;
  bool nesterov;
  bool weight_decay;  // added to the gradient
  bool amsgrad;
};
template <Momentum kMomentum, bool kNesterov, bool kWeightDecay, bool kAmsgrad>
struct StaticTerms {
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool nesterov = kNesterov;
  static constexpr bool weight_decay = kWeightDecay;
  static constexpr bool amsgrad = kAmsgrad;
};

FASTCLIP_HD Terms terms_of(const Hyper& hyper, Momentum momentum) {
  return {momentum, hyper.nesterov, hyper.weight_decay != 0 && !hyper.decoupled_weight_decay, hyper.amsgrad};
}

// No tensor has more state arrays: exp_avg, exp_avg_sq, max_exp_avg_sq.
constexpr int kMaxStates = 3;

// The rules. `d` is the gradient after clipping (and after negation, to maximize); `states` are the tensor's, in the
// order in which they are named in states.cpp. Each fma is one that torch's CPU kernels compute, too: same operations in
// the same order, so the same bits.

// torch.optim.SGD: states {momentum_buffer}.
template <class T>
struct SGD {
  T negative_lr;
  T momentum;
  T one_minus_dampening;
  T weight_decay;

  SGD() = default;
  FASTCLIP_HD SGD(const Hyper& hyper, double lr, double /*step*/)
      : negative_lr(T(-lr)),
        momentum(T(hyper.momentum)),
        one_minus_dampening(T(1 - hyper.dampening)),
        weight_decay(T(hyper.weight_decay)) {}
  template <class Other>
  FASTCLIP_HD explicit SGD(const SGD<Other>& other)
      : negative_lr(T(other.negative_lr)),
        momentum(T(other.momentum)),
        one_minus_dampening(T(other.one_minus_dampening)),
        weight_decay(T(other.weight_decay)) {}

  // How many of its states a rule reads and writes.
  template <class WhichTerms>
  FASTCLIP_HD static constexpr int reads(const WhichTerms& terms) {
    return terms.momentum == Momentum::running ? 1 : 0;
  }
  template <class WhichTerms>
  FASTCLIP_HD static constexpr int writes(const WhichTerms& terms) {
    return terms.momentum != Momentum::none ? 1 : 0;
  }

  template <class WhichTerms>
  FASTCLIP_HD void operator()(const WhichTerms& terms, T& param, T d, T* states) const {
    using std::fma;
    if (terms.weight_decay) d = fma(weight_decay, param, d);
    if (terms.momentum != Momentum::none) {
      T& buffer = states[0];
      const bool first = terms.momentum == Momentum::first;
      buffer = first ? d : fma(one_minus_dampening, d, buffer * momentum);
      d = terms.nesterov ? fma(momentum, buffer, d) : buffer;
    }
    param = fma(negative_lr, d, param);
  }
};

// torch.optim.Adam, and AdamW by `decoupled_weight_decay`: states {exp_avg, exp_avg_sq, max_exp_avg_sq}. `step` counts
// this one.
template <class T>
struct Adam {
  T negative_step_size;
  T weight_decay;
  T decay;  // decoupled: what it leaves of a parameter. 1 where there is none, which changes no bits
  T lerp_weight;
  T beta2;
  T one_minus_beta2;
  T bias_correction2_sqrt;
  T eps;

  Adam() = default;
  FASTCLIP_HD Adam(const Hyper& hyper, double lr, double step)
      : negative_step_size(T(-(lr / (1 - pow(hyper.beta1, step))))),
        weight_decay(T(hyper.weight_decay)),
        decay(T(hyper.decoupled_weight_decay ? 1 - lr * hyper.weight_decay : 1.0)),
        lerp_weight(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        one_minus_beta2(T(1 - hyper.beta2)),
        bias_correction2_sqrt(T(pow(1 - pow(hyper.beta2, step), 0.5))),
        eps(T(hyper.eps)) {}
  template <class Other>
  FASTCLIP_HD explicit Adam(const Adam<Other>& other)
      : negative_step_size(T(other.negative_step_size)),
        weight_decay(T(other.weight_decay)),
        decay(T(other.decay)),
        lerp_weight(T(other.lerp_weight)),
        beta2(T(other.beta2)),
        one_minus_beta2(T(other.one_minus_beta2)),
        bias_correction2_sqrt(T(other.bias_correction2_sqrt)),
        eps(T(other.eps)) {}

  template <class WhichTerms>
  FASTCLIP_HD static constexpr int reads(const WhichTerms& terms) {
    return terms.amsgrad ? 3 : 2;
  }
  template <class WhichTerms>
  FASTCLIP_HD static constexpr int writes(const WhichTerms& terms) {
    return reads(terms);
  }

  template <class WhichTerms>
  FASTCLIP_HD void operator()(const WhichTerms& terms, T& param, T d, T* states) const {
    using std::fma, std::sqrt;  // of T, not of double
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    if (terms.weight_decay) d = fma(weight_decay, param, d);
    param = param * decay;
    const bool nearer = lerp_weight < T(0.5);  // torch's lerp starts at the nearer end
    exp_avg = fma(nearer ? lerp_weight : lerp_weight - T(1), d - exp_avg, nearer ? exp_avg : d);
    exp_avg_sq = fma(one_minus_beta2 * d, d, exp_avg_sq * beta2);
    T square = exp_avg_sq;
    if (terms.amsgrad) {
      T& largest = states[2];
      largest = square > largest || square != square ? square : largest;  // NaN stays, as in torch.maximum
      square = largest;
    }
    const T denominator = sqrt(square) / bias_correction2_sqrt + eps;
    param = param + negative_step_size * exp_avg / denominator;
  }
};

}  // namespace fastclip
