// Reads an optimizer's param_groups: hyperparameters, checked, and the clip they ask for.
#include "groups.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <new>
#include <utility>

#include "norm_limits.h"
#include "reasons.h"

namespace fastclip {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Refuses the value of a setting; `where` is " in param_groups[1]", or "".
[[noreturn]] void refuse_setting(const char* reason, const char* name, const std::string& where, PyObject* value) {
  raise_refusal(reason, {object_of(name + where), object_of(value)});
}

// Numbers as torch takes them: float, int, numpy scalars, one-element tensors. Not bool strings, not
// str, though float("0.1") would work: torch would fail later, in the middle of a step.
std::optional<double> number_in(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number != -1.0 || !PyErr_Occurred()) return number;
  PyErr_Clear();
  return {};
}

double read_number(PyObject* value, const char* name, const std::string& where) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const Held held(value);
  const auto number = number_in(value);
  if (!number) refuse_setting("not_a_number", name, where, value);
  return *number;
}

double non_negative(double number, PyObject* value, const char* name, const std::string& where) {
  if (!(number >= 0)) refuse_setting("negative", name, where, value);
  return number;
}

bool is_sequence(PyObject* value) {
  return (PySequence_Check(value) && !PyUnicode_Check(value)) || THPVariable_Check(value);
}

// The items of a tuple, a list, or another sequence of two: an array, a tensor, a configuration's list. `where()` is
// built only where it is none.
template <class Where>
std::pair<Held, Held> read_pair(PyObject* value, const char* name, const char* expected, const Where& where) {
  const Held held(value);
  const Held items = Held::stolen(is_sequence(value) ? PySequence_Fast(value, "") : nullptr);
  PyErr_Clear();
  if (!items.object || PySequence_Fast_GET_SIZE(items.object) != 2) {
    raise(PyExc_ValueError, name, where(), " must be ", expected, ", got ", repr(value));
  }
  return {Held(PySequence_Fast_GET_ITEM(items.object, 0)), Held(PySequence_Fast_GET_ITEM(items.object, 1))};
}

uint32_t read_seed(PyObject* value, const std::string& where) {
  const Held held(value);
  const unsigned long long seed = PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : ULLONG_MAX;
  PyErr_Clear();
  if (seed > UINT32_MAX) {
    raise(PyExc_ValueError, "rounding_seed", where, " must be an int from 0 to 2**32 - 1, got ", repr(value));
  }
  return static_cast<uint32_t>(seed);
}

c10::ScalarType read_momentum_dtype(PyObject* value, const std::string& where) {
  if (THPDtype_Check(value)) {
    const auto dtype = reinterpret_cast<THPDtype*>(value)->scalar_type;
    if (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) return dtype;
  }
  raise(PyExc_ValueError, "momentum_dtype", where,
        " must be None, torch.float32, torch.bfloat16 or torch.float16, got ", repr(value));
}

// Returns whether states are kept in 8 bits.
bool read_state_bits(PyObject* value, const std::string& where) {
  const Held held(value);
  const long bits = PyLong_Check(value) ? PyLong_AsLong(value) : 0;
  PyErr_Clear();
  if (bits != 8 && bits != 32) raise(PyExc_ValueError, "state_bits", where, " must be 32 or 8, got ", repr(value));
  return bits == 8;
}

bool is_differentiable(PyObject* value) {
  return THPVariable_Check(value) && THPVariable_Unpack(value).requires_grad();
}

// Signs are checked where an optimizer is made, by torch. A step only refuses what would destroy the model: schedulers
// may end on a learning rate of -1e-19, and torch takes it.
class GroupReader {
 public:
  using Key = Name;
  bool differentiable = false;  // the caller wants gradients through the step

  GroupReader(PyObject* group, Py_ssize_t index) : group_(group), index_(index) {
    if (!PyDict_Check(group)) {
      raise_refusal("no_dict", {object_of(c10::str("param_groups[", index, "]")), object_of(group)});
    }
  }

