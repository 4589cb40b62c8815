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
  return is_ordinary(tensor.unsafeGetTensorImpl()) && tensor.scalar_type() == at::kDouble && tensor.is_contiguous() &&
         tensor.numel() == doubles_of_history(limit) && tensor.device() == device && !tensor.is_inference();
}

// Asks fastclip/plain/history.py to make one that fits of another: it is on another device, of another window, or from
// a file that torch.optim has written.
at::Tensor adopted(PyObject* value, const NormLimit& limit, c10::Device device) {
  const Held module = checked(PyImport_ImportModule("fastclip.plain.history"));
  const Held window = checked(PyLong_FromLong(limit.window)),
             where = checked(PyUnicode_FromString(device.str().c_str()));
  const Held made = checked(PyObject_CallMethod(module.object, "adopted", "OOO", value, window.object, where.object));
  return THPVariable_Unpack(made.object);
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
  made_ = false;
  part.step.clip_history = prepare(of_max_norm_, limits.max_norm, groups, part.device);
  part.step.skip_history = prepare(of_skip_norm_, limits.skip_norm, groups, part.device);
}

History* Histories::prepare(OfLimit& history, const NormLimit& limit, const std::vector<Group>& groups,
                            c10::Device device) {
  if (!limit.is_rule()) return nullptr;
  Place place{0, 0, nullptr, nullptr};
  Held found = states_.find_anywhere(history.name, history.hint, place.param);
  if (found.object && fits(found.object, limit, device)) {
    history.tensor = &THPVariable_Unpack(found.object);
    borrowed_.write(*history.tensor);
    borrowed_.keep(std::move(found));
    return static_cast<History*>(history.tensor->mutable_data_ptr());
  }
  const Held param(found.object ? place.param : nullptr);
  if (found.object) borrowed_.hold();  // Python runs
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  at::Tensor made =
      found.object ? adopted(found.object, limit, device) : at::zeros({doubles_of_history(limit)}, options);
  made_ = true;
  history.tensor = states_.make(found.object ? place : holder(groups), history.name, std::move(made));
  return static_cast<History*>(history.tensor->mutable_data_ptr());
}

void Histories::add_entries(Rules::Id rule, const std::vector<Group>& groups) {
  if (!made_) return;
  for (const Group& group : groups) {
    if (state_names(rule, group).any) return;
  }
  states_.add_entries(groups);
}

Levels Histories::levels(const Limits& limits) const {
  const auto level = [](const NormLimit& limit, const at::Tensor* tensor) {
    if (!tensor) return Level{};
    const at::Tensor here = tensor->cpu();
    return level_of(limit, static_cast<History*>(here.mutable_data_ptr()));
  };
  return {level(limits.max_norm, of_max_norm_.tensor), level(limits.skip_norm, of_skip_norm_.tensor)};
}

void Histories::end() {
  made_ = false;
  of_max_norm_.tensor = of_skip_norm_.tensor = nullptr;
}

}  // namespace fastclip
