// torch.optim.RMSprop (Hinton, 2012), with momentum and centered.
#pragma once

#include "rule.h"

namespace fastclip {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr std::array kStates = {StateArray{"square_avg", false}, StateArray{"momentum_buffer", true},
                                         StateArray{"grad_avg", false}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {3};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double alpha;
    double eps;
    double momentum;
    bool centered;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kAlpha("alpha"), kEps("eps"), kMomentum("momentum"), kCentered("centered");
    settings.alpha = group.number(kAlpha);
    settings.eps = group.number(kEps);
    settings.momentum = group.number(kMomentum);
    settings.centered = group.flag(kCentered);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kHasMomentum = 2, kIsCentered = 4, kWeightDecay = 8;
  static constexpr int kSwitches = 4;
  static Terms terms(const SharedHyper& hyper, const Settings& settings) {
    return (settings.momentum > 0 ? kHasMomentum : 0) | (settings.centered ? kIsCentered : 0) |
           (hyper.weight_decay != 0 ? kWeightDecay : 0);
  }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms terms) {
    return 1 | (terms & kHasMomentum ? 2 : 0) | (terms & kIsCentered ? 4 : 0);
  }
  FASTCLIP_HD static constexpr uint32_t writes(Terms terms) { return reads(terms); }

  template <class T>
  struct Constants {
    T negative_lr;
    T weight_decay;
    T alpha;
    T one_minus_alpha;
    T eps;
    T momentum;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress&) {
    return {-lr, hyper.weight_decay, settings.alpha, 1 - settings.alpha, settings.eps, settings.momentum};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma, std::sqrt;
    T& square_avg = states[0];
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    square_avg = fma(c.one_minus_alpha * d, d, square_avg * c.alpha);
    T variance = square_avg;
    if (terms & kIsCentered) {
      T& grad_avg = states[2];
      grad_avg = lerp(grad_avg, d, c.one_minus_alpha);
      variance = fma(-grad_avg, grad_avg, square_avg);
    }
    const T average = sqrt(variance) + c.eps;
    if (terms & kHasMomentum) {
      T& buffer = states[1];
      buffer = buffer * c.momentum + d / average;
      param = fma(c.negative_lr, buffer, param);
    } else {
      param = param + c.negative_lr * d / average;
    }
  }
};

}  // namespace fastclip
