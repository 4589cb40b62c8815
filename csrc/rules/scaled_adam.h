// ScaledAdam (Yao et al., 2023, https://arxiv.org/abs/2310.11230), as in icefall's zipformer: Adam whose steps are as
// large as the root mean square of their tensor, and which learns that size by itself.
#pragma once

#include "rule.h"
#include "weighted_clip.h"

namespace fastclip {

struct ScaledAdam {
  static constexpr const char* kName = "scaled_adam";
  static constexpr std::array kStates = {StateArray{"delta", true}, StateArray{"exp_avg_sq", false}};
  // A row: the size of the parameter, the average of squared derivatives by it, and the derivatives of the last steps.
  static constexpr Scalar kScalar = {"sizes", 0};
  static constexpr bool kCountsSteps = true;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = false;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = true;
  static constexpr bool kNeedsProducts = true;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {2};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = false;

  struct Settings {
    double beta1;
    double beta2;
    double eps;
    double scalar_lr_scale;
    double param_min_rms;
    double param_max_rms;
    double scalar_max;
    double size_update_period;
    double clipping_scale;  // 0 without a clip
    double clipping_update_period;
  };
  template <class Group>
  static void read(const Group& group, Settings& settings) {
    static const typename Group::Key kBetas("betas"), kEps("eps"), kScalarLrScale("scalar_lr_scale"),
        kParamMinRms("param_min_rms"), kParamMaxRms("param_max_rms"), kScalarMax("scalar_max"),
        kSizeUpdatePeriod("size_update_period"), kClippingScale("clipping_scale"),
        kClippingUpdatePeriod("clipping_update_period");
    group.betas(kBetas, settings.beta1, settings.beta2);
    settings.eps = group.number(kEps);
    settings.scalar_lr_scale = group.number(kScalarLrScale);
    settings.param_min_rms = group.number(kParamMinRms);
    settings.param_max_rms = group.number(kParamMaxRms);
    settings.scalar_max = group.number(kScalarMax);
    settings.size_update_period = group.count(kSizeUpdatePeriod);
    settings.clipping_scale = group.number_or_none(kClippingScale, 0);
    settings.clipping_update_period = group.count(kClippingUpdatePeriod);
  }
  static double new_value(const Settings&) { return 0; }

  static constexpr int kSwitches = 1;
  static Terms terms(const SharedHyper&, const Settings&) { return 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms) { return 0; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 3; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 3; }

  FASTCLIP_HD static WeightedClip clip(const Settings& settings) {
    return {settings.clipping_scale, static_cast<int32_t>(settings.clipping_update_period)};
  }
  // Of a tensor's norm in that of its group. Steps are as large.
  FASTCLIP_HD static double weight(const Settings& settings, double numel, double size) {
    return numel == 1 ? settings.scalar_lr_scale : size;
  }

  // ---- the size of a tensor

  FASTCLIP_HD static int64_t numbers(const Settings& settings) {
    return 2 + static_cast<int64_t>(settings.size_update_period);
  }
  // Whether the size changes in this step; and where the derivative of this step stands in the row.
  FASTCLIP_HD static bool is_due(const Settings& settings, const Progress& at) {
    return place(settings, at) == numbers(settings) - 1;
  }
  FASTCLIP_HD static int place(const Settings& settings, const Progress& at) {
    return 2 + static_cast<int>(static_cast<int64_t>(at.step - 1) % static_cast<int64_t>(settings.size_update_period));
  }
  FASTCLIP_HD static double size(const Settings& settings, const Progress& at) {
    const bool measured = at.step == 1 || is_due(settings, at);
    return measured ? at.stored(at.numel > 0 ? sqrt(at.param_squared / at.numel) : 0) : at.scalar;
  }
  // Returns the average of squares of derivatives, over the periods; and the sum of derivatives of this one.
  FASTCLIP_HD static double next_average(const Settings& settings, const Progress& at, double& sum) {
    double squares = 0;
    sum = 0;
    for (int i = 2; i < numbers(settings); ++i) {
      const double derivative = at.stored(i == place(settings, at) ? at.param_times_grad : at.number(i));
      squares += derivative * derivative;
      sum += derivative;
    }
    const double decay = pow(settings.beta2, settings.size_update_period);
    return at.number(1) * decay + squares / settings.size_update_period * (1 - decay);
  }
  // Returns the change of the size, relative to it.
  FASTCLIP_HD static double size_step(const Settings& settings, double lr, const Progress& at) {
    if (!is_due(settings, at) || at.step == 1 || at.numel == 1) return 0;
    const double size_now = size(settings, at);
    if (size_now < settings.param_min_rms) return 0;
    double sum;
    const double average = next_average(settings, at, sum);
    const double correction = 1 - pow(settings.beta2, at.step);  // of whole periods
    const double step = -lr * settings.scalar_lr_scale * sqrt(correction) * sum / (sqrt(average) + settings.eps);
    const double bounded = step < -0.1 ? -0.1 : step > 0.1 ? 0.1 : step;
    const double room = (settings.param_max_rms - size_now) / size_now;
    return room < bounded ? room : bounded;
  }
  template <class Store>
  FASTCLIP_HD static void next_numbers(const Settings& settings, const Progress& at, const Store& store) {
    if (at.numel == 1) return;
    double sum;
    if (is_due(settings, at) && at.step > 1) store(1, next_average(settings, at, sum));
    store(0, size(settings, at));
    store(place(settings, at), at.param_times_grad);
  }
  FASTCLIP_HD static double next_scalar(const Settings& settings, const Progress& at) { return size(settings, at); }

  // ---- the update

  template <class T>
  struct Constants {
    T negative_lr;
    T size;  // and 1 for a scalar
    T size_step;
    T beta1;
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
    T inverse_correction;
    T eps;
    T largest;
  };
  FASTCLIP_HD static Constants<double> constants(const SharedHyper&, const Settings& settings, double lr,
                                                 const Progress& at) {
    const bool is_scalar = at.numel == 1;
    const double size_now = is_scalar ? 1 : size(settings, at);
    const double correction = 1 - pow(settings.beta2, at.step);
    return {is_scalar ? -lr * settings.scalar_lr_scale : -lr,
            is_scalar || size_now > settings.param_min_rms ? size_now : settings.param_min_rms,
            size_step(settings, lr, at),
            settings.beta1,
            1 - settings.beta1,
            settings.beta2,
            1 - settings.beta2,
            correction < 0.99 ? 1 / correction : 1,
            settings.eps,
            is_scalar ? settings.scalar_max : HUGE_VAL};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms, const Constants<T>& c, T& param, T d, T* states) {
    using std::fma, std::sqrt;
    T& delta = states[0];
    T& exp_avg_sq = states[1];
    exp_avg_sq = fma(c.one_minus_beta2 * d, d, exp_avg_sq * c.beta2);
    const T denominator = sqrt(exp_avg_sq * c.inverse_correction) + c.eps;
    T change = c.negative_lr * d / denominator * c.size;
    change = c.size_step != 0 ? fma(param, c.size_step, change) : change;  // 0 times inf is NaN
    delta = fma(c.one_minus_beta1, change, delta * c.beta1);
    param = param + delta;
    param = param < -c.largest ? -c.largest : param > c.largest ? c.largest : param;
  }
};

}  // namespace fastclip
