// Whether torch's tensors are laid out in memory as the headers say that this was compiled with.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace fastclip {

// What Python tells of a tensor.
struct Told {
  PyObject* tensor;
  uintptr_t address;  // of its implementation
  int64_t numel;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  PyObject* dtype;
  bool is_cpu;
  bool is_ordinary;  // dense, and neither negated nor conjugated
  bool is_contiguous;
  uintptr_t data;
  PyObject* grad;  // a tensor, or None
  int64_t version;
};

// Returns what is read differently here, as "numel"; nullptr where nothing is. What is a pointer is read last, so that
// a layout that does not fit is mostly found before one that is none is followed.
const char* misread(const Told& told);

// Counts a tensor's version up, as a step does.
void bump_version(PyObject* tensor);

}  // namespace fastclip
