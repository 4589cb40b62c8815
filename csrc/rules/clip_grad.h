// No optimizer: it writes the clipped gradient back, as torch.nn.utils.clip_grad_value_ and clip_grad_norm_ do.
#pragma once

#include "rule.h"

namespace fastclip {

struct ClipGrad {
  static constexpr const char* kName = "clip_grad";
  static constexpr std::array<StateArray, 0> kStates = {};
  static constexpr Scalar kScalar = kNoScalar;
  static constexpr bool kCountsSteps = false;
  static constexpr bool kFilledByFirstStep = false;
  static constexpr bool kClipsInPlace = true;
  static constexpr bool kLimitsChange = false;
  static constexpr bool kNeedsNorm = false;
  static constexpr bool kNeedsProducts = false;
  static constexpr bool kMeasuresDelta = false;
  static constexpr int kKernels[] = {0};
  static constexpr bool kQuantizesStates = false;
  static constexpr bool kIsCommon = true;

  struct Settings {};
  template <class Group>
  static void read(const Group&, Settings&) {}
  static double new_value(const Settings&) { return 0; }

  static constexpr int kSwitches = 1;
  static Terms terms(const SharedHyper&, const Settings&) { return 0; }
  FASTCLIP_HD static constexpr Terms canonical(Terms) { return 0; }
  FASTCLIP_HD static constexpr uint32_t reads(Terms) { return 0; }
  FASTCLIP_HD static constexpr uint32_t writes(Terms) { return 0; }

  template <class T>
  struct Constants {};
  FASTCLIP_HD static Constants<double> constants(const SharedHyper&, const Settings&, double, const Progress&) {
    return {};
  }

  template <class T>
  FASTCLIP_HD static void update(Terms, const Constants<T>&, T& grad, T clipped, T*) {
    grad = clipped;
  }
};

}  // namespace fastclip
