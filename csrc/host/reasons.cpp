// Why a step is refused, or leaves the kernels. fastclip/reasons.py has the words: the host says which, and of what.
#include "reasons.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fastclip {
namespace {

template <class Arguments>
Held ask(const char* function, const Arguments& arguments) {
  const Held reasons = checked(PyImport_ImportModule("fastclip.reasons"));
  const Held callable = checked(PyObject_GetAttrString(reasons.object, function));
  std::vector<PyObject*> objects;
  for (const Held& argument : arguments) objects.push_back(argument.object);
  return checked(PyObject_Vectorcall(callable.object, objects.data(), objects.size(), nullptr));
}

Held number(Py_ssize_t value) { return checked(PyLong_FromSsize_t(value)); }

Held text_object(const Place& place, const char* part) {
  const std::initializer_list<Held> arguments = {number(place.index), place.in_optimizer ? number(place.group) : Held(Py_None),
                                                 Held(place.names ? place.names : Py_None), object_of(std::string(part))};
  return ask("named", arguments);
}

}  // namespace

std::string Place::text(const char* part) const {
  const Held text = text_object(*this, part);
  const char* const utf8 = PyUnicode_AsUTF8(text.object);
  if (!utf8) throw PythonError{};
  return utf8;
}

Held object_of(PyObject* object) { return Held(object); }

Held object_of(const at::Tensor& tensor) {
  return tensor.defined() ? checked(THPVariable_Wrap(tensor)) : Held(Py_None);
}

Held object_of(const std::string& text) { return checked(PyUnicode_FromString(text.c_str())); }

void raise_refusal(const char* name, std::initializer_list<Held> arguments) {
  const Held error = ask(name, arguments);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.object)), error.object);
  throw PythonError{};
}

Held Reason::words() const {
  std::vector<Held> arguments;
  if (place_) arguments.push_back(text_object(*place_, part_));
  for (const at::Tensor& tensor : tensors_) arguments.push_back(object_of(tensor));
  return ask(name_, arguments);
}

}  // namespace fastclip
