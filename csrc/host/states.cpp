// The states of each parameter: the tensors in optimizer.state[param], under torch's names.
#include "states.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DefaultDtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "huge_pages.h"

namespace fastclip {
namespace {

const Name& step_name() {
  static const Name name("step");
  return name;
}
const Name& master_name() {
  static const Name name("master_param");
  return name;
}

// The names of a rule's state arrays, or of what belongs to them.
template <class R>
std::array<Name, R::kStates.size()> named_with(const char* suffix) {
  return std::apply(
      [&](const auto&... state) {
        return std::array<Name, sizeof...(state)>{Name((std::string(state.name) + suffix).c_str())...};
      },
      R::kStates);
}
template <class R>
struct ArrayNames {
  std::array<Name, R::kStates.size()> arrays = named_with<R>(""), codes = named_with<R>("_codes"),
                                      scales = named_with<R>("_scales");
};
template <class R>
const ArrayNames<R>& array_names() {
  static const ArrayNames<R> names;
  return names;
}

// Reads a parameter's dict, in the order in which torch fills it.
class EntryReader {
 public:
  EntryReader(PyObject* entry, const Place& place) : entry_(entry), place_(place) {}

  const at::Tensor* tensor(const Name& name) {
    PyObject* const value = entry_.value(name);
    if (!value || value == Py_None) return nullptr;  // old checkpoints hold None
    if (!is_tensor(value)) refuse("no_tensor", place_, name.text, value);
    return &THPVariable_Unpack(value);
  }

