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
  auto keys = DispatchKeySet({DispatchKey::ADInplaceOrView, DispatchKey::CPU, DispatchKey::AutogradCPU,
                              DispatchKey::AutocastCPU});
#if defined(FASTCLIP_CUDA)
  keys = keys | DispatchKeySet({DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
#endif
  return keys.raw_repr();
}

bool is_ordinary(const at::Tensor& tensor) { return fastclip::is_ordinary(tensor.unsafeGetTensorImpl()); }

// What is computed in float may be stored in any mixture; float64 keeps to itself.
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

const char* why_not_ordinary(const at::Tensor& tensor) {
  if (tensor.is_nested()) return "is nested";
  if (tensor.layout() != at::kStrided) return "is sparse";
  if (tensor.key_set().has(DispatchKey::Python)) return "is a tensor subclass";
  if (tensor.is_complex()) return "is complex";
  if (tensor.is_conj() || tensor.is_neg()) return "is a lazily negated or conjugated view";
  if (tensor.is_cuda()) return "is on a GPU, and fastclip was built without CUDA";
  return "is on a device, or of a kind, that the kernels do not cover";
}

std::string describe(const at::Tensor& tensor) {
  std::string sizes;
  for (const auto size : tensor.sizes()) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return std::string(c10::toString(tensor.scalar_type())) + " [" + sizes + "] on " + tensor.device().str();
}

// Whether the parameter was told, by its grad_dtype, to take gradients of this dtype.
bool allows_grad_dtype(PyObject* param, const at::Tensor& grad) {
  const Held wanted = Held::stolen(PyObject_GetAttrString(param, "grad_dtype"));
  if (!wanted.object) PyErr_Clear();
  return wanted.object && THPDtype_Check(wanted.object) &&
         reinterpret_cast<THPDtype*>(wanted.object)->scalar_type == grad.scalar_type();
}

[[noreturn]] void raise_mismatch(const char* what, const at::Tensor& param, const at::Tensor& grad,
                                 const Place& place) {
  raise(PyExc_ValueError, "the gradient of ", place.text(), " has another ", what, " than the parameter: ", describe(grad),
        ", parameter ", describe(param));
}

}  // namespace

const uint64_t kOtherKeys = ~ordinary_keys();
const at::Tensor kNoGradient;

double rounded_bound(DType dtype, double bound) {
  const auto narrow = static_cast<float>(bound);
  switch (dtype) {
    case DType::float32: return narrow;
    case DType::bfloat16: return static_cast<float>(c10::BFloat16(narrow));
    case DType::float16: return static_cast<float>(c10::Half(narrow));
    case DType::float64: break;
  }
  return bound;
}

std::string Place::text() const {
  std::string text = "parameter " + std::to_string(index);
  if (in_optimizer) text += " of group " + std::to_string(group);
  if (names && index < PyList_GET_SIZE(names)) {
    if (const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(names, index))) {
      text += " ('" + std::string(name) + "')";
    } else {
      PyErr_Clear();
    }
  }
  return text;
}

std::string why_not_covered(const at::Tensor& param, const at::Tensor& grad, const Place& place) {
  const bool ordinary = is_ordinary(param) && is_ordinary(grad);
  const auto dtype = param.scalar_type();
  // A subclass may have sizes of its own kind: what it holds is for plain torch to judge.
  if (!param.key_set().has(DispatchKey::Python) && !grad.key_set().has(DispatchKey::Python)) {
    if (param.sizes() != grad.sizes()) raise_mismatch("shape", param, grad, place);
    if (dtype != grad.scalar_type()) {
      if (!allows_grad_dtype(place.param, grad)) raise_mismatch("dtype", param, grad, place);
      if (!in_one_loop(dtype, grad.scalar_type())) return "has a gradient of another dtype";
    }
    if (param.device() != grad.device()) raise_mismatch("device", param, grad, place);
  }
  if (param.is_inference() && !c10::InferenceMode::is_enabled()) {
    raise(PyExc_RuntimeError, place.text(), " is an inference tensor: it can't be updated in place outside InferenceMode");
  }
  if (!is_ordinary(param)) return why_not_ordinary(param);
  if (!ordinary) return std::string("has a gradient that ") + why_not_ordinary(grad);
  if (!has_kernel_dtype(dtype)) return "has a dtype that the kernels do not cover";
  if (!same_order(param, grad)) return "has a gradient of another memory layout, or memory with gaps or overlaps";
  return {};
}

std::string why_not_covered(const at::Tensor& grad, const Place& place) {
  if (grad.is_inference() && !c10::InferenceMode::is_enabled()) {
    raise(PyExc_RuntimeError, "the gradient of ", place.text(),
          " is an inference tensor: it can't be changed in place outside InferenceMode");
  }
  if (!is_ordinary(grad)) return why_not_ordinary(grad);
  if (!has_kernel_dtype(grad.scalar_type())) return "has a dtype that the kernels do not cover";
  if (!grad.is_non_overlapping_and_dense()) return "has memory with gaps or overlaps";
  return {};
}

bool same_memory_layout(const at::Tensor& a, const at::Tensor& b) {
  return is_ordinary(a) && in_one_loop(a.scalar_type(), b.scalar_type()) && a.device() == b.device() &&
         a.sizes() == b.sizes() && same_order(a, b);
}

}  // namespace fastclip
