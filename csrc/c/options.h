// All that the settings of a plan say.
#pragma once

#include <optional>

#include "settings.h"

namespace fastclip {

struct Options {
  Hyper hyper{};
  Norm norm = Norm::none;
  Limits limits;
  bool skip_nonfinite = false;
  std::optional<DType> momentum_dtype;
  uint32_t arrays = 0;  // the state arrays that a tensor has, as bits
  bool measures_deltas = false;  // what a step adds is measured before it
  bool counts = false;  // whether it has a `step`
  double new_value = 0;  // of a new state array
};

Rules::Id rule_named(const char* name);
DType dtype_of(double number);

// Reads and checks them. Throws Refused, as both above do.
Options read(const Settings& settings, Rules::Id rule, const char* optimizer);

}  // namespace fastclip
