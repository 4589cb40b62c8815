// What an update rule keeps of each parameter: the tensors in optimizer.state[param], under torch's names.
#include "states.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

namespace fastclip {
namespace {

struct Names {
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
  PyObject* exp_avg = PyUnicode_InternFromString("exp_avg");
  PyObject* exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
  PyObject* max_exp_avg_sq = PyUnicode_InternFromString("max_exp_avg_sq");
  PyObject* master_param = PyUnicode_InternFromString("master_param");
};
const Names& all_names() {
  static const Names names;
  return names;
}

std::string text_of(PyObject* name) { return PyUnicode_AsUTF8(name); }

// Goes through a parameter's dict in the order in which torch fills it; looks a name up where it is another.
class EntryReader {
 public:
  // Keeps what it reads in `borrowed`, if that is given.
  EntryReader(PyObject* entry, const Place& place, Borrowed* borrowed) : entry_(entry), place_(place), borrowed_(borrowed) {}

  const at::Tensor* tensor(PyObject* name) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t next = next_;
    if (PyDict_Next(entry_, &next, &key, &value) && key == name) {
      next_ = next;
    } else {
      value = PyDict_GetItemWithError(entry_, name);
      if (!value && PyErr_Occurred()) throw PythonError{};
    }
    if (!value || value == Py_None) return nullptr;  // old checkpoints hold None
    if (!is_tensor(value)) {
      raise(PyExc_TypeError, "the " + text_of(name) + " of " + place_.text() +
                                 " must be a tensor, got " + Py_TYPE(value)->tp_name);
    }
    if (borrowed_) borrowed_->keep(Held(value));
    return &THPVariable_Unpack(value);
  }

 private:
  PyObject* entry_;
  const Place& place_;
  Borrowed* const borrowed_;
  Py_ssize_t next_ = 0;
};

}  // namespace

StateNames state_names(Rule rule, const Group& group) {
  const Names& names = all_names();
  StateNames of_group;
  if (rule == Rule::adam) {
    of_group = {group.hyper.amsgrad ? 3 : 2, {names.exp_avg, names.exp_avg_sq, names.max_exp_avg_sq}, names.step, nullptr};
  } else if (group.hyper.momentum != 0) {
    of_group = {1, {names.momentum_buffer}, nullptr, nullptr};
  }
  if (group.hyper.stochastic_rounding) of_group.step = names.step;  // no two steps round by the same numbers
  if (group.master_weights) of_group.master = names.master_param;
  of_group.any = of_group.count > 0 || of_group.step || of_group.master;
  return of_group;
}

void States::begin(PyObject* state) {
  if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");
  state_ = state;
}

// state[param]. A look-up by tensor runs Tensor.__hash__, in Python (100 ns), so each parameter's
// place in the dict is remembered. It is only a hint: the key found there says whether it still holds.
PyObject* States::entry_of(PyObject* param, size_t position) {
  if (places_.size() <= position) places_.resize(position + 1, 0);
  PyObject *key, *entry;
  Py_ssize_t next = places_[position];
  if (PyDict_Next(state_, &next, &key, &entry) && key == param) return entry;

  ran_python_ = true;
  borrowed_.hold();
  entry = PyDict_GetItemWithError(state_, param);
  if (!entry && PyErr_Occurred()) throw PythonError{};
  if (entry) {
    // Entries are mostly in the order of the parameters: look for it near its predecessor's.
    constexpr int kNear = 64;
    next = position > 0 ? places_[position - 1] : 0;
    for (int i = 0; i < kNear; ++i) {
      const Py_ssize_t place = next;
      if (!PyDict_Next(state_, &next, &key, nullptr)) break;
      if (key == param) {
        places_[position] = place;
        break;
      }
    }
  }
  return entry;
}

// The shard of a state that is placed as its parameter.
const at::Tensor* States::shard_in(const at::Tensor* state, PyObject* name, const Place& place, size_t position,
                                   const Shard& param_shard) {
  if (!state) return nullptr;
  auto shard = shard_of(*state);
  if (!shard) raise(PyExc_TypeError, "the " + text_of(name) + " of " + place.text() + " is no DTensor, as the parameter is");
  if (!shards_.placed_as(param_shard, position, *shard)) {
    raise(PyExc_ValueError, "the " + text_of(name) + " of " + place.text() + " is placed otherwise than the parameter");
  }
  borrowed_.write(*state);
  const at::Tensor& local = shard->local();
  std::move(*shard).keep_in(borrowed_);
  return &local;
}

