// Why a step is refused, or leaves the kernels. fastclip/reasons.py has the words: the host says which, and of what.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "python.h"

namespace fastclip {

// Where a tensor stands, for messages; the text is built only when one is needed.
struct Place {
  Py_ssize_t group;
  Py_ssize_t index;
  PyObject* names;  // the group's param_names, or nullptr
  PyObject* param;
  bool in_optimizer = true;

  // "the step of parameter 3 of group 0 ('encoder.bias')", a str; `part` is a gradient or a state, or "". Runs Python.
  Held text(const char* part = "") const;
};

Held object_of(PyObject* object);
Held object_of(const at::Tensor& tensor);  // None for one that is undefined
Held object_of(const std::string& text);

// Raises the error that fastclip.reasons.<name> returns.
[[noreturn, gnu::cold]] void raise_refusal(const char* name, std::initializer_list<Held> arguments);
// The first argument is the text of a part of a parameter.
[[noreturn, gnu::cold]] void raise_refusal(const char* name, const Place& place, const char* part,
                                           std::initializer_list<Held> arguments);

template <class... Arguments>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const char* name, const Place& place, const char* part,
                                                   const Arguments&... arguments) {
  raise_refusal(name, place, part, {object_of(arguments)...});
}

// Why the kernels leave a step to plain torch. The words come later: no Python may run in the middle of a walk.
class Reason {
 public:
  // The name of a function of fastclip/reasons.py, and its arguments.
  explicit Reason(const char* name) : name_(name) {}
  Reason(const char* name, std::vector<at::Tensor> tensors) : name_(name), tensors_(std::move(tensors)) {}
  Reason(const char* name, const Place& place, const char* part, std::vector<at::Tensor> tensors)
      : name_(name), place_(place), part_(part), names_(place.names), tensors_(std::move(tensors)) {}

  Held words() const;

 private:
  const char* name_;
  std::optional<Place> place_;
  const char* part_ = "";
  Held names_;
  std::vector<at::Tensor> tensors_;
};

}  // namespace fastclip