  PyObject* optional(const Key& key) const {
    PyObject* value = PyDict_GetItemWithError(group_, key.object);
    if (!value && PyErr_Occurred()) throw PythonError{};
    return value;
  }

  PyObject* required(const Key& key) const {
    PyObject* value = optional(key);
    if (!value) raise(PyExc_KeyError, key.text, where(), " is missing");
    return value;
  }

  bool flag(const Key& key) const {
    PyObject* value = required(key);
    if (value == Py_False) return false;
    if (value == Py_True) return true;
    const Held held(value);
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw PythonError{};
    return truth;
  }

  double number(const Key& key) const { return checked_number(required(key), key.text); }

  double number_or_none(const Key& key, double none) const {
    PyObject* const value = required(key);
    return value == Py_None ? none : checked_number(value, key.text);
  }

  // A number of steps: whole, and at least 1.
  double count(const Key& key) const {
    constexpr double kLargest = 1 << 20;
    const double count = number(key);
    if (!(count >= 1 && count <= kLargest && count == std::floor(count))) {
      raise(PyExc_ValueError, key.text, where(), " must be a whole number of steps from 1 to 2**20, got ",
            repr(required(key)));
    }
    return count;
  }

  // With 1, the correction of the averages divides by 0.
  void betas(const Key& key, double& beta1, double& beta2) const {
    const auto [first, second] = read_pair(required(key), key.text, "a pair of numbers", [&] { return where(); });
    beta1 = beta(first.object, "betas[0]");
    beta2 = beta(second.object, "betas[1]");
  }

  // " in param_groups[1]"; built only where something is wrong.
  std::string where() const { return " in param_groups[" + std::to_string(index_) + "]"; }

 private:
  double checked_number(PyObject* value, const char* name) const {
    if (PyFloat_CheckExact(value) && !std::isnan(PyFloat_AS_DOUBLE(value))) return PyFloat_AS_DOUBLE(value);
    if (differentiable && is_differentiable(value)) return 0;  // plain torch reads it
    const double number = read_number(value, name, where());
    if (std::isnan(number)) raise(PyExc_ValueError, name, where(), " is NaN");
    return number;
  }
  double beta(PyObject* value, const char* name) const {
    const double beta = checked_number(value, name);
    if (!(beta >= 0 && beta < 1)) {
      raise(PyExc_ValueError, name, where(), " must be at least 0 and below 1, got ", repr(value));
    }
    return beta;
  }

  PyObject* group_;
  Py_ssize_t index_;
};

// The hyperparameters that only this rule has, and the switches that all together turn on.
template <class R>
void read_settings(const GroupReader& reader, Group& group) {
  typename R::Settings settings{};
  R::read(reader, settings);
  group.hyper.terms = R::terms(group.hyper, settings);
  new (group.hyper.settings) typename R::Settings(settings);
  constexpr bool kHasMomentum =
      std::any_of(R::kStates.begin(), R::kStates.end(), [](const auto& s) { return s.is_momentum; });
  if (!kHasMomentum && group.momentum_dtype) {
    raise(PyExc_ValueError, "momentum_dtype", reader.where(), " must be None: this optimizer keeps no momentum");
  }
  if (!R::kQuantizesStates && group.quantizes_states) {
    raise(PyExc_ValueError, "state_bits", reader.where(),
          " must be 32: SGD, Adam, AdamW and Lion have states in 8 bits");
  }
}

Norm read_norm_type(PyObject* norm_type, const std::string& where) {
  const Held held(norm_type);
  double order = 2;
  if (PyUnicode_Check(norm_type) && PyUnicode_CompareWithASCIIString(norm_type, "inf") == 0) {
    order = kInfinity;
  } else {
    order = read_number(norm_type, "norm_type", where);
  }
  if (order != 2 && order != kInfinity) {
    raise(PyExc_ValueError, "norm_type", where, " must be 2 or inf, got ", repr(norm_type));
  }
  return order == 2 ? Norm::two : Norm::inf;
}

