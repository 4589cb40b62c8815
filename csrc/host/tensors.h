// Which tensors the kernels can take: dense memory, of the same element order, on a known device.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <array>

#include "../step.h"
#include "python.h"
#include "reasons.h"

namespace fastclip {

// As THPVariable_Check, which asks Python whether a subclass is one.
inline bool is_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ||
         PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// The gradient, without the virtual calls of Tensor::grad(): this is read for every tensor at every step.
inline const at::Tensor& grad_of(const at::Tensor& param) {
  extern const at::Tensor kNoGradient;
  const auto* meta = static_cast<torch::autograd::AutogradMeta*>(param.unsafeGetTensorImpl()->autograd_meta());
  return meta ? meta->grad_ : kNoGradient;
}

// Keys of an ordinary dense tensor. Any other key (sparse, quantized, conjugated, negated, a Python
// subclass, functorch, ...) means that the memory alone does not tell the values.
extern const uint64_t kOtherKeys;    // all but the ordinary ones
extern const uint64_t kTellingKeys;  // these, and those of devices and of tensors that are not of inference mode

inline bool is_ordinary(c10::TensorImpl* tensor) { return (tensor->key_set().raw_repr() & kOtherKeys) == 0; }

// For every ScalarType its DType, or -1 where the kernels have none.
constexpr auto kDTypes = [] {
  std::array<int8_t, static_cast<size_t>(at::ScalarType::NumOptions)> dtypes{};
  for (auto& dtype : dtypes) dtype = -1;
  dtypes[static_cast<size_t>(at::kFloat)] = static_cast<int8_t>(DType::float32);
  dtypes[static_cast<size_t>(at::kDouble)] = static_cast<int8_t>(DType::float64);
  dtypes[static_cast<size_t>(at::kBFloat16)] = static_cast<int8_t>(DType::bfloat16);
  dtypes[static_cast<size_t>(at::kHalf)] = static_cast<int8_t>(DType::float16);
  return dtypes;
}();
inline bool has_kernel_dtype(at::ScalarType dtype) { return kDTypes[static_cast<size_t>(dtype)] >= 0; }
inline DType dtype_of(const at::Tensor& covered) {
  return static_cast<DType>(kDTypes[static_cast<size_t>(covered.scalar_type())]);
}

// The keys of ordinary tensors tell it without a call.
[[gnu::always_inline]] inline bool on_cpu(c10::TensorImpl* tensor) {
  return tensor->key_set().has_backend(c10::BackendComponent::CPUBit);
}
[[gnu::always_inline]] inline bool on_same_device(c10::TensorImpl* a, c10::TensorImpl* b) {
  return (on_cpu(a) && on_cpu(b)) || a->device() == b->device();
}

// The common cases of what follows, without a call. Ordinary tensors have sizes of their own, so the defaults are
// theirs.
[[gnu::always_inline]] inline bool is_contiguous(c10::TensorImpl* tensor) {
  return is_ordinary(tensor) && tensor->is_contiguous_default(at::MemoryFormat::Contiguous);
}
[[gnu::always_inline]] inline bool have_same_sizes(c10::TensorImpl* a, c10::TensorImpl* b) {
  const auto sizes_a = a->sizes_default(), sizes_b = b->sizes_default();
  if (sizes_a.size() != sizes_b.size()) return false;
  for (size_t i = 0; i < sizes_a.size(); ++i) {
    if (sizes_a[i] != sizes_b[i]) return false;
  }
  return true;
}
// Whether a tensor is as most are: ordinary, contiguous, writable, and of a dtype that the kernels have.
[[gnu::always_inline]] inline bool is_plain(c10::TensorImpl* tensor) {
  return is_contiguous(tensor) && !tensor->is_inference() &&
         has_kernel_dtype(c10::typeMetaToScalarType(tensor->dtype()));
}
// Whether a tensor is plain, and of the same dtype, device and sizes as another that is.
[[gnu::always_inline]] inline bool is_like(c10::TensorImpl* tensor, c10::TensorImpl* plain) {
  // One comparison of keys tells all that they say of both.
  return ((tensor->key_set().raw_repr() ^ plain->key_set().raw_repr()) & kTellingKeys) == 0 &&
         tensor->is_contiguous_default(at::MemoryFormat::Contiguous) && tensor->dtype() == plain->dtype() &&
         (on_cpu(plain) || tensor->device() == plain->device()) && have_same_sizes(tensor, plain);
}

// Raises for a gradient that does not fit its parameter: plain torch would broadcast, promote, or fail halfway.
void check_belongs(const at::Tensor& param, const at::Tensor& grad, const Place& place);

// Raises for what can't be written to: a parameter, or a part of it.
void check_inference(const at::Tensor& tensor, const char* part, const Place& place);

// Returns the one of the two that the kernels do not take; nullptr where they take both. A gradient that is clipped in
// place is given as both.
const at::Tensor* uncovered(const at::Tensor& param, const at::Tensor& grad);

// Same device, sizes and element order: what codes need.
bool same_elements(const at::Tensor& a, const at::Tensor& b);
// And dtypes that one loop takes: what a state needs.
bool same_memory_layout(const at::Tensor& a, const at::Tensor& b);

inline const char* text_of(const char* part) { return part; }
inline const char* text_of(const Name* state) { return state->text; }
// Returns the address of a tensor's first element; `bytes` is the size of all of them. Raises for memory that is not
// there: FSDP, for one, frees the storage of a parameter that it has no use for, and leaves the sizes as they were.
template <class Part>
[[gnu::always_inline]] inline void* data_of(const at::Tensor& covered, int64_t item_size, int64_t bytes, Part* part,
                                            const Place& place) {
  c10::TensorImpl* const impl = covered.unsafeGetTensorImpl();
  auto* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const int64_t begin = impl->storage_offset_default() * item_size;
  if (begin + bytes > static_cast<int64_t>(storage->nbytes()) && bytes > 0) refuse("no_memory", place, text_of(part));
  return static_cast<char*>(storage->mutable_data()) + begin;
}

inline bool is_16_bit(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

}  // namespace fastclip