[[gnu::flatten]] ParamStates States::find(const Place& place, size_t position, const StateNames& names,
                                          const Shard* param_shard) {
  ParamStates found;
  ran_python_ = false;
  PyObject* entry = entry_of(place.param, position);
  if (!entry) return found;
  if (!PyDict_Check(entry)) raise(PyExc_TypeError, "the state of " + place.text() + " must be a dict");
  EntryReader reader(entry, place, param_shard ? &borrowed_ : nullptr);  // Python runs before the states of shards are taken
  if (names.step) found.step = reader.tensor(names.step);
  for (int s = 0; s < names.count; ++s) found.arrays[s] = reader.tensor(names.arrays[s]);
  if (names.master) found.master = reader.tensor(names.master);
  if (!param_shard) return found;
  for (int s = 0; s < names.count; ++s) found.arrays[s] = shard_in(found.arrays[s], names.arrays[s], place, position, *param_shard);
  found.master = shard_in(found.master, names.master, place, position, *param_shard);
  return found;
}

const at::Tensor* States::make(const Held& param, PyObject* name, at::Tensor tensor) {
  New& added = new_.emplace_back(New{Held(param.object), name, std::move(tensor), {}, {}});
  const auto shard = shard_of(added.tensor);
  return shard ? &shard->local() : &added.tensor;
}

void States::make_missing(Rule rule, const Group& group, const Held& held, const at::Tensor& grad, const Place& place,
                          const StateNames& names, ParamStates& states) {
  const at::Tensor& param = THPVariable_Unpack(held.object);
  const bool has_master = names.master && is_16_bit(param.scalar_type());
  PyObject* missing = names.step && !states.step ? names.step : nullptr;
  bool some = rule == Rule::adam && states.step;
  for (int s = 0; s < names.count; ++s) {
    if (!states.arrays[s]) missing = names.arrays[s];
    some |= states.arrays[s] != nullptr;
  }
  if (rule == Rule::adam && missing && some) {
    raise(PyExc_KeyError, "the state of " + place.text() + " has no " + text_of(missing) + ", but others that belong to it");
  }
  if (names.step && !states.step) {
    const auto dtype = c10::get_default_dtype() == caffe2::TypeMeta::Make<double>() ? at::kDouble : at::kFloat;
    states.step = make(held, names.step, at::zeros({}, at::TensorOptions().dtype(dtype).device(param.device())));
  }
  for (int s = 0; s < names.count; ++s) {
    if (states.arrays[s]) continue;
    const at::Tensor like = rule == Rule::sgd ? grad.detach() : param.detach();  // whose strides it has, in torch
    auto dtype = has_master ? at::kFloat : like.scalar_type();
    // What torch's weight decay makes of a gradient of another dtype than its parameter.
    if (group.hyper.weight_decay != 0) dtype = c10::promoteTypes(dtype, param.scalar_type());
    if (s == 0 && group.momentum_dtype) dtype = *group.momentum_dtype;
    const auto options = like.options().dtype(dtype);
    states.arrays[s] =
        make(held, names.arrays[s], rule == Rule::sgd ? at::empty_like(like, options) : at::zeros_like(like, options));
  }
  if (!has_master) {
    states.master = nullptr;
  } else if (!states.master) {
    states.master = make(held, names.master, param.detach().to(at::kFloat));
    states.master_is_new = true;
  }
}

bool States::makes_twice() const {
  std::vector<std::pair<PyObject*, PyObject*>> made;
  for (const New& added : new_) made.emplace_back(added.param.object, added.name);
  std::sort(made.begin(), made.end());
  return std::adjacent_find(made.begin(), made.end()) != made.end();
}

void States::prepare() {
  if (has_new()) borrowed_.hold();
  for (New& added : new_) {
    added.wrapped = Held::stolen(THPVariable_Wrap(added.tensor));
    if (!added.wrapped.object) throw PythonError{};
    added.entry = Held::stolen(PyObject_GetItem(state_, added.param.object));  // a defaultdict's default
    if (!added.entry.object) throw PythonError{};
    if (!PyDict_Check(added.entry.object)) raise(PyExc_TypeError, "an optimizer's state of a parameter must be a dict");
  }
}

void States::store() {
  for (New& added : new_) {
    if (PyDict_SetItem(added.entry.object, added.name, added.wrapped.object) != 0) throw PythonError{};
  }
}

const char* why_not_covered(const at::Tensor& state, PyObject* name, const at::Tensor& param, const Place& place) {
  if (state.is_inference() && !c10::InferenceMode::is_enabled()) {
    raise(PyExc_RuntimeError, "the " + text_of(name) + " of " + place.text() +
                                  " is an inference tensor: it can't be updated outside InferenceMode");
  }
  if (state.sizes() != param.sizes()) {
    raise(PyExc_ValueError, "the " + text_of(name) + " of " + place.text() + " has another shape than the parameter");
  }
  if (is_plainly_covered(param, state) || same_memory_layout(state, param)) return nullptr;
  return "of another memory layout, dtype or device";
}

}  // namespace fastclip
