// Which tensors the kernels can take: dense memory, of the same element order, on a known device.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <c10/core/InferenceMode.h>

#include "tensors.h"

namespace fastclip {

using c10::DispatchKey;
using c10::DispatchKeySet;

namespace {

uint64_t ordinary_keys() {
  auto keys = DispatchKeySet(
      {DispatchKey::ADInplaceOrView, DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
#if defined(FASTCLIP_CUDA)
  keys = keys | DispatchKeySet({DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
#endif
  return keys.raw_repr();
}

bool is_ordinary(const at::Tensor& tensor) { return fastclip::is_ordinary(tensor.unsafeGetTensorImpl()); }

// Tensors computed in float32 may be stored in any mixture; float64 does not mix.
bool in_one_loop(at::ScalarType a, at::ScalarType b) {
  return a == b || ((a == at::kFloat || is_16_bit(a)) && (b == at::kFloat || is_16_bit(b)));
}

// Sizes already equal. Strides of dimensions of size 1 mean nothing.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes();
  const auto strides_a = a.strides(), strides_b = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && strides_a[i] != strides_b[i]) return false;
  }
  return a.is_non_overlapping_and_dense();
}

// Whether the parameter was told, by its grad_dtype, to take gradients of this dtype.
bool allows_grad_dtype(PyObject* param, const at::Tensor& grad) {
  const Held wanted = Held::stolen(PyObject_GetAttrString(param, "grad_dtype"));
  if (!wanted.object) PyErr_Clear();
  return wanted.object && THPDtype_Check(wanted.object) &&
         reinterpret_cast<THPDtype*>(wanted.object)->scalar_type == grad.scalar_type();
}

}  // namespace

const uint64_t kOtherKeys = ~ordinary_keys();
const uint64_t kTellingKeys =
    kOtherKeys | DispatchKeySet({DispatchKey::ADInplaceOrView, DispatchKey::CPU, DispatchKey::CUDA}).raw_repr();
const at::Tensor kNoGradient;

void check_belongs(const at::Tensor& param, const at::Tensor& grad, const Place& place) {
  // A subclass may have sizes of its own kind: what it holds is for plain torch to judge.
  if (param.key_set().has(DispatchKey::Python) || grad.key_set().has(DispatchKey::Python)) return;
  if (param.sizes() != grad.sizes()) refuse("other_shape", place, "gradient", grad, param);
  if (param.scalar_type() != grad.scalar_type() && !allows_grad_dtype(place.param, grad)) {
    refuse("other_dtype", place, "gradient", grad, param);
  }
  if (param.device() != grad.device()) refuse("other_device", place, "gradient", grad, param);
}

void check_inference(const at::Tensor& tensor, const char* part, const Place& place) {
  if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) refuse("inference_tensor", place, part);
}

const at::Tensor* uncovered(const at::Tensor& param, const at::Tensor& grad) {
  if (!is_ordinary(param)) return &param;
  if (!is_ordinary(grad)) return &grad;
  if (!has_kernel_dtype(param.scalar_type())) return &param;
  if (!in_one_loop(param.scalar_type(), grad.scalar_type()) || !same_order(param, grad)) return &grad;
  return nullptr;
}

bool same_elements(const at::Tensor& a, const at::Tensor& b) {
  return is_ordinary(a) && a.device() == b.device() && a.sizes() == b.sizes() && same_order(a, b);
}

bool same_memory_layout(const at::Tensor& a, const at::Tensor& b) {
  return in_one_loop(a.scalar_type(), b.scalar_type()) && same_elements(a, b);
}

}  // namespace fastclip
