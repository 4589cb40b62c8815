// Reads an optimizer's param_groups: hyperparameters, checked, and the clip they ask for.
#include "groups.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <climits>
#include <cmath>
#include <limits>

namespace fastclip {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string repr(PyObject* value) {
  PyObject* text = PyObject_Repr(value);
  if (!text) {
    PyErr_Clear();
    return "?";
  }
  const char* utf8 = PyUnicode_AsUTF8(text);
  std::string result = utf8 ? utf8 : "?";
  if (!utf8) PyErr_Clear();
  Py_DECREF(text);
  return result;
}

std::string type_name(PyObject* value) { return Py_TYPE(value)->tp_name; }

// Numbers as torch takes them: float, int, numpy scalars, one-element tensors. Not bool strings, not
// str, though float("0.1") would work: torch would fail later, in the middle of a step.
double read_number(PyObject* value, const char* name, const std::string& where) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const Held held(value);
  double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    raise(PyExc_TypeError, std::string(name) + where + " must be a number, got " + repr(value) +
                               " of type " + type_name(value));
  }
  return number;
}

double read_non_negative(PyObject* value, const char* name, const std::string& where) {
  const double number = read_number(value, name, where);
  if (!(number >= 0)) {
    raise(PyExc_ValueError,
          std::string(name) + where + " must not be negative or NaN, got " + repr(value));
  }
  return number;
}

uint32_t read_seed(PyObject* value, const std::string& where) {
  const Held held(value);
  const unsigned long long seed = PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : ULLONG_MAX;
  PyErr_Clear();
  if (seed > UINT32_MAX) {
    raise(PyExc_ValueError, "rounding_seed" + where + " must be an int from 0 to 2**32 - 1, got " + repr(value));
  }
  return static_cast<uint32_t>(seed);
}

c10::ScalarType read_momentum_dtype(PyObject* value, const std::string& where) {
  if (THPDtype_Check(value)) {
    const auto dtype = reinterpret_cast<THPDtype*>(value)->scalar_type;
    if (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) return dtype;
  }
  raise(PyExc_ValueError, "momentum_dtype" + where +
                              " must be None, torch.float32, torch.bfloat16 or torch.float16, got " + repr(value));
}

struct Key {
  PyObject* object;
  const char* name;
  explicit Key(const char* name) : object(PyUnicode_InternFromString(name)), name(name) {}
};

class GroupReader {
 public:
  GroupReader(PyObject* group, Py_ssize_t index) : group_(group), index_(index) {
    if (!PyDict_Check(group)) {
      raise(PyExc_TypeError, "param_groups[" + std::to_string(index) + "] must be a dict, got " +
                                 type_name(group));
    }
  }

  PyObject* optional(const Key& key) const {
    PyObject* value = PyDict_GetItemWithError(group_, key.object);
    if (!value && PyErr_Occurred()) throw PythonError{};
    return value;
  }

  PyObject* required(const Key& key) const {
    PyObject* value = optional(key);
    if (!value) raise(PyExc_KeyError, key.name + where() + " is missing");
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

  // " in param_groups[1]"; built only where something is wrong.
  std::string where() const { return " in param_groups[" + std::to_string(index_) + "]"; }

 private:
  PyObject* group_;
  Py_ssize_t index_;
};

}  // namespace

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError{};
}

void read_clip_value(PyObject* value, const std::string& where, double* low, double* high) {
  *low = -kInfinity;
  *high = kInfinity;
  if (value == Py_None) return;
  const Held held(value);
  if (PyTuple_Check(value) || PyList_Check(value)) {
    PyObject* pair = PySequence_Fast(value, "");
    if (PySequence_Fast_GET_SIZE(pair) != 2) {
      Py_DECREF(pair);
      raise(PyExc_ValueError, "clip_value" + where + " must be a number or (low, high), got " + repr(value));
    }
    const Held items[2] = {Held(PySequence_Fast_GET_ITEM(pair, 0)), Held(PySequence_Fast_GET_ITEM(pair, 1))};
    Py_DECREF(pair);
    *low = read_number(items[0].object, "clip_value[0]", where);
    *high = read_number(items[1].object, "clip_value[1]", where);
    if (!(*low <= *high)) {  // refuses NaN, too
      raise(PyExc_ValueError, "clip_value" + where + " must have low <= high, got " + repr(value));
    }
    return;
  }
  *high = read_non_negative(value, "clip_value", where);
  *low = -*high;
}

NormClip read_norm_clip(PyObject* max_norm, PyObject* norm_type, const std::string& where) {
  NormClip clip;
  const Held held_norm(max_norm), held_type(norm_type);
  double order = 2;
  if (PyUnicode_Check(norm_type) && PyUnicode_CompareWithASCIIString(norm_type, "inf") == 0) {
    order = kInfinity;
  } else {
    order = read_number(norm_type, "norm_type", where);
  }
  if (order != 2 && order != kInfinity) {
    raise(PyExc_ValueError, "norm_type" + where + " must be 2 or inf, got " + repr(norm_type));
  }
  if (max_norm == Py_None) return clip;
  clip.norm = order == 2 ? Norm::two : Norm::inf;
  clip.max_norm = read_non_negative(max_norm, "max_norm", where);
  return clip;
}

