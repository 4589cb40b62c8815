// The gradients that a deferred clip is of: which tensors they are, and whether somebody has changed them since.
#include "gradients.h"

#include <torch/csrc/autograd/python_variable.h>

#include <unordered_set>

#include "python.h"

namespace fastclip {
namespace {

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<uint32_t>(tensor._version());
}

// Calls body(group, index, param, grad) for each parameter with a gradient, until it returns false.
template <class Body>
void for_each_gradient(PyObject* groups, Body body) {
  static const Name params_name("params");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* const group = PyList_GET_ITEM(groups, i);
    PyObject* const params = PyDict_Check(group) ? PyDict_GetItem(group, params_name.object) : nullptr;
    if (!params || !PyList_Check(params)) continue;
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j) {
      PyObject* const param = PyList_GET_ITEM(params, j);
      if (!THPVariable_Check(param)) continue;
      const at::Tensor& tensor = THPVariable_Unpack(param);
      const at::Tensor& grad = tensor.grad();
      if (grad.defined() && !body(i, j, tensor, grad)) return;
    }
  }
}

}  // namespace

Gradients::Gradients(PyObject* params) {
  std::unordered_set<const void*> grads;
  const auto count = static_cast<size_t>(PyList_GET_SIZE(params));
  entries_.reserve(count);
  places_.reserve(count);
  grads.reserve(count);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    PyObject* const param = PyList_GET_ITEM(params, i);
    if (!THPVariable_Check(param)) raise(PyExc_TypeError, "parameters must be tensors, got ", Py_TYPE(param)->tp_name);
    const at::Tensor& tensor = THPVariable_Unpack(param);
    const at::Tensor& grad = tensor.grad();
    if (!grad.defined()) continue;
    distinct_ &= places_.emplace(tensor.unsafeGetTensorImpl(), entries_.size()).second;
    distinct_ &= grads.insert(grad.unsafeGetTensorImpl()).second;
    entries_.push_back({tensor.unsafeGetTensorImpl(), Weak(grad.getIntrusivePtr()), version_of(grad)});
  }
}

// Parameters mostly come in the same order again.
const Gradients::Entry* Gradients::find(const void* param, size_t& next) const {
  if (next >= entries_.size() || entries_[next].param != param) {
    const auto found = places_.find(param);
    if (found == places_.end()) return nullptr;
    next = found->second;
  }
  return &entries_[next++];
}

bool Gradients::are_those_of(PyObject* groups) const {
  if (!distinct_ || entries_.empty()) return false;
  size_t next = 0, found = 0;
  bool all = true;
  for_each_gradient(groups, [&](Py_ssize_t, Py_ssize_t, const at::Tensor& param, const at::Tensor&) {
    all = find(param.unsafeGetTensorImpl(), next) != nullptr;
    found += all;
    return all;
  });
  return all && found == entries_.size();
}

Gradients::Change Gradients::changed_in(PyObject* groups) const {
  Change change;
  size_t next = 0;
  for_each_gradient(groups, [&](Py_ssize_t group, Py_ssize_t index, const at::Tensor& param, const at::Tensor& grad) {
    const Entry* const entry = find(param.unsafeGetTensorImpl(), next);
    change.joined |= !entry;
    if (!entry) return true;
    const bool here = entry->grad._unsafe_get_target() == grad.unsafeGetTensorImpl();
    change.gone &= !here;
    if (change.group < 0 && !(here && entry->version == version_of(grad))) {
      change.group = group;
      change.index = index;
    }
    return true;
  });
  return change;
}

bool Gradients::has(PyObject* param) const {
  if (!THPVariable_Check(param)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(param);
  const at::Tensor& grad = tensor.grad();
  size_t next = entries_.size();
  const Entry* const entry = grad.defined() ? find(tensor.unsafeGetTensorImpl(), next) : nullptr;
  return entry && entry->grad._unsafe_get_target() == grad.unsafeGetTensorImpl();
}

}  // namespace fastclip
