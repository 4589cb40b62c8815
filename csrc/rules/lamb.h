// LAMB (You et al., 2019, https://arxiv.org/abs/1904.00962), as apex's FusedLAMB: Adam whose steps are as large as the
// norm of their tensor.
#pragma once

#include "delta.h"
#include "rule.h"

namespace fastclip {

struct LAMB {
  static constexpr const char* kName = "lamb";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}, StateArray{"exp_avg_sq", false}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = true;
  static constexpr int kKernels[] = {2};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double beta1;
    double beta2;
    double eps;
    double max_update_rms;
    bool bias_correction;
    bool grad_averaging;
    bool adam_w_mode;
    bool use_nvlamb;  // scales by the norm of the tensor also without a weight decay
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kBiasCorrection("bias_correction"),
        kGradAveraging("grad_averaging"), kAdamWMode("adam_w_mode"), kUseNvlamb("use_nvlamb"),
        kMaxUpdateRms("max_update_rms");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.max_update_rms = group.number_or_none(kMaxUpdateRms, HUGE_VAL);
    settings.bias_correction = group.flag(kBiasCorrection);
    settings.grad_averaging = group.flag(kGradAveraging);
    settings.adam_w_mode = group.flag(kAdamWMode);
    settings.use_nvlamb = group.flag(kUseNvlamb);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kDecay = 2, kDecaysGradient = 4;
  static constexpr int kSwitches = 3;
  static Terms terms(const SharedHyper& hyper, const Settings& settings) {
    if (hyper.weight_decay == 0) return 0;
    return settings.adam_w_mode ? kDecay : kDecaysGradient;
  }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) {
    return terms & kDecaysGradient ? kDecaysGradient : terms & kDecay;
  }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 3; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 3; }

  template <class T>
  struct Constants {
    T negative_lr;
    T weight_decay;
    T beta1;
    T weight;  // of a gradient in the average
    T beta2;
    T one_minus_beta2;
    T inverse_correction1;
    T bias_correction2_sqrt;
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    const bool corrects = settings.bias_correction;
    return {-lr,
            hyper.weight_decay,
            settings.beta1,
            settings.grad_averaging ? 1 - settings.beta1 : 1.0,
            settings.beta2,
            1 - settings.beta2,
            corrects ? 1 / (1 - pow(settings.beta1, at.step)) : 1.0,
            corrects ? sqrt(1 - pow(settings.beta2, at.step)) : 1.0,
            settings.eps};
  }

  template <class T>
  FASTCLIP_HD static T delta(Terms terms, const Constants<T>& c, T param, T& d, T* states) {
    using std::fma, std::sqrt;
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    if (terms & kDecaysGradient) d = fma(c.weight_decay, param, d);
    exp_avg = exp_avg * c.beta1 + d * c.weight;
    exp_avg_sq = fma(c.one_minus_beta2 * d, d, exp_avg_sq * c.beta2);
    T direction = exp_avg * c.inverse_correction1 / (sqrt(exp_avg_sq) / c.bias_correction2_sqrt + c.eps);
    if (terms & kDecay) direction = fma(c.weight_decay, param, direction);
    return c.negative_lr * direction;
  }
  FASTCLIP_HD static constexpr bool delta_reads_param(Terms terms) { return terms & (kDecay | kDecaysGradient); }

  template <class T>
  FASTCLIP_HD static T relative(const Constants<T>& c, T d, const T* states) {
    return relative_gradient(d, states[1], c.bias_correction2_sqrt, c.eps);
  }
  FASTCLIP_HD static bool scales(const SharedHyper& hyper, const Settings& settings) {
    return settings.use_nvlamb || hyper.weight_decay != 0;
  }
  FASTCLIP_HD static DeltaParts measured(const SharedHyper& hyper, const Settings& settings) {
    return (scales(hyper, settings) ? kDelta | kParam : 0) | (settings.max_update_rms < HUGE_VAL ? kRelative : 0);
  }
  // A tensor of zeros, and an update of zeros, leave the learning rate as it is.
  FASTCLIP_HD static double lr_factor(const SharedHyper& hyper, const Settings& settings, double numel,
                                      const DeltaNorms& norms) {
    const bool is_scaled = scales(hyper, settings) && norms.param != 0 && norms.delta != 0 && hyper.lr != 0;
    const double trust = is_scaled ? norms.param / (norms.delta / fabs(hyper.lr)) : 1;
    return trust * factor_to_rms(settings.max_update_rms, norms.relative, numel);
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    param = param + delta(terms, c, param, d, states);
  }
};

}  // namespace fastclip
