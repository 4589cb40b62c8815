// What the rules among the limits remember: states of the optimizer, which stand beside those of one parameter.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <vector>

#include "../step.h"
#include "borrowed.h"
#include "groups.h"
#include "part.h"
#include "states.h"

namespace fastclip {

class Histories {
 public:
  Histories(Borrowed& borrowed, States& states) : borrowed_(borrowed), states_(states) {}

  // Finds those that the limits need, or makes them, for a step that `part` takes; `groups` are all of the optimizer.
  // Raises where what is there is none.
  void prepare(const std::vector<Group>& groups, Part& part);
  // Those of the segments' limits. That of a group stands beside one of its parameters, that of a parameter beside it.
  void prepare_segments(const std::vector<Group>& groups, std::vector<Part>& parts);
  // Those of the clip that a rule has of its own, of each group, beside one of its parameters.
  void prepare_model_norms(const std::vector<Group>& groups, Part& part);
  // The levels before the step. Waits for the device.
  Levels levels(const Limits& limits) const;
  void end();

 private:
  struct OfLimit {
    const Name& name;    // in the state
    Py_ssize_t hint = 0;  // where its holder was found in the state
    const at::Tensor* tensor = nullptr;  // borrowed for the step; nullptr where the limit is no rule
  };
  History* of_group(const std::vector<Group>& groups, const Segment& segment, size_t first, c10::Device device);
  History* of_parameter(const std::vector<Group>& groups, const Segment& segment, size_t first, c10::Device device);
  // Finds what stands beside one of a group's parameters, if there is one; `first` is the position of the first of
  // these among all.
  bool find_in_group(const std::vector<Group>& groups, size_t group, size_t first, const Name& name, Held& found,
                     PyObject*& entry);
  // Returns the memory of one that was found in an entry of the state.
  History* use(Held found, PyObject* entry, const Name& name, const NormLimit& limit, c10::Device device,
               const at::Tensor*& tensor);
  // Returns its memory, nullptr where the limit is no rule.
  History* prepare(OfLimit& history, const NormLimit& limit, const std::vector<Group>& groups, c10::Device device);

  Borrowed& borrowed_;
  States& states_;
  OfLimit of_max_norm_{max_norm_name()}, of_skip_norm_{skip_norm_name()};
  std::vector<size_t> holders_;  // of each group: the parameter of it that the group's history stood beside

  static const Name& max_norm_name();
  static const Name& skip_norm_name();
};

}  // namespace fastclip
