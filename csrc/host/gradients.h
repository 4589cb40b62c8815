// The gradients that a deferred clip is of: which tensors they are, and whether somebody has changed them since.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <unordered_map>
#include <vector>

namespace fastclip {

class Gradients {
 public:
  // Those of `params`, a list of tensors, that have one.
  explicit Gradients(PyObject* params);

  // Whether they are all gradients of these groups (a list of dicts), each of them once.
  bool are_those_of(PyObject* groups) const;

  struct Change {
    bool gone = true;       // none of them is left: nothing remains of what was asked of them
    bool joined = false;    // a parameter of the groups has a gradient that had none
    Py_ssize_t group = -1;  // the first of their parameters whose gradient is another one, or was written to
    Py_ssize_t index = -1;
  };
  // What became of them. A parameter that has lost its gradient does not count.
  Change changed_in(PyObject* groups) const;

  // Whether `param` has one of them.
  bool has(PyObject* param) const;

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    const void* param;  // only compared
    Weak grad;          // keeps no memory, and its address for itself
    uint32_t version;
  };
  // `next` is where it should be, and becomes the place after it.
  const Entry* find(const void* param, size_t& next) const;

  std::vector<Entry> entries_;
  std::unordered_map<const void*, size_t> places_;  // of the parameters
  bool distinct_ = true;
};

}  // namespace fastclip