 private:
  DictInOrder entry_;
  const Place& place_;
};

// Looks up a state in 8 bits.
[[gnu::noinline]] void look_up_codes(EntryReader& reader, const Place& place, const StateNames& names, int s,
                                     ParamStates& found) {
  found.arrays[s] = reader.tensor(*names.codes[s]);
  found.scales[s] = reader.tensor(*names.scales[s]);
  if (!found.arrays[s] == !found.scales[s]) return;
  const Name *codes = names.codes[s], *scales = names.scales[s];
  refuse("incomplete", place, "state", (found.scales[s] ? codes : scales)->object,
         (found.scales[s] ? scales : codes)->object);
}

// New scales: a row for each row of the parameter, where blocks end with it; so they can be sharded alike.
at::Tensor zero_scales_of(const at::Tensor& param) {
  const int64_t rows = param.size(0), row = param.numel() / rows;
  if (param.dim() < 2 || row % kStateBlock != 0) {
    return at::zeros({blocks_of(param.numel())}, param.options().dtype(at::kFloat));
  }
  const at::Tensor first_of_blocks = param.contiguous().view({rows, row / kStateBlock, kStateBlock}).select(2, 0);
  return at::zeros_like(first_of_blocks, first_of_blocks.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
}

}  // namespace

StateNames state_names(Rules::Id rule, const Group& group) {
  StateNames names;
  Rules::visit(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    const uint32_t present = R::writes(group.hyper.terms);
    for (size_t s = 0; s < R::kStates.size(); ++s) {
      if (!has(present, static_cast<int>(s))) continue;
      names.arrays[s] = &array_names<R>().arrays[s];
      if constexpr (R::kQuantizesStates) {
        names.codes[s] = &array_names<R>().codes[s];
        names.scales[s] = &array_names<R>().scales[s];
      }
      names.count = static_cast<int>(s) + 1;
      if (R::kStates[s].is_momentum) names.momentum = static_cast<int>(s);
    }
    if constexpr (R::kScalar.name != nullptr) {
      static const Name scalar(R::kScalar.name);
      names.scalar = &scalar;
      names.first_scalar = R::kScalar.first;
      names.length_of_row = length_of_row(rule, group.hyper);
    }
    names.filled_by_first_step = R::kFilledByFirstStep && names.count > 0;
    names.rule_counts = R::kCountsSteps;
  });
  // No two steps round by the same numbers.
  if (names.rule_counts || group.hyper.stochastic_rounding) names.step = &step_name();
  if (group.master_weights) names.master = &master_name();
  static_assert(kMaxStates == 3);
  for (const Name* name : {names.step, names.scalar, names.arrays[0], names.arrays[1], names.arrays[2]}) {
    names.asked = (names.asked | (name != nullptr)) << 1;  // the last bit is for `master`
  }
  names.any = names.count > 0 || names.step || names.scalar || names.master;
  return names;
}

void States::begin(PyObject* state) {
  if (!PyDict_Check(state)) raise_refusal("no_dict", {object_of("state"), object_of(state)});
  state_ = state;
}

// state[param]. A look-up by tensor runs Tensor.__hash__, in Python (100 ns), so each parameter's
// place in the dict is remembered. It is only a hint: the key found there says whether it still holds.
PyObject* States::entry_of(PyObject* param, size_t position) {
  if (seen_.size() <= position) seen_.resize(position + 1);
  PyObject *key, *entry;
  Py_ssize_t next = seen_[position].place;
  if (PyDict_Next(state_, &next, &key, &entry) && key == param) return entry;

  borrowed_.hold();
  entry = PyDict_GetItemWithError(state_, param);
  if (!entry && PyErr_Occurred()) throw PythonError{};
  if (entry) {
    // Entries are mostly in the order of the parameters: look for it near its predecessor's.
    constexpr int kNear = 64;
    next = position > 0 ? seen_[position - 1].place : 0;
    for (int i = 0; i < kNear; ++i) {
      const Py_ssize_t place = next;
      if (!PyDict_Next(state_, &next, &key, nullptr)) break;
      if (key == param) {
        seen_[position].place = place;
        break;
      }
    }
  }
  return entry;
}

// The shard of a state that is placed as its parameter.
const at::Tensor* States::shard_in(const at::Tensor* state, const Name& name, const Place& place, size_t position,
                                   const Shard& param_shard) {
  auto shard = shard_of(*state);
  if (!shard) refuse("no_dtensor", place, name.text);
  if (!shards_.placed_as(param_shard, position, *shard)) {
    refuse("state_elsewhere", place, name.text, shard->whole.object, param_shard.whole.object);
  }
  borrowed_.write(*state);
  const at::Tensor& local = shard->local();
  borrowed_.keep(std::move(shard->tensor));
  return &local;
}

ParamStates& States::look_up(const Place& place, size_t position, const StateNames& names) {
  borrowed_.keep(Held(place.param));  // Python may run, and another thread drop it
  PyObject* entry = entry_of(place.param, position);
  Seen& seen = seen_[position];
  seen.version_of_state = Seen{}.version_of_state;
  ParamStates& found = seen.states = {};
  if (!entry) return found;
  if (!PyDict_Check(entry)) refuse("no_dict", place, "state", entry);
  EntryReader reader(entry, place);
  found.complete = true;
  const auto look_up = [&](const Name* name, const at::Tensor*& state) {
    if (!name) return;
    state = reader.tensor(*name);
    found.complete &= state != nullptr;
  };
  look_up(names.step, found.step);
  look_up(names.scalar, found.scalar);
  for (int s = 0; s < names.count; ++s) {
    if (!names.arrays[s]) continue;
    found.arrays[s] = reader.tensor(*names.arrays[s]);
    if (!found.arrays[s] && names.codes[s]) look_up_codes(reader, place, names, s, found);
    found.complete &= found.arrays[s] != nullptr;
  }
  seen.asked = asked(names, place.param);
  if (seen.asked != names.asked) look_up(names.master, found.master);
  if (found.complete && version_of(state_) != 0 && version_of(entry) != 0) {
    seen.version_of_state = version_of(state_);
    seen.param = place.param;
    seen.entry = entry;
    seen.version = version_of(entry);
  }
  return found;
}

ParamStates States::find_shards(const Place& place, size_t position, const StateNames& names,
                                const Shard& param_shard) {
  ParamStates found = find(place, position, names);
  const auto for_each = [&](const auto& body) {
    for (int s = 0; s < names.count; ++s) {
      if (found.arrays[s]) body(found.arrays[s], &found.name(names, s));
      if (found.scales[s]) body(found.scales[s], names.scales[s]);
    }
    if (found.master) body(found.master, names.master);
  };
  // Python runs before all of them are taken.
  const auto keep = [&](const at::Tensor* tensor, const Name*) { borrowed_.keep(object_of(*tensor)); };
  for_each(keep);
  if (found.step) keep(found.step, nullptr);
  if (found.scalar) keep(found.scalar, nullptr);
  for_each([&](const at::Tensor*& state, const Name* name) {
    state = shard_in(state, *name, place, position, param_shard);
  });
  return found;
}

Held States::find_anywhere(const Name& name, Py_ssize_t& hint, PyObject*& entry) {
  PyObject* found = nullptr;
  const auto look = [&](Py_ssize_t& place) {
    if (!PyDict_Next(state_, &place, nullptr, &entry)) return false;
    found = PyDict_Check(entry) ? PyDict_GetItemWithError(entry, name.object) : nullptr;
    if (!found && PyErr_Occurred()) throw PythonError{};
    if (found == Py_None) found = nullptr;
    return true;
  };
  Py_ssize_t place = hint;
  if (look(place) && found) return Held(found);
  place = 0;
  do {
    hint = place;
  } while (look(place) && !found);
  return Held(found);
}

Held States::find_beside(const Place& place, size_t position, const Name& name, PyObject*& entry) {
  entry = entry_of(place.param, position);
  if (!entry) return {};
  if (!PyDict_Check(entry)) refuse("no_dict", place, "state", entry);
  PyObject* const found = PyDict_GetItemWithError(entry, name.object);
  if (!found && PyErr_Occurred()) throw PythonError{};
  return Held(found == Py_None ? nullptr : found);
}

const at::Tensor* States::make(const Place& place, const Name& name, at::Tensor tensor) {
  New& added = new_.emplace_back(New{Held(place.param), place, &name, std::move(tensor), {}, {}});
  const auto shard = shard_of(added.tensor);
  return shard ? &shard->local() : &added.tensor;
}

void States::make_missing(Rules::Id rule, const Group& group, const at::Tensor& grad, const Place& place,
                          const StateNames& names, ParamStates& states) {
  const at::Tensor& param = THPVariable_Unpack(place.param);
  const bool has_master = asked(names, place.param) != names.asked;
  const Name *missing = nullptr, *present = nullptr;  // the first ones
  const auto look = [&](const Name* name, const at::Tensor* state) {
    const Name*& first = state ? present : missing;
    if (!first) first = name;
  };
  if (names.rule_counts) look(names.step, states.step);
  look(names.scalar, states.scalar);
  for (int s = 0; s < names.count; ++s) look(names.arrays[s], states.arrays[s]);
  if (missing && present) refuse("incomplete", place, "state", missing->object, present->object);
  const auto dtype_of_numbers = c10::get_default_dtype() == caffe2::TypeMeta::Make<double>() ? at::kDouble : at::kFloat;
  const auto make_numbers = [&](const Name& name, at::IntArrayRef shape, double value) {
    return make(place, name,
                at::full(shape, value, at::TensorOptions().dtype(dtype_of_numbers).device(param.device())));
  };
  if (names.step && !states.step) states.step = make_numbers(*names.step, {}, 0);
  if (names.scalar && !states.scalar) {
    const bool is_row = names.length_of_row > 1;
    const at::IntArrayRef shape = is_row ? at::IntArrayRef(names.length_of_row) : at::IntArrayRef();
    states.scalar = make_numbers(*names.scalar, shape, names.first_scalar);
  }
  for (int s = 0; s < names.count; ++s) {
    if (!names.arrays[s] || states.arrays[s]) continue;
    const at::Tensor like =
        names.filled_by_first_step ? grad.detach() : param.detach();  // whose strides it has, in torch
    if (names.codes[s] && group.quantizes_states && has_states_in_8_bits(param)) {
      at::Tensor codes = empty_in_huge_pages(like, at::kByte);
      codes.fill_(Rules::visit(rule, [&](auto tag) {
        return decltype(tag)::Rule::kStates[s].is_momentum ? DynamicMap<true>::kZero : DynamicMap<false>::kZero;
      }));
      states.arrays[s] = make(place, *names.codes[s], std::move(codes));
      states.scales[s] = make(place, *names.scales[s], zero_scales_of(param.detach()));
      continue;
    }
    auto dtype = has_master ? at::kFloat : like.scalar_type();
    // As torch's weight decay promotes a gradient of another dtype than its parameter.
    if (group.hyper.weight_decay != 0) dtype = c10::promoteTypes(dtype, param.scalar_type());
    if (s == names.momentum && group.momentum_dtype) dtype = *group.momentum_dtype;
    at::Tensor made = empty_in_huge_pages(like, dtype);
    if (!names.filled_by_first_step) {
      made.fill_(Rules::visit(rule, [&](auto tag) {
        using R = typename decltype(tag)::Rule;
        return R::new_value(group.hyper.of<R>());
      }));
    }
    states.arrays[s] = make(place, *names.arrays[s], std::move(made));
  }
  if (has_master && !states.master) {
    const at::Tensor rounded = param.detach();
    states.master = make(place, *names.master, empty_in_huge_pages(rounded, at::kFloat).copy_(rounded));
    states.master_is_new = true;
  }
}

bool States::makes_twice() const {
  std::vector<std::pair<PyObject*, const Name*>> made;
  for (const New& added : new_) made.emplace_back(added.param.object, added.name);
  std::sort(made.begin(), made.end());
  return std::adjacent_find(made.begin(), made.end()) != made.end();
}

void States::prepare() {
  if (has_new()) borrowed_.hold();
  for (New& added : new_) {
    added.wrapped = checked(THPVariable_Wrap(added.tensor));
    added.entry = checked(PyObject_GetItem(state_, added.param.object));  // a defaultdict's default
    if (!PyDict_Check(added.entry.object)) refuse("no_dict", added.place, "state", added.entry.object);
  }
}

void States::store() {
  for (New& added : new_) {
    if (PyDict_SetItem(added.entry.object, added.name->object, added.wrapped.object) != 0) throw PythonError{};
  }
}

bool has_states_in_8_bits(const at::Tensor& param) {
  if (param.numel() < kLeastQuantized || !(param.scalar_type() == at::kFloat || is_16_bit(param.scalar_type()))) {
    return false;
  }
  const auto shard = shard_of(param);
  if (!shard) return true;
  // The blocks of a shard are those of the whole, on any number of ranks.
  const at::Tensor& local = shard->local();
  const int64_t row = param.numel() / param.size(0);
  return row % kStateBlock == 0 && local.numel() == local.size(0) * row;
}

bool covers_codes(const at::Tensor& codes, const at::Tensor& scales, const StateNames& names, int s,
                  const at::Tensor& param, const Place& place) {
  const char *const name = names.codes[s]->text, *const name_of_scales = names.scales[s]->text;
  check_inference(codes, name, place);
  check_inference(scales, name_of_scales, place);
  if (codes.scalar_type() != at::kByte) refuse("no_uint8", place, name, codes);
  if (scales.scalar_type() != at::kFloat) refuse("no_float32", place, name_of_scales, scales);
  if (codes.sizes() != param.sizes()) refuse("other_shape", place, name, codes, param);
  const int64_t blocks = blocks_of(param.numel());
  if (scales.numel() != blocks) refuse("other_length", place, name_of_scales, scales, std::to_string(blocks));
  return same_elements(codes, param) && is_contiguous(scales.unsafeGetTensorImpl()) &&
         scales.device() == param.device();
}

bool covers_state(const at::Tensor& state, const Name& name, const at::Tensor& param, const Place& place) {
  check_inference(state, name.text, place);
  if (state.sizes() != param.sizes()) refuse("other_shape", place, name.text, state, param);
  return same_memory_layout(state, param);
}

}  // namespace fastclip
