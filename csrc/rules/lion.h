// Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675): the sign of an interpolated momentum.
#pragma once

#include "rule.h"

namespace fastclip {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = false;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {1};
  static constexpr bool kQuantizesStates = true;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double beta1;
    double beta2;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas");
    group.betas(kBetas, settings.beta1, settings.beta2);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr int kSwitches = 1;
  static Terms terms(const SharedHyper&, const Settings&) { return 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms) { return 0; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 1; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 1; }

  template <class T>
  struct Constants {
    T negative_lr;
    T decay;
    T beta1;
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress&) {
    return {-lr, 1 - lr * hyper.weight_decay, settings.beta1, 1 - settings.beta1, settings.beta2, 1 - settings.beta2};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma;
    T& exp_avg = states[0];
    const T direction = fma(c.one_minus_beta1, d, exp_avg * c.beta1);
    const T sign = T(direction > T(0)) - T(direction < T(0));  // 0 for a NaN, as in torch.sign
    param = fma(c.negative_lr, sign, param * c.decay);
    exp_avg = fma(c.one_minus_beta2, d, exp_avg * c.beta2);
  }
};

}  // namespace fastclip
