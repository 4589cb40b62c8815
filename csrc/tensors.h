// Which tensors the kernels can take: dense memory, of the same element order, on a known device.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "step.h"

namespace fastclip {

// Where a tensor stands, for messages; the text is built only when one is needed.
struct Place {
  Py_ssize_t group;
  Py_ssize_t index;
  PyObject* names;  // the group's param_names, or nullptr
  bool in_optimizer = true;

  std::string text() const;  // "parameter 3 of group 0 ('encoder.bias')"
};

// nullptr where the kernels can step `param` by `grad`; otherwise why they can't, and plain torch
// has to. Raises where the two don't belong together, which plain torch would broadcast, promote or
// find out in the middle of a step.
const char* why_not_covered(const at::Tensor& param, const at::Tensor& grad, const Place& place);

// The same question about a gradient alone, to be clipped in place.
const char* why_not_covered(const at::Tensor& grad);

// Same dtype, device, sizes and element order: what a momentum buffer needs.
bool same_memory_layout(const at::Tensor& a, const at::Tensor& b);

DType dtype_of(const at::Tensor& covered);

}  // namespace fastclip
