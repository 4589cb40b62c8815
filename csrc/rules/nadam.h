// torch.optim.NAdam (Dozat, 2016): Adam with Nesterov's momentum.
#pragma once

#include "rule.h"

namespace fastclip {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}, StateArray{"exp_avg_sq", false}};
  static constexpr Scalar kScalar = {"mu_product", 1};  // the product of the momentum of all steps
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
    double momentum_decay;
    bool decoupled_weight_decay;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kMomentumDecay("momentum_decay"),
        kDecoupled("decoupled_weight_decay");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.momentum_decay = group.number(kMomentumDecay);
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

  // Returns the momentum of a step.
  FASTCLIP_HD static double momentum(const Settings& settings, double step) {
    return settings.beta1 * (1 - 0.5 * pow(0.96, step * settings.momentum_decay));
  }
  FASTCLIP_HD static double next_scalar(const Settings& settings, const Progress& at) {
    const double mu = momentum(settings, at.step);
    if (at.scalar_is_float64) return at.scalar * mu;
    return static_cast<float>(at.scalar) * static_cast<float>(mu);
  }

  template <class T>
  struct Constants {
    T grad_step_size;  // negative, like the next one
    T average_step_size;
    T weight_decay;
    T decay;  // decoupled: a factor of the parameter
    T lerp_weight;
    T beta2;
    T one_minus_beta2;
    T bias_correction2;
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    const double mu = momentum(settings, at.step), mu_next = momentum(settings, at.step + 1);
    const double mu_product = next_scalar(settings, at);
    return {-lr * (1 - mu) / (1 - mu_product),
            -lr * mu_next / (1 - mu_product * mu_next),
            hyper.weight_decay,
            settings.decoupled_weight_decay ? 1 - lr * hyper.weight_decay : 1.0,
            1 - settings.beta1,
            settings.beta2,
            1 - settings.beta2,
            1 - pow(settings.beta2, at.step),
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
    const T denominator = sqrt(exp_avg_sq / c.bias_correction2) + c.eps;
    param = param + c.grad_step_size * d / denominator;
    param = param + c.average_step_size * exp_avg / denominator;
  }
};

}  // namespace fastclip
