// Whether torch's tensors are laid out in memory as the headers say that this was compiled with.
#include "self_check.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "tensors.h"

namespace fastclip {
namespace {

c10::TensorImpl* unpacked(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

bool equal(c10::IntArrayRef read, const std::vector<int64_t>& told) {
  return read.size() == told.size() && std::equal(read.begin(), read.end(), told.begin());
}

}  // namespace

const char* misread(const Told& told) {
  if (!is_tensor(told.tensor)) return "type";
  c10::TensorImpl* const tensor = unpacked(told.tensor);
  if (reinterpret_cast<uintptr_t>(tensor) != told.address) return "address";
  if (tensor->numel() != told.numel) return "numel";
  const auto dtype = reinterpret_cast<THPDtype*>(told.dtype)->scalar_type;
  if (tensor->dtype() != c10::scalarTypeToTypeMeta(dtype)) return "dtype";
  if (tensor->device().is_cpu() != told.is_cpu) return "device";
  if (is_ordinary(tensor) != told.is_ordinary) return "keys";
  if (!told.is_ordinary) return nullptr;
  if (tensor->is_inference()) return "inference";
  if (static_cast<size_t>(tensor->dim()) != told.sizes.size()) return "dim";
  if (!equal(tensor->sizes_default(), told.sizes)) return "sizes";
  if (!equal(tensor->strides_default(), told.strides)) return "strides";
  if (tensor->is_contiguous_default(at::MemoryFormat::Contiguous) != told.is_contiguous) return "contiguity";
  if (reinterpret_cast<uintptr_t>(tensor->data()) != told.data) return "data_ptr";
  const at::Tensor& grad = grad_of(THPVariable_Unpack(told.tensor));
  const bool is_told_grad = told.grad == Py_None ? !grad.defined() : grad.unsafeGetTensorImpl() == unpacked(told.grad);
  if (!is_told_grad) return "grad";
  if (tensor->version_counter().current_version() != told.version) return "version";
  return nullptr;
}

void bump_version(PyObject* tensor) { unpacked(tensor)->bump_version(); }

}  // namespace fastclip
