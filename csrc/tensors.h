// Which tensors the kernels can take: dense memory, of the same element order, on a known device.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <string>

#include "step.h"

namespace fastclip {

// Where a tensor stands, for messages; the text is built only when one is needed.
struct Place {
  Py_ssize_t group;
  Py_ssize_t index;
  PyObject* names;  // the group's param_names, or nullptr
  PyObject* param;
  bool in_optimizer = true;

  std::string text() const;  // "parameter 3 of group 0 ('encoder.bias')"
};

// The gradient, without the virtual calls of Tensor::grad(): this is read for every tensor at every step.
inline const at::Tensor& grad_of(const at::Tensor& param) {
  extern const at::Tensor kNoGradient;
  const auto* meta = static_cast<torch::autograd::AutogradMeta*>(param.unsafeGetTensorImpl()->autograd_meta());
  return meta ? meta->grad_ : kNoGradient;
}

// The first element's address; `covered` has ordinary memory.
[[gnu::always_inline]] inline void* data_of(const at::Tensor& covered, DType dtype) {
  c10::TensorImpl* impl = covered.unsafeGetTensorImpl();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  return static_cast<char*>(storage->mutable_data()) + impl->storage_offset() * item_size(dtype);
}

// Whether all its elements are in memory; `covered` is dense. FSDP, for one, frees the storage of a parameter that it has
// no use for, and leaves the sizes as they were.
[[gnu::always_inline]] inline bool is_in_memory(const at::Tensor& covered) {
  c10::TensorImpl* impl = covered.unsafeGetTensorImpl();
  const auto end = (impl->storage_offset() + impl->numel()) * static_cast<int64_t>(impl->itemsize());
  return impl->numel() == 0 || end <= static_cast<int64_t>(impl->unsafe_storage().unsafeGetStorageImpl()->nbytes());
}

// Keys of an ordinary dense tensor. Any other key (sparse, quantized, conjugated, negated, a Python
// subclass, functorch, ...) means that the memory alone does not tell the values.
extern const uint64_t kOtherKeys;  // all but the ordinary ones

inline bool is_ordinary(c10::TensorImpl* tensor) {
  return (tensor->key_set().raw_repr() & kOtherKeys) == 0;
}

inline bool has_kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// The common case of why_not_covered(param, grad) == nullptr, without a call: both contiguous and of
// the same sizes, and so of the same element order.
[[gnu::always_inline]] inline bool is_plainly_covered(const at::Tensor& param, const at::Tensor& grad) {
  c10::TensorImpl* const p = param.unsafeGetTensorImpl();
  c10::TensorImpl* const g = grad.unsafeGetTensorImpl();
  if (!is_ordinary(p) || !is_ordinary(g) || p->dtype() != g->dtype() || p->is_inference() ||
      !p->is_contiguous_default(at::MemoryFormat::Contiguous) ||
      !g->is_contiguous_default(at::MemoryFormat::Contiguous) ||
      !((p->is_cpu() && g->is_cpu()) || p->device() == g->device())) {
    return false;
  }
  const auto of_p = p->sizes(), of_g = g->sizes();
  if (of_p.size() != of_g.size()) return false;
  for (size_t i = 0; i < of_p.size(); ++i) {
    if (of_p[i] != of_g[i]) return false;
  }
  return has_kernel_dtype(c10::typeMetaToScalarType(p->dtype()));
}

// nullptr where the kernels can step `param` by `grad`; otherwise why they can't, and plain torch
// has to. Raises where the two don't belong together, which plain torch would broadcast, promote or
// find out in the middle of a step.
const char* why_not_covered(const at::Tensor& param, const at::Tensor& grad, const Place& place);

// The same question about a gradient alone, to be clipped in place.
const char* why_not_covered(const at::Tensor& grad, const Place& place);

// Same device, sizes and element order, and dtypes that one loop takes: what a state needs.
bool same_memory_layout(const at::Tensor& a, const at::Tensor& b);

inline bool is_16_bit(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

[[gnu::always_inline]] inline DType dtype_of(const at::Tensor& covered) {
  switch (covered.scalar_type()) {
    case at::kDouble: return DType::float64;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: return DType::float32;
  }
}

}  // namespace fastclip