Group read_group(PyObject* object, Py_ssize_t index, Rule rule) {
  static const Key kParams("params"), kParamNames("param_names"), kLr("lr"), kWeightDecay("weight_decay"),
      kMaximize("maximize"), kDifferentiable("differentiable"), kClipValue("clip_value"),
      kMaxNorm("max_norm"), kNormType("norm_type"), kSkipNonfinite("skip_nonfinite"),
      kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov"), kBetas("betas"), kEps("eps"),
      kAmsgrad("amsgrad"), kDecoupledWeightDecay("decoupled_weight_decay"), kMasterWeights("master_weights"),
      kStochasticRounding("stochastic_rounding"), kRoundingSeed("rounding_seed"), kMomentumDtype("momentum_dtype");
  const GroupReader reader(object, index);
  // Signs are checked where an optimizer is made, by torch. A step only refuses what would destroy
  // the model: schedulers may end on a learning rate of -1e-19, and torch takes it.
  const auto checked = [&](PyObject* value, const char* name) {
    if (PyFloat_CheckExact(value) && !std::isnan(PyFloat_AS_DOUBLE(value))) {
      return PyFloat_AS_DOUBLE(value);
    }
    const double number = read_number(value, name, reader.where());
    if (std::isnan(number)) raise(PyExc_ValueError, name + reader.where() + " is NaN");
    return number;
  };
  const auto number = [&](const Key& key) { return checked(reader.required(key), key.name); };

  Group group{};
  PyObject* params = reader.required(kParams);
  if (!PyList_Check(params) && !PyTuple_Check(params)) {
    raise(PyExc_TypeError, "params" + reader.where() + " must be a list, got " + type_name(params));
  }
  group.params = Held(params);
  PyObject* names = reader.optional(kParamNames);
  if (names && PyList_Check(names)) group.param_names = Held(names);
  group.differentiable = reader.optional(kDifferentiable) && reader.flag(kDifferentiable);

  PyObject* lr = reader.required(kLr);
  PyObject* weight_decay = reader.required(kWeightDecay);
  for (PyObject* value : {lr, weight_decay}) {
    if (!PyFloat_CheckExact(value) && THPVariable_Check(value)) {
      group.differentiable |= THPVariable_Unpack(value).requires_grad();
    }
  }
  Hyper& hyper = group.hyper;
  if (!PyFloat_CheckExact(lr) && THPVariable_Check(lr) && !THPVariable_Unpack(lr).is_cpu()) {
    if (THPVariable_Unpack(lr).numel() != 1) {
      raise(PyExc_ValueError, "lr" + reader.where() + " must be a 1-element tensor");
    }
    group.lr_tensor = Held(lr);  // on a GPU: reading it here would wait for the device
  } else if (!group.differentiable) {
    hyper.lr = number(kLr);
  }
  if (!group.differentiable) hyper.weight_decay = number(kWeightDecay);
  hyper.maximize = reader.flag(kMaximize);
  if (rule == Rule::sgd) {
    hyper.momentum = number(kMomentum);
    hyper.dampening = number(kDampening);
    hyper.nesterov = reader.flag(kNesterov);
  } else if (!group.differentiable) {
    PyObject* betas = reader.required(kBetas);
    if ((!PyTuple_Check(betas) && !PyList_Check(betas)) || PySequence_Fast_GET_SIZE(betas) != 2) {
      raise(PyExc_ValueError, "betas" + reader.where() + " must be a pair of numbers, got " + repr(betas));
    }
    const Held both[2] = {Held(PySequence_Fast_GET_ITEM(betas, 0)), Held(PySequence_Fast_GET_ITEM(betas, 1))};
    hyper.beta1 = checked(both[0].object, "betas[0]");
    hyper.beta2 = checked(both[1].object, "betas[1]");
    hyper.eps = number(kEps);
    hyper.amsgrad = reader.flag(kAmsgrad);
    hyper.decoupled_weight_decay = reader.flag(kDecoupledWeightDecay);
  }

  PyObject* clip_value = reader.required(kClipValue);
  hyper.clip_low = -kInfinity;
  hyper.clip_high = kInfinity;
  if (clip_value != Py_None) {
    read_clip_value(clip_value, reader.where(), &hyper.clip_low, &hyper.clip_high);
  }
  PyObject* max_norm = reader.required(kMaxNorm);
  PyObject* norm_type = reader.required(kNormType);
  const bool two = PyFloat_CheckExact(norm_type) && PyFloat_AS_DOUBLE(norm_type) == 2;
  if (max_norm != Py_None || !two) group.norm_clip = read_norm_clip(max_norm, norm_type, reader.where());
  group.norm_clip.skip_nonfinite = reader.flag(kSkipNonfinite);

  group.master_weights = reader.flag(kMasterWeights);
  hyper.stochastic_rounding = reader.flag(kStochasticRounding);
  if (hyper.stochastic_rounding) hyper.rounding_seed = read_seed(reader.required(kRoundingSeed), reader.where());
  if (group.master_weights && hyper.stochastic_rounding) {
    raise(PyExc_ValueError, "master_weights and stochastic_rounding" + reader.where() +
                                " exclude each other: master weights keep what stochastic rounding saves on average");
  }
  PyObject* momentum_dtype = reader.required(kMomentumDtype);
  if (momentum_dtype != Py_None) group.momentum_dtype = read_momentum_dtype(momentum_dtype, reader.where());
  return group;
}

}  // namespace fastclip