Scope read_scope(PyObject* scope, const std::string& where) {
  constexpr std::pair<const char*, Scope> kScopes[] = {
      {"global", Scope::global}, {"group", Scope::group}, {"parameter", Scope::parameter}};
  for (const auto& [name, value] : kScopes) {
    if (PyUnicode_Check(scope) && PyUnicode_CompareWithASCIIString(scope, name) == 0) return value;
  }
  raise(PyExc_ValueError, "norm_scope", where, " must be 'global', 'group' or 'parameter', got ", repr(scope));
}

// Reads a limit, if it is set. Returns whether it is.
bool read_limit(PyObject* value, const char* name, const std::string& where, double& limit) {
  if (value == Py_None) return false;
  const Held held(value);
  limit = non_negative(read_number(value, name, where), value, name, where);
  return true;
}

// Reads a limit on the norm, if it is set: a number or a rule. Returns whether it is.
bool read_norm_limit(PyObject* group, const Name& key, PyObject* value, bool leaves_out, const std::string& where,
                     NormLimit& limit) {
  if (value == Py_None) return false;
  const Held held(value);
  const bool may_be_number = !PyDict_CheckExact(value);  // to try takes longer than all else here
  if (const auto number = may_be_number ? number_in(value) : std::nullopt) {
    limit.kind = NormLimit::Kind::number;
    limit.ceiling = non_negative(*number, value, key.text, where);
  } else {
    limit = read_rule(group, key, leaves_out, where);
  }
  return true;
}

// Reads the limits on a change, of which one is set.
ChangeLimits read_change_limits(PyObject* max_change, PyObject* max_relative_change, const std::string& where) {
  ChangeLimits limits;
  limits.measures_change = true;
  read_limit(max_change, "max_change", where, limits.max_change);
  limits.measures_params = read_limit(max_relative_change, "max_relative_change", where, limits.max_relative_change);
  return limits;
}

// Puts them where they belong: in a rule whose changes are multiples of gradients, these are scaled down; in one that
// measures what it adds, the learning rate.
void add_change_limits(const ChangeLimits& limits, const Name& name, const std::string& where, Rules::Id rule,
                       Group& group) {
  const bool by_gradient = Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kLimitsChange; });
  if (!by_gradient && !can_measure_delta(rule)) {
    raise(PyExc_ValueError, name.text, where, " can't be applied: fastclip.SGD, Adam, AdamW and LAMB alone have it");
  }
  NormClip& clip = group.norm_clip;
  if (by_gradient && change_of(rule, group.hyper, 1.0) == kInfinity) {
    raise(PyExc_ValueError, name.text, where, " needs a momentum below 1: the change of a gradient would have no end");
  }
  if (!by_gradient && clip.norm != Norm::two) {
    raise(PyExc_ValueError, "norm_type", where, " must be 2 beside ", name.text, " in this optimizer");
  }
  group.measures_deltas |= !by_gradient;
  if (clip.scope != Scope::global) {
    group.segment_change = limits;
  } else {
    (by_gradient ? static_cast<ChangeLimits&>(clip.limits) : clip.limits.on_delta) = limits;
  }
}

}  // namespace

void read_clip_value(PyObject* value, const std::string& where, double* low, double* high) {
  *low = -kInfinity;
  *high = kInfinity;
  if (value == Py_None) return;
  const Held held(value);
  if (const auto number = number_in(value)) {
    *high = non_negative(*number, value, "clip_value", where);
    *low = -*high;
    return;
  }
  if (!is_sequence(value)) refuse_setting("not_a_number", "clip_value", where, value);
  const auto [first, second] = read_pair(value, "clip_value", "a number or (low, high)", [&] { return where; });
  *low = read_number(first.object, "clip_value[0]", where);
  *high = read_number(second.object, "clip_value[1]", where);
  if (!(*low <= *high)) {  // refuses NaN, too
    raise(PyExc_ValueError, "clip_value", where, " must have low <= high, got ", repr(value));
  }
}

