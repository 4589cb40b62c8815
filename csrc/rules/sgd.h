// torch.optim.SGD: momentum, dampening, Nesterov.
#pragma once

#include "rule.h"

namespace fastclip {

struct SGD {
  static constexpr const char* kName = "sgd";
  static constexpr std::array kStates = {StateArray{"momentum_buffer", true}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = false;
  // torch's first buffer is the undampened gradient, not momentum * 0 + (1 - dampening) * gradient.
  static constexpr bool kFilledByFirstStep = true;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = true;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {0, 1};
  static constexpr bool kQuantizesStates = true;
  static constexpr bool kIsCommon = true;

  struct Settings {
    double momentum;
    double dampening;
    bool nesterov;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov");
    settings.momentum = group.number(kMomentum);
    settings.dampening = group.number(kDampening);
    settings.nesterov = group.flag(kNesterov);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kHasMomentum = 2, kIsNesterov = 4, kWeightDecay = 8;
  static constexpr int kSwitches = 4;
  static Terms terms(const SharedHyper& hyper, const Settings& settings) {
    return (settings.momentum != 0 ? kHasMomentum : 0) | (settings.nesterov ? kIsNesterov : 0) |
           (hyper.weight_decay != 0 ? kWeightDecay : 0);
  }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) {
    return terms & kHasMomentum ? terms : terms & kWeightDecay;
  }
  FASTCLIP_HD static constexpr uint32_t reads(Terms terms) { return terms & kHasMomentum && !(terms & kFirst) ? 1 : 0; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms terms) { return terms & kHasMomentum ? 1 : 0; }

  template <class T>
  struct Constants {
    T negative_lr;
    T momentum;
    T one_minus_dampening;
    T weight_decay;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress&) {
    return {-lr, settings.momentum, 1 - settings.dampening, hyper.weight_decay};
  }

  // A buffer hands a gradient on, each time times the momentum: the parts add up to 1 / (1 - momentum), if they end.
  FASTCLIP_HD static double change(const Settings& settings, double lr) {
    if (settings.momentum == 0) return fabs(lr);
    if (settings.momentum >= 1) return HUGE_VAL;
    return fabs(lr * (1 - settings.dampening) / (1 - settings.momentum));
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma;
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    if (terms & kHasMomentum) {
      T& buffer = states[0];
      buffer = terms & kFirst ? d : fma(c.one_minus_dampening, d, buffer * c.momentum);
      d = terms & kIsNesterov ? fma(c.momentum, buffer, d) : buffer;
    }
    param = fma(c.negative_lr, d, param);
  }
};

}  // namespace fastclip
