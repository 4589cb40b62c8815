// Python for the host: errors, references, interned names.
#pragma once

#include <Python.h>
#include <c10/macros/Macros.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <utility>

namespace fastclip {

// A Python error is set and on its way to the caller.
struct PythonError {};

// Raises type(message); the message is put together of all parts.
template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void raise(PyObject* type, const Parts&... parts) {
  PyErr_SetString(type, std::string(c10::str(parts...)).c_str());
  throw PythonError{};
}

// A reference, or none. Reading a number may run Python, and let other threads run: what was borrowed from a dict or
// a list may be gone afterwards.
struct Held {
  PyObject* object = nullptr;
  Held() = default;
  explicit Held(PyObject* object) : object(object) { Py_XINCREF(object); }
  Held(Held&& other) noexcept : object(std::exchange(other.object, nullptr)) {}
  Held& operator=(Held other) noexcept {
    std::swap(object, other.object);
    return *this;
  }
  ~Held() { Py_XDECREF(object); }

  static Held stolen(PyObject* new_reference) {
    Held held;
    held.object = new_reference;
    return held;
  }
};

// Takes over the new reference that a call into Python returns, or throws where that has raised.
inline Held checked(PyObject* new_reference) {
  if (!new_reference) throw PythonError{};
  return Held::stolen(new_reference);
}

// An interned string, never freed: a key of a dict or the name of an attribute.
struct Name {
  PyObject* object;
  const char* text;
  explicit Name(const char* name) : object(PyUnicode_InternFromString(name)), text(PyUnicode_AsUTF8(object)) {}
};

// A number that changes whenever the dict does, and that no other dict has or had; 0 where Python keeps none, as from
// 3.14 on.
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
  const auto* const fields = reinterpret_cast<PyDictObject*>(dict);
  C10_DIAGNOSTIC_PUSH_AND_IGNORED_IF_DEFINED("-Wdeprecated-declarations")
  return fields->ma_values ? 0 : fields->ma_version_tag;  // an object may own these values, and write to them
  C10_DIAGNOSTIC_POP()
#else
  return 0;
#endif
}

// Reads a dict whose keys mostly come in a known order: a key is looked up only where it is not the next one.
class DictInOrder {
 public:
  explicit DictInOrder(PyObject* dict) : dict_(dict) {}

  // Returns a borrowed reference, nullptr where there is none.
  [[gnu::always_inline]] PyObject* value(const Name& name) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t next = next_;
    if (PyDict_Next(dict_, &next, &key, &value) && key == name.object) {
      next_ = next;
      return value;
    }
    value = PyDict_GetItemWithError(dict_, name.object);
    if (!value && PyErr_Occurred()) throw PythonError{};
    return value;
  }

 private:
  PyObject* dict_;
  Py_ssize_t next_ = 0;
};

inline std::string repr(PyObject* value) {
  const Held text = Held::stolen(PyObject_Repr(value));
  const char* const utf8 = text.object ? PyUnicode_AsUTF8(text.object) : nullptr;
  if (utf8) return utf8;
  PyErr_Clear();
  return "?";
}

}  // namespace fastclip
