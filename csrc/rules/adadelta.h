// torch.optim.Adadelta (Zeiler, 2012).
#pragma once

#include "rule.h"

namespace fastclip {

struct Adadelta {
  static constexpr const char* kName = "adadelta";
  static constexpr std::array kStates = {StateArray{"square_avg", false}, StateArray{"acc_delta", false}};
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
    double rho;
    double eps;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kRho("rho"), kEps("eps");
    settings.rho = group.number(kRho);
    settings.eps = group.number(kEps);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr Terms kWeightDecay = 2;
  static constexpr int kSwitches = 2;
  static Terms terms(const SharedHyper& hyper, const Settings&) { return hyper.weight_decay != 0 ? kWeightDecay : 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms terms) { return terms & ~kFirst; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 3; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 3; }

  template <class T>
  struct Constants {
    T negative_lr;
    T weight_decay;
    T rho;
    T one_minus_rho;
    T eps;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper& hyper, const Settings& settings, double lr,
                                                 const Progress&) {
    return {-lr, hyper.weight_decay, settings.rho, 1 - settings.rho, settings.eps};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma, std::sqrt;
    T& square_avg = states[0];
    T& acc_delta = states[1];
    if (terms & kWeightDecay) d = fma(c.weight_decay, param, d);
    square_avg = fma(c.one_minus_rho * d, d, square_avg * c.rho);
    const T delta = sqrt(acc_delta + c.eps) / sqrt(square_avg + c.eps) * d;
    acc_delta = fma(c.one_minus_rho * delta, delta, acc_delta * c.rho);
    param = fma(c.negative_lr, delta, param);
  }
};

}  // namespace fastclip
