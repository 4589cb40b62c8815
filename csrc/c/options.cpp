// All that the settings of a plan say.
#include "options.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fastclip {

Rules::Id rule_named(const char* name) {
  std::optional<Rules::Id> rule;
  Rules::find(
      [&](auto tag) {
        using R = typename decltype(tag)::Rule;
        return name && !R::kClipsInPlace && !R::kNeedsProducts && std::strcmp(name, R::kName) == 0;
      },
      [&](Rules::Id id) { rule.emplace(id); });
  if (!rule) refuse("there is no optimizer ", name ? name : "without a name");
  return *rule;
}

DType dtype_of(double number) {
  if (!(number >= 0 && number < kNumDTypes && number == std::floor(number))) refuse("there is no such dtype");
  return static_cast<DType>(static_cast<int>(number));
}

namespace {

void read_clips(const Settings& settings, Options& options) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (settings.has("clip_value") && (settings.has("clip_low") || settings.has("clip_high"))) {
    refuse("clip_value is given together with clip_low or clip_high");
  }
  const double clip = settings.non_negative_or("clip_value", kInfinity);
  options.hyper.clip_low = settings.number_or("clip_low", -clip);
  options.hyper.clip_high = settings.number_or("clip_high", clip);
  if (!(options.hyper.clip_low <= options.hyper.clip_high)) refuse("clip_low is above clip_high");
  const double norm_type = settings.number_or("norm_type", 2);
  if (norm_type != 2 && norm_type != kInfinity) refuse("norm_type must be 2 or infinite");
  if (settings.has("max_norm")) {
    options.limits.max_norm.kind = NormLimit::Kind::number;
    options.limits.max_norm.ceiling = settings.non_negative_or("max_norm", kInfinity);
    options.norm = norm_type == 2 ? Norm::two : Norm::inf;
  }
  options.skip_nonfinite = settings.flag(Settings::Key("skip_nonfinite"));
  // Looking for inf and NaN is taking the inf norm, and clipping nothing.
  if (options.skip_nonfinite && options.norm == Norm::none) options.norm = Norm::inf;
}

}  // namespace

Options read(const Settings& settings, Rules::Id rule, const char* optimizer) {
  Options options;
  Hyper& hyper = options.hyper;
  hyper.lr = settings.number(Settings::Key("lr"));
  hyper.weight_decay = settings.non_negative_or("weight_decay", 0);
  hyper.maximize = settings.flag(Settings::Key("maximize"));
  read_clips(settings, options);
  if (needs_norm(rule)) {  // of each tensor, whatever else looks at norms
    if (settings.number_or("norm_type", 2) != 2) refuse(optimizer, " needs norm_type 2");
    options.norm = Norm::two;
  }
  hyper.stochastic_rounding = settings.flag(Settings::Key("stochastic_rounding"));
  const double seed = settings.non_negative_or("rounding_seed", 0);
  if (seed > UINT32_MAX || seed != std::floor(seed)) refuse("rounding_seed must be a whole number below 2^32");
  hyper.rounding_seed = static_cast<uint32_t>(seed);
  if (settings.has("momentum_dtype")) options.momentum_dtype = dtype_of(settings.number_or("momentum_dtype", 0));
  if (options.momentum_dtype == DType::float64) refuse("momentum_dtype must be float32, bfloat16 or float16");
  Rules::visit(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    typename R::Settings own{};
    R::read(settings, own);
    const bool has_momentum = std::any_of(R::kStates.begin(), R::kStates.end(), [](auto& s) { return s.is_momentum; });
    if (!has_momentum && options.momentum_dtype) refuse("momentum_dtype: ", optimizer, " keeps no momentum");
    hyper.terms = R::terms(hyper, own);
    new (hyper.settings) typename R::Settings(own);
    options.measures_deltas = measured_of(rule, hyper) != 0;
    options.arrays = R::writes(hyper.terms);
    options.counts = R::kCountsSteps || hyper.stochastic_rounding;
    options.new_value = R::new_value(own);
  });
  if (options.measures_deltas && options.norm == Norm::none) options.norm = Norm::two;
  settings.check_known(optimizer);
  const bool nesterov = settings.number_or("nesterov", 0) != 0;
  if (nesterov && (settings.number_or("momentum", 0) == 0 || settings.number_or("dampening", 0) != 0)) {
    refuse("nesterov needs a momentum, and no dampening");
  }
  if (settings.number_or("rho", 0) > 1) refuse("rho is above 1");
  return options;
}

}  // namespace fastclip
