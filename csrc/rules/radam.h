// torch.optim.RAdam (Liu et al., 2019): Adam whose step size is rectified while few steps were taken.
#pragma once

#include "rule.h"

namespace fastclip {

struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}, StateArray{"exp_avg_sq", false}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {2};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double beta1;
    double beta2;
    double eps;
    bool decoupled_weight_decay;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kDecoupled("decoupled_weight_decay");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.decoupled_weight_decay = group.flag(kDecoupled);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kWeightDecay = 2;  // the decay that is added to the gradient
  static constexpr int kSwitches = 2;
  static Terms terms(const SharedHyper& hyper, const Settings& settings) {
    return hyper.weight_decay != 0 && !settings.decoupled_weight_decay ? kWeightDecay : 0;
  }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 3; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 3; }

  template <class T>
  struct Constants {
    T lr;
    T weight_decay;
    T decay;  // decoupled: a factor of the parameter
    T lerp_weight;
    T beta2;
    T one_minus_beta2;
    T bias_correction1;
    T bias_correction2_sqrt;
    T rectification;  // 0 while too little is known of the variance: the step is then momentum's
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    const double correction2 = 1 - pow(settings.beta2, at.step);
    const double rho_inf = 2 / (1 - settings.beta2) - 1;
    const double rho = rho_inf - 2 * at.step * pow(settings.beta2, at.step) / correction2;
    const double ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho);
    return {lr,
            hyper.weight_decay,
            settings.decoupled_weight_decay ? 1 - lr * hyper.weight_decay : 1.0,
            1 - settings.beta1,
            settings.beta2,
            1 - settings.beta2,
            1 - pow(settings.beta1, at.step),
            pow(correction2, 0.5),
            rho > 5 ? pow(ratio, 0.5) : 0,
            settings.eps};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma, std::sqrt;
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    param = param * c.decay;
    exp_avg = lerp(exp_avg, d, c.lerp_weight);
    exp_avg_sq = fma(c.one_minus_beta2 * d, d, exp_avg_sq * c.beta2);
    const T step = exp_avg / c.bias_correction1 * c.lr;
    const T adaptive = T(1) / (sqrt(exp_avg_sq) + c.eps) * c.bias_correction2_sqrt;
    param = param - (c.rectification != T(0) ? step * adaptive * c.rectification : step);
  }
};

}  // namespace fastclip
