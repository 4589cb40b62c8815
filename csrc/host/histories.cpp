// What the rules among the limits remember: states of the optimizer, which stand beside those of one parameter.
#include "histories.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "tensors.h"

namespace fastclip {
namespace {

// Whether the kernels can read and write it as it is.
bool fits(PyObject* value, int64_t numel, c10::Device device) {
  if (!is_tensor(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  if (!is_ordinary(tensor.unsafeGetTensorImpl()) || tensor.scalar_type() != at::kDouble || tensor.dim() != 1)
    return false;
  const size_t end = (tensor.storage_offset() + numel) * sizeof(double);
  return tensor.is_contiguous() && tensor.numel() == numel && tensor.device() == device && !tensor.is_inference() &&
         tensor.storage().nbytes() >= end;
}

// Asks fastclip/plain to make one that fits of another: it is on another device, of another window, or from a file that
// torch.optim has written.
Held adopted(const char* name, PyObject* value, int32_t length, c10::Device device) {
  const Held module = checked(PyImport_ImportModule(name));
  const Held window = checked(PyLong_FromLong(length)), where = checked(PyUnicode_FromString(device.str().c_str()));
  return checked(PyObject_CallMethod(module.object, "adopted", "OOO", value, window.object, where.object));
}

Place place_in(const std::vector<Group>& groups, size_t group, size_t index) {
  return {static_cast<Py_ssize_t>(group), static_cast<Py_ssize_t>(index), groups[group].param_names.object,
          PySequence_Fast_GET_ITEM(groups[group].params.object, static_cast<Py_ssize_t>(index))};
}

size_t size_of(const Group& group) { return static_cast<size_t>(PySequence_Fast_GET_SIZE(group.params.object)); }

bool has_grad(const Place& place) { return grad_of(THPVariable_Unpack(place.param)).defined(); }

// The parameter that a new one stands beside: the first in these groups that has a gradient; or the first, where only
// other ranks have gradients.
Place holder(const std::vector<Group>& groups, size_t first, size_t end) {
  Place found{0, 0, nullptr, nullptr};
  for (size_t group = first; group < end; ++group) {
    for (size_t i = 0; i < size_of(groups[group]); ++i) {
      const Place place = place_in(groups, group, i);
      if (!found.param) found = place;
      if (has_grad(place)) return place;
    }
  }
  return found;
}

History* new_history(States& states, const Place& place, const Name& name, const NormLimit& limit, c10::Device device,
                     const at::Tensor*& tensor) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  tensor = states.make(place, name, at::zeros({doubles_of_history(limit)}, options));
  return static_cast<History*>(tensor->mutable_data_ptr());
}

}  // namespace

const Name& Histories::max_norm_name() {
  static const Name name("clip_history");
  return name;
}

const Name& Histories::skip_norm_name() {
  static const Name name("skip_history");
  return name;
}

void Histories::prepare(const std::vector<Group>& groups, Part& part) {
  const Limits& limits = groups.front().norm_clip.limits;
  part.step.clip_history = prepare(of_max_norm_, limits.max_norm, groups, part.device);
  part.step.skip_history = prepare(of_skip_norm_, limits.skip_norm, groups, part.device);
}

History* Histories::prepare(OfLimit& history, const NormLimit& limit, const std::vector<Group>& groups,
                            c10::Device device) {
  if (!limit.is_rule()) return nullptr;
  PyObject* entry = nullptr;
  Held found = states_.find_anywhere(history.name, history.hint, entry);
  if (!found.object) {
    return new_history(states_, holder(groups, 0, groups.size()), history.name, limit, device, history.tensor);
  }
  return use(std::move(found), entry, history.name, limit, device, history.tensor);
}

History* Histories::use(Held found, PyObject* entry, const Name& name, const NormLimit& limit, c10::Device device,
                        const at::Tensor*& tensor) {
  if (!fits(found.object, doubles_of_history(limit), device)) {
    borrowed_.hold();  // Python runs
    const Held kept(entry);
    found = adopted("fastclip.plain.history", found.object, limit.window, device);
    // At once, and not with the new states: the norm of a step that is left out must enter.
    if (PyDict_SetItem(entry, name.object, found.object) != 0) throw PythonError{};
  }
  tensor = &THPVariable_Unpack(found.object);
  borrowed_.write(*tensor);
  borrowed_.keep(std::move(found));
  return static_cast<History*>(tensor->mutable_data_ptr());
}

// `first` is the position of the group's first parameter among all.
History* Histories::of_group(const std::vector<Group>& groups, const Segment& segment, size_t first,
                             c10::Device device) {
  static const Name kName("clip_history_of_group");
  const NormLimit& limit = groups[segment.group].segment_limit;
  const at::Tensor* tensor;
  PyObject* entry;
  Held found;
  if (find_in_group(groups, segment.group, first, kName, found, entry)) {
    return use(std::move(found), entry, kName, limit, device, tensor);
  }
  return new_history(states_, holder(groups, segment.group, segment.group + 1), kName, limit, device, tensor);
}

bool Histories::find_in_group(const std::vector<Group>& groups, size_t group, size_t first, const Name& name,
                              Held& found, PyObject*& entry) {
  const size_t count = size_of(groups[group]);
  if (holders_.size() < groups.size()) holders_.resize(groups.size(), 0);
  for (size_t i = 0; i <= count; ++i) {  // where it was the last time, then everywhere
    const size_t index = i == 0 ? holders_[group] : i - 1;
    if (index >= count) continue;
    found = states_.find_beside(place_in(groups, group, index), first + index, name, entry);
    if (!found.object) continue;
    holders_[group] = index;
    return true;
  }
  return false;
}

void Histories::prepare_model_norms(const std::vector<Group>& groups, Part& part) {
  static const Name kName("model_norms");
  part.step.model_norms.assign(groups.size(), nullptr);
  size_t first = 0;
  for (size_t group = 0; group < groups.size(); first += size_of(groups[group++])) {
    const WeightedClip clip = weighted_clip_of(part.step.rule, groups[group].hyper);
    const Place place = holder(groups, group, group + 1);
    if (!clip.is_set() || !place.param || !has_grad(place)) continue;
    const int64_t numel = doubles_of_norms(clip);
    Held found;
    PyObject* entry;
    const at::Tensor* tensor;
    if (!find_in_group(groups, group, first, kName, found, entry)) {
      const auto options = at::TensorOptions().dtype(at::kDouble).device(part.device);
      tensor = states_.make(place, kName, at::zeros({numel}, options));
    } else {
      if (!fits(found.object, numel, part.device)) {
        borrowed_.hold();  // Python runs
        const Held kept(entry);
        found = adopted("fastclip.plain.weighted_clip", found.object, clip.period, part.device);
        if (PyDict_SetItem(entry, kName.object, found.object) != 0) throw PythonError{};
      }
      tensor = &THPVariable_Unpack(found.object);
      borrowed_.write(*tensor);
      borrowed_.keep(std::move(found));
    }
    part.step.model_norms[group] = static_cast<ModelNorms*>(tensor->mutable_data_ptr());
  }
}

History* Histories::of_parameter(const std::vector<Group>& groups, const Segment& segment, size_t first,
                                 c10::Device device) {
  static const Name kName("clip_history_of_parameter");
  const NormLimit& limit = groups[segment.group].segment_limit;
  const Place place = place_in(groups, segment.group, segment.number - first);
  const at::Tensor* tensor;
  PyObject* entry;
  Held found = states_.find_beside(place, segment.number, kName, entry);
  if (found.object) return use(std::move(found), entry, kName, limit, device, tensor);
  // Only other ranks have a gradient: this one will have an entry for the parameter when it has one, too.
  if (!has_grad(place)) return nullptr;
  return new_history(states_, place, kName, limit, device, tensor);
}

void Histories::prepare_segments(const std::vector<Group>& groups, std::vector<Part>& parts) {
  const Scope scope = groups.front().norm_clip.scope;
  std::vector<size_t> firsts;  // positions of the groups' first parameters
  size_t first = 0;
  for (const Group& group : groups) {
    firsts.push_back(first);
    first += size_of(group);
  }
  std::vector<bool> has_owner(groups.size());  // of groups: one part has the history
  for (Part& part : parts) {
    for (Segment& segment : part.step.segments) {
      if (!groups[segment.group].segment_limit.is_rule()) continue;
      if (scope == Scope::parameter) {
        segment.history = of_parameter(groups, segment, firsts[segment.group], part.device);
      } else if (!has_owner[segment.group]) {
        has_owner[segment.group] = true;
        segment.history = of_group(groups, segment, firsts[segment.group], part.device);
      }
    }
  }
}

Levels Histories::levels(const Limits& limits) const {
  const auto level = [](const NormLimit& limit, const at::Tensor* tensor) {
    if (!tensor) return Level{};
    const at::Tensor here = tensor->cpu();
    return level_of(limit, static_cast<History*>(here.mutable_data_ptr()));
  };
  return {level(limits.max_norm, of_max_norm_.tensor), level(limits.skip_norm, of_skip_norm_.tensor)};
}

void Histories::end() { of_max_norm_.tensor = of_skip_norm_.tensor = nullptr; }

}  // namespace fastclip