NormClip read_norm_clip(PyObject* max_norm, PyObject* norm_type, const std::string& where) {
  NormClip clip;
  const Held held(max_norm);
  const Norm norm = read_norm_type(norm_type, where);
  if (read_limit(max_norm, "max_norm", where, clip.limits.max_norm.ceiling)) {
    clip.limits.max_norm.kind = NormLimit::Kind::number;
    clip.norm = norm;
  }
  return clip;
}

Group read_group(PyObject* object, Py_ssize_t index, Rules::Id rule) {
  static const Name kParams("params"), kParamNames("param_names"), kLr("lr"), kWeightDecay("weight_decay"),
      kMaximize("maximize"), kDifferentiable("differentiable"), kClipValue("clip_value"), kMaxNorm("max_norm"),
      kNormType("norm_type"), kSkipNonfinite("skip_nonfinite"), kMasterWeights("master_weights"),
      kStochasticRounding("stochastic_rounding"), kRoundingSeed("rounding_seed"), kMomentumDtype("momentum_dtype"),
      kStateBits("state_bits"), kMaxChange("max_change"), kMaxRelativeChange("max_relative_change"),
      kSkipNorm("skip_norm"), kNormScope("norm_scope"), kGlobal("global"), kMaxUpdateRms("max_update_rms"),
      kNormReplicated("norm_replicated");
  GroupReader reader(object, index);
  Group group{};
  PyObject* params = reader.required(kParams);
  if (!PyList_Check(params) && !PyTuple_Check(params)) refuse_setting("no_list", "params", reader.where(), params);
  group.params = Held(params);
  PyObject* names = reader.optional(kParamNames);
  if (names && PyList_Check(names)) group.param_names = Held(names);

  PyObject* lr = reader.required(kLr);
  PyObject* weight_decay = reader.required(kWeightDecay);
  reader.differentiable = reader.optional(kDifferentiable) && reader.flag(kDifferentiable);
  for (PyObject* value : {lr, weight_decay}) {
    if (!PyFloat_CheckExact(value)) reader.differentiable |= is_differentiable(value);
  }
  group.differentiable = reader.differentiable;
  Hyper& hyper = group.hyper;
  if (!PyFloat_CheckExact(lr) && THPVariable_Check(lr) && !THPVariable_Unpack(lr).is_cpu()) {
    if (THPVariable_Unpack(lr).numel() != 1) refuse_setting("not_one_element", "lr", reader.where(), lr);
    group.lr_tensor = Held(lr);  // on a GPU: reading it here would wait for the device
  } else {
    hyper.lr = reader.number(kLr);
  }
  hyper.weight_decay = reader.number(kWeightDecay);
  hyper.maximize = reader.flag(kMaximize);

  PyObject* clip_value = reader.required(kClipValue);
  hyper.clip_low = -kInfinity;
  hyper.clip_high = kInfinity;
  if (clip_value != Py_None) {
    read_clip_value(clip_value, reader.where(), &hyper.clip_low, &hyper.clip_high);
  }
  PyObject* max_norm = reader.required(kMaxNorm);
  PyObject* norm_type = reader.required(kNormType);
  const bool two = PyFloat_CheckExact(norm_type) && PyFloat_AS_DOUBLE(norm_type) == 2;
  PyObject* skip_norm = reader.required(kSkipNorm);
  PyObject* const scope = reader.required(kNormScope);
  NormClip& clip = group.norm_clip;
  if (scope != kGlobal.object) clip.scope = read_scope(scope, reader.where());
  const bool scoped = clip.scope != Scope::global;
  clip.needs_norms = needs_norm(rule);
  if (clip.needs_norms && !two && read_norm_type(norm_type, reader.where()) != Norm::two) {
    raise(PyExc_ValueError, "norm_type", reader.where(), " must be 2 in this optimizer, whose updates take that norm");
  }
  if (clip.needs_norms && clip.scope == Scope::group) {
    raise(PyExc_ValueError, "norm_scope", reader.where(),
          " must be 'global' or 'parameter': this rule has a norm for each parameter by itself");
  }
  NormLimit& limit_of_norm = scoped ? group.segment_limit : clip.limits.max_norm;
  if (max_norm != Py_None || skip_norm != Py_None || !two || scoped) {
    const std::string where = reader.where();
    const Norm norm = read_norm_type(norm_type, where);
    const bool clips = read_norm_limit(object, kMaxNorm, max_norm, false, where, limit_of_norm);
    const bool skips = read_norm_limit(object, kSkipNorm, skip_norm, true, where, clip.limits.skip_norm);
    if (clips || skips || scoped) clip.norm = norm;
  }
  clip.skip_nonfinite = reader.flag(kSkipNonfinite);
  group.norm_replicated = reader.flag(kNormReplicated);
  // The norm of one parameter concerns no other.
  const bool needs_finite = limit_of_norm.is_rule() && clip.scope != Scope::parameter;
  if ((needs_finite || clip.limits.skip_norm.is_rule()) && !clip.skip_nonfinite) {
    raise(PyExc_ValueError, (needs_finite ? kMaxNorm : kSkipNorm).text, reader.where(),
          " is a rule, which needs skip_nonfinite=True: an inf or NaN has no place among the norms that it looks at");
  }
  PyObject* const max_change = reader.required(kMaxChange);
  PyObject* const max_relative_change = reader.required(kMaxRelativeChange);
  const bool limits_change = max_change != Py_None || max_relative_change != Py_None;
  ChangeLimits change_limits;
  if (limits_change) {
    clip.norm = read_norm_type(norm_type, reader.where());
    change_limits = read_change_limits(max_change, max_relative_change, reader.where());
  }
  PyObject* const max_update_rms = reader.required(kMaxUpdateRms);
  if (max_update_rms != Py_None) {
    double rms;
    read_limit(max_update_rms, "max_update_rms", reader.where(), rms);
    if (!can_measure_delta(rule)) {
      raise(PyExc_ValueError, "max_update_rms", reader.where(),
            " can't be set in this optimizer: fastclip.Adam, AdamW and LAMB have it");
    }
  }

  group.master_weights = reader.flag(kMasterWeights);
  hyper.stochastic_rounding = reader.flag(kStochasticRounding);
  if (hyper.stochastic_rounding) hyper.rounding_seed = read_seed(reader.required(kRoundingSeed), reader.where());
  if (group.master_weights && hyper.stochastic_rounding) {
    raise(PyExc_ValueError, "master_weights and stochastic_rounding", reader.where(),
          " exclude each other: master weights keep what stochastic rounding saves on average");
  }
  PyObject* momentum_dtype = reader.required(kMomentumDtype);
  if (momentum_dtype != Py_None) group.momentum_dtype = read_momentum_dtype(momentum_dtype, reader.where());
  group.quantizes_states = read_state_bits(reader.required(kStateBits), reader.where());
  if (group.quantizes_states && group.momentum_dtype) {
    raise(PyExc_ValueError, "state_bits and momentum_dtype", reader.where(), " can't both be set: each says how the ",
          "momentum is stored");
  }
  Rules::visit(rule, [&](auto tag) { read_settings<typename decltype(tag)::Rule>(reader, group); });
  if (needs_products(rule)) {
    clip.norm = Norm::two;  // it is measured in any case
    if (weighted_clip_of(rule, hyper).is_set() && !clip.skip_nonfinite) {
      raise(PyExc_ValueError, "clipping_scale", reader.where(),
            " needs skip_nonfinite=True: the median of norms is not taken over an inf or NaN");
    }
  }
  group.measures_deltas = measured_of(rule, hyper) != 0;
  if (limits_change) {
    const Name& name = max_change != Py_None ? kMaxChange : kMaxRelativeChange;
    add_change_limits(change_limits, name, reader.where(), rule, group);
  }
  return group;
}

}  // namespace fastclip
