// torch.optim.Adagrad (Duchi et al., 2011).
#pragma once

#include "rule.h"

namespace fastclip {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr std::array kStates = {StateArray{"sum", false}};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {1};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double lr_decay;
    double eps;
    double initial_accumulator_value;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kLrDecay("lr_decay"), kEps("eps"), kInitial("initial_accumulator_value");
    settings.lr_decay = group.number(kLrDecay);
    settings.eps = group.number(kEps);
    settings.initial_accumulator_value = group.number(kInitial);
  }
  static double new_value(const Settings& settings) { return settings.initial_accumulator_value; }

  static constexpr Terms kWeightDecay = 2;
  static constexpr int kSwitches = 2;
  static Terms terms(const SharedHyper& hyper, const Settings&) { return hyper.weight_decay != 0 ? kWeightDecay : 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 1; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 1; }

  template <class T>
  struct Constants {
    T negative_lr;
    T weight_decay;
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress& at) {
    return {-(lr / (1 + (at.step - 1) * settings.lr_decay)), hyper.weight_decay, settings.eps};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma, std::sqrt;
    T& sum = states[0];
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    sum = fma(d, d, sum);
    param = param + c.negative_lr * d / (sqrt(sum) + c.eps);
  }
};

}  // namespace fastclip
