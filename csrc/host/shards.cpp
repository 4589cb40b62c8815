// DTensors: which part of them is here, and over which ranks sums have to be added up.
#include "shards.h"

#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>

namespace fastclip {
namespace {

struct Names {
  Name local_tensor{"_local_tensor"}, spec{"_spec"}, groups{"groups"};
  Name placed[3] = {Name("placements"), Name("mesh"), Name("shard_order")};
};
const Names& names() {
  static const Names all;
  return all;
}

Held attribute(PyObject* object, const Name& name) { return checked(PyObject_GetAttr(object, name.object)); }

// An attribute of a type's objects. DTensor has two in slots (`__slots__`): these are read where they lie, as to look
// one up takes longer than all that is done with it.
class Attribute {
 public:
  Attribute(PyTypeObject* type, const Name& name) : type_(type), name_(name) {
    const Held found = attribute(reinterpret_cast<PyObject*>(type), name);
    if (Py_TYPE(found.object) != &PyMemberDescr_Type) return;
    const PyMemberDef& member = *reinterpret_cast<PyMemberDescrObject*>(found.object)->d_member;
    if (member.type == T_OBJECT_EX) offset_ = member.offset;
  }

  Held of(PyObject* object) const {
    PyObject* value = nullptr;
    if (offset_ > 0 && Py_TYPE(object) == type_) {
      value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
    }
    return value ? Held(value) : attribute(object, name_);
  }

 private:
  PyTypeObject* const type_;
  const Name& name_;
  Py_ssize_t offset_ = 0;
};

struct DTensorType {
  PyTypeObject* type;
  Attribute local_tensor, spec;

  bool has(PyObject* object) const { return PyObject_TypeCheck(object, type); }
};

// Not imported here, which would take a second: where nobody has done so there is no DTensor, and this is nullptr.
const DTensorType* dtensor_type() {
  static const DTensorType* found = nullptr;
  if (found) return found;
  static const Name kModule("torch.distributed.tensor");
  const Held module = Held::stolen(PyImport_GetModule(kModule.object));
  if (!module.object) {
    if (PyErr_Occurred()) throw PythonError{};
    return nullptr;
  }
  Held object = checked(PyObject_GetAttrString(module.object, "DTensor"));
  auto* const type = reinterpret_cast<PyTypeObject*>(std::exchange(object.object, nullptr));  // never freed
  return found = new DTensorType{type, {type, names().local_tensor}, {type, names().spec}};
}

Held call(const Held& function, const std::vector<PyObject*>& arguments) {
  return checked(PyObject_Vectorcall(function.object, arguments.data(), arguments.size(), nullptr));
}

at::Tensor tensor_of(PyObject* object) { return object == Py_None ? at::Tensor() : THPVariable_Unpack(object); }

bool place_alike(PyObject* spec, PyObject* other) {
  return std::all_of(std::begin(names().placed), std::end(names().placed), [&](const Name& name) {
    const int same = PyObject_RichCompareBool(attribute(spec, name).object, attribute(other, name).object, Py_EQ);
    if (same < 0) throw PythonError{};
    return same == 1;
  });
}

}  // namespace

const at::Tensor& Shard::local() const { return THPVariable_Unpack(tensor.object); }

void Shard::keep_in(Borrowed& borrowed) && {
  borrowed.keep(std::move(whole));
  borrowed.keep(std::move(tensor));
}

std::optional<Shard> shard_of(const at::Tensor& tensor, PyObject* object) {
  if (!is_subclass(tensor)) return {};
  const DTensorType* const type = dtensor_type();
  if (!type || !type->has(object)) return {};
  Shard shard{Held(object), type->local_tensor.of(object), type->spec.of(object)};
  if (!is_tensor(shard.tensor.object)) {
    raise_refusal("no_tensor", {object_of("the local tensor of a DTensor"), object_of(shard.tensor.object)});
  }
  return shard;
}

std::optional<Shard> shard_of(const at::Tensor& tensor) {
  if (!is_subclass(tensor)) return {};
  return shard_of(tensor, object_of(tensor).object);
}

PyObject* Shards::deduplicated(Held reduction) {
  for (const Held& other : all_reductions_) {
    const int same = PyObject_RichCompareBool(other.object, reduction.object, Py_EQ);
    if (same < 0) throw PythonError{};
    if (same) return other.object;
  }
  return all_reductions_.emplace_back(std::move(reduction)).object;
}

// As one of this step.
PyObject* Shards::noted(PyObject* reduction) {
  if (reduction && std::find(reductions_.begin(), reductions_.end(), reduction) == reductions_.end()) {
    reductions_.push_back(reduction);
  }
  return reduction;
}

PyObject* Shards::reduction_of(const Shard& param, size_t position, const Place& place, bool replicated) {
  if (known_.size() <= position) known_.resize(position + 1);
  Known& known = known_[position];
  if (known.spec.object != param.spec.object || known.replicated != replicated) {
    const Held name = place.text();
    Held reduction = call(ranks_.reduction_of, {param.spec.object, name.object, replicated ? Py_True : Py_False});
    const int any = PyObject_IsTrue(attribute(reduction.object, names().groups).object);
    if (any < 0) throw PythonError{};
    known = {Held(param.spec.object), any || replicated ? deduplicated(std::move(reduction)) : nullptr, replicated};
  }
  return noted(known.reduction);
}

PyObject* Shards::replicated() {
  if (!replicated_) replicated_ = deduplicated(call(ranks_.reduction_of, {Py_None, Py_None, Py_True}));
  return noted(replicated_);
}

bool Shards::placed_as(const Shard& param, size_t position, const Shard& other) {
  PyObject* const spec = other.spec.object;
  if (spec == param.spec.object) return true;
  Known& known = known_[position];
  const auto is_spec = [&](const Held& alike) { return alike.object == spec; };
  if (std::any_of(known.placed_alike.begin(), known.placed_alike.end(), is_spec)) return true;
  if (!place_alike(param.spec.object, spec)) return false;
  known.placed_alike[known.next++ % known.placed_alike.size()] = Held(spec);
  return true;
}

std::pair<at::Tensor, at::Tensor> Shards::total(const std::vector<PartMeasure>& measures, Norm norm,
                                                const at::Tensor& found_inf, int64_t of_all) const {
  const Held reductions = checked(PyList_New(0)), pairs = checked(PyList_New(0));
  for (PyObject* reduction : reductions_) {
    if (PyList_Append(reductions.object, reduction) != 0) throw PythonError{};
  }
  for (const auto& [reduction, measure] : measures) {
    const Held tensor = object_of(measure);
    const Held pair = checked(PyTuple_Pack(2, reduction ? reduction : Py_None, tensor.object));
    if (PyList_Append(pairs.object, pair.object) != 0) throw PythonError{};
  }
  const Held order = checked(PyFloat_FromDouble(norm == Norm::inf ? HUGE_VAL : 2));
  const Held verdict = object_of(found_inf);
  const Held head = checked(PyLong_FromLongLong(of_all));
  const Held result =
      call(ranks_.total_measure, {reductions.object, pairs.object, order.object, verdict.object, head.object});
  borrowed_.check();
  return {tensor_of(PyTuple_GET_ITEM(result.object, 0)), tensor_of(PyTuple_GET_ITEM(result.object, 1))};
}

}  // namespace fastclip
