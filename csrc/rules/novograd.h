// NovoGrad (Ginsburg et al., 2019, https://arxiv.org/abs/1905.11286), as in NeMo: a second moment for each tensor.
#pragma once

#include "rule.h"

namespace fastclip {

struct NovoGrad {
  static constexpr const char* kName = "novograd";
  static constexpr std::array kStates = {StateArray{"exp_avg", true}};
  static constexpr Scalar kScalar = {"exp_avg_sq", 0};  // the average of the squared norms
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = true;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {1};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double beta1;
    double beta2;
    double eps;
    bool grad_averaging;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kGradAveraging("grad_averaging");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.grad_averaging = group.flag(kGradAveraging);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kWeightDecay = 2;
  static constexpr int kSwitches = 2;
  static Terms terms(const SharedHyper& hyper, const Settings&) { return hyper.weight_decay != 0 ? kWeightDecay : 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 1; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 1; }

  // The first norm that is not 0 begins the average.
  FASTCLIP_HD static double next_scalar(const Settings& settings, const Progress& at) {
    const double square = at.norm * at.norm;
    const double next = at.scalar == 0 ? square : settings.beta2 * at.scalar + (1 - settings.beta2) * square;
    return at.scalar_is_float64 ? next : static_cast<float>(next);
  }

  template <class T>
  struct Constants {
    T negative_lr;
    T denominator;
    T weight_decay;
    T weight;  // of a gradient in the average
    T beta1;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    return {-lr, sqrt(next_scalar(settings, at)) + settings.eps, hyper.weight_decay,
            settings.grad_averaging ? 1 - settings.beta1 : 1.0, settings.beta1};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma;
    T& exp_avg = states[0];
    d = d / c.denominator;
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    exp_avg = exp_avg * c.beta1 + d * c.weight;
    param = fma(c.negative_lr, exp_avg, param);
  }
};

}  // namespace fastclip
