// torch.optim.Adam, and AdamW by `decoupled_weight_decay`.
#pragma once

#include "delta.h"
#include "rule.h"

namespace fastclip {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}, StateArray{"exp_avg_sq", false},
                                         StateArray{"max_exp_avg_sq", false}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = true;
  static constexpr int kKernels[] = {2, 3};
  static constexpr bool kQuantizesStates = true;
  static constexpr bool kIsCommon = true;

  struct Settings {
    double beta1;
    double beta2;
    double eps;
    double max_update_rms;
    bool amsgrad;
    bool decoupled_weight_decay;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kAmsgrad("amsgrad"),
        kDecoupled("decoupled_weight_decay"), kMaxUpdateRms("max_update_rms");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.max_update_rms = group.number_or_none(kMaxUpdateRms, HUGE_VAL);
    settings.amsgrad = group.flag(kAmsgrad);
    settings.decoupled_weight_decay = group.flag(kDecoupled);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kIsAmsgrad = 2, kWeightDecay = 4;  // the decay that is added to the gradient
  static constexpr int kSwitches = 3;
  static Terms terms(const SharedHyper& hyper, const Settings& settings) {
    return (settings.amsgrad ? kIsAmsgrad : 0) |
           (hyper.weight_decay != 0 && !settings.decoupled_weight_decay ? kWeightDecay : 0);
  }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms terms) { return terms & kIsAmsgrad ? 7 : 3; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms terms) { return reads(terms); }

  template <class T>
  struct Constants {
    T negative_step_size;
    T weight_decay;
    T decay;  // decoupled: a factor of the parameter. 1 without it, which changes no bits
    T lerp_weight;
    T beta2;
    T one_minus_beta2;
    T bias_correction2_sqrt;
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    return {-(lr / (1 - pow(settings.beta1, at.step))),
            hyper.weight_decay,
            settings.decoupled_weight_decay ? 1 - lr * hyper.weight_decay : 1.0,
            1 - settings.beta1,
            settings.beta2,
            1 - settings.beta2,
            pow(1 - pow(settings.beta2, at.step), 0.5),
            settings.eps};
  }

  template <class T>
  FASTCLIP_HD static T delta(Terms terms, const Constants<T>& c, T param, T& d, T* states) {
    using std::fma, std::sqrt;  // for T, not for double
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    exp_avg = lerp(exp_avg, d, c.lerp_weight);
    exp_avg_sq = fma(c.one_minus_beta2 * d, d, exp_avg_sq * c.beta2);
    T square = exp_avg_sq;
    if (terms & kIsAmsgrad) {
      T& largest = states[2];
      largest = square > largest || square != square ? square : largest;  // NaN stays, as in torch.maximum
      square = largest;
    }
    const T denominator = sqrt(square) / c.bias_correction2_sqrt + c.eps;
    return c.negative_step_size * exp_avg / denominator;
  }
  FASTCLIP_HD static constexpr bool delta_reads_param(Terms terms) { return terms & kWeightDecay; }

  template <class T>
  FASTCLIP_HD static T relative(const Constants<T>& c, T d, const T* states) {
    return relative_gradient(d, states[1], c.bias_correction2_sqrt, c.eps);
  }
  FASTCLIP_HD static DeltaParts measured(const SharedHyper&, const Settings& settings) {
    return settings.max_update_rms < HUGE_VAL ? kRelative : 0;
  }
  FASTCLIP_HD static double lr_factor(const SharedHyper&, const Settings& settings, double numel,
                                      const DeltaNorms& norms) {
    return factor_to_rms(settings.max_update_rms, norms.relative, numel);
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    const T added = delta(terms, c, param, d, states);
    param = param * c.decay + added;
  }
};

}  // namespace fastclip
