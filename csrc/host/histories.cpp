// What the rules among the limits remember: states of the optimizer, which stand beside those of one parameter.
#include "histories.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "tensors.h"

namespace fastclip {
namespace {

// Whether the kernels can read and write it as it is.
bool fits(PyObject* value, const NormLimit& limit, c10::Device device) {
  if (!is_tensor(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  const int64_t numel = doubles_of_history(limit);
  if (!is_ordinary(tensor.unsafeGetTensorImpl()) || tensor.scalar_type() != at::kDouble || tensor.dim() != 1)
    return false;
  const size_t end = (tensor.storage_offset() + numel) * sizeof(double);
  return tensor.is_contiguous() && tensor.numel() == numel && tensor.device() == device && !tensor.is_inference() &&
         tensor.storage().nbytes() >= end;
}

// Asks fastclip/plain/history.py to make one that fits of another: it is on another device, of another window, or from
// a file that torch.optim has written.
Held adopted(PyObject* value, const NormLimit& limit, c10::Device device) {
  const Held module = checked(PyImport_ImportModule("fastclip.plain.history"));
  const Held window = checked(PyLong_FromLong(limit.window)),
             where = checked(PyUnicode_FromString(device.str().c_str()));
  return checked(PyObject_CallMethod(module.object, "adopted", "OOO", value, window.object, where.object));
}

// The parameter that a new one stands beside: the first that has a gradient; or the first, where only other ranks have
// gradients.
Place holder(const std::vector<Group>& groups) {
  Place first{0, 0, nullptr, nullptr};
  for (size_t group = 0; group < groups.size(); ++group) {
    PyObject* const params = groups[group].params.object;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
      const Place place{static_cast<Py_ssize_t>(group), i, groups[group].param_names.object,
                        PySequence_Fast_GET_ITEM(params, i)};
      if (!first.param) first = place;
      if (grad_of(THPVariable_Unpack(place.param)).defined()) return place;
    }
  }
  return first;
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
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
    history.tensor = states_.make(holder(groups), history.name, at::zeros({doubles_of_history(limit)}, options));
    return static_cast<History*>(history.tensor->mutable_data_ptr());
  }
  if (!fits(found.object, limit, device)) {
    borrowed_.hold();  // Python runs
    const Held kept(entry);
    found = adopted(found.object, limit, device);
    // At once, and not with the new states: the norm of a step that is left out must enter.
    if (PyDict_SetItem(entry, history.name.object, found.object) != 0) throw PythonError{};
  }
  history.tensor = &THPVariable_Unpack(found.object);
  borrowed_.write(*history.tensor);
  borrowed_.keep(std::move(found));
  return static_cast<History*>(history.tensor->mutable_data_ptr());
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
