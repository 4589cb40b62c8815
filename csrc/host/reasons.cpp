// Why a step is refused, or leaves the kernels. fastclip/reasons.py has the words: the host says which, and of what.
#include "reasons.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fastclip {
namespace {

Held ask(const char* function, const std::vector<PyObject*>& arguments) {
  const Held reasons = checked(PyImport_ImportModule("fastclip.reasons"));
  const Held callable = checked(PyObject_GetAttrString(reasons.object, function));
  return checked(PyObject_Vectorcall(callable.object, arguments.data(), arguments.size(), nullptr));
}

std::vector<PyObject*> objects_of(const auto& arguments) {
  std::vector<PyObject*> objects;
  for (const Held& argument : arguments) objects.push_back(argument.object);
  return objects;
}

[[noreturn]] void raise_error(const Held& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.object)), error.object);
  throw PythonError{};
}

Held number(Py_ssize_t value) { return checked(PyLong_FromSsize_t(value)); }

}  // namespace

Held Place::text(const char* part) const {
  const Held parameter = number(index), in_group = in_optimizer ? number(group) : Held(Py_None);
  const Held part_name = object_of(std::string(part));
  return ask("named", {parameter.object, in_group.object, names ? names : Py_None, part_name.object});
}

Held object_of(PyObject* object) { return Held(object); }

Held object_of(const at::Tensor& tensor) {
  return tensor.defined() ? checked(THPVariable_Wrap(tensor)) : Held(Py_None);
}

Held object_of(const std::string& text) { return checked(PyUnicode_FromString(text.c_str())); }

void raise_refusal(const char* name, std::initializer_list<Held> arguments) {
  raise_error(ask(name, objects_of(arguments)));
}

void raise_refusal(const char* name, const Place& place, const char* part, std::initializer_list<Held> arguments) {
  const Held what = place.text(part);
  auto objects = objects_of(arguments);
  objects.insert(objects.begin(), what.object);
  raise_error(ask(name, objects));
}

Held Reason::words() const {
  std::vector<Held> arguments;
  if (place_) arguments.push_back(place_->text(part_));
  for (const at::Tensor& tensor : tensors_) arguments.push_back(object_of(tensor));
  return ask(name_, objects_of(arguments));
}

}  // namespace fastclip
