// Reads an optimizer's param_groups: hyperparameters, checked, and the clip they ask for.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>

#include "../step.h"
#include "python.h"

namespace fastclip {

// The clip over all gradients of all groups.
struct NormClip {
  Norm norm = Norm::none;
  Limits limits;
  Scope scope = Scope::global;  // if not global, max_norm is not among `limits`, but each group has its own
  bool skip_nonfinite = false;
  bool measures_deltas = false;  // what is added to some parameters is measured before the update
  bool limits_segments = false;  // some segment has a limit on its change
  bool needs_norms = false;  // the rule's updates depend on the norm of each parameter's gradient
  int64_t segments = 0;      // number of all groups, or of all parameters, where these have norms

  // What has a norm of its own, for its limit or for the rule.
  Scope segment_scope() const { return needs_norms ? Scope::parameter : scope; }
  // Whether the norm of parameters counts also where they have no gradient in this step.
  bool counts_unstepped() const { return limits.counts_params() && scope != Scope::parameter; }
  // No kernel measures it over several devices, or ranks.
  bool is_local() const { return measures_deltas || limits_segments; }
  bool measures() const { return norm != Norm::none || skip_nonfinite || needs_norms; }

  // A step may find out on the device that it changes nothing.
  bool may_skip() const { return skip_nonfinite || limits.skip_norm.ceiling < HUGE_VAL || limits.skip_norm.is_rule(); }

  bool operator==(const NormClip& other) const {
    return norm == other.norm && limits == other.limits && scope == other.scope &&
           skip_nonfinite == other.skip_nonfinite;
  }
};

struct Group {
  Held params;       // the group's own list or tuple
  Held param_names;  // a list, or none
  Held lr_tensor;    // lr as a tensor on another device than the CPU, or none
  Hyper hyper;
  NormClip norm_clip;
  bool measures_deltas = false;  // of this group
  ChangeLimits
      segment_change;  // the limits on the change of what has a norm of its own; with a Scope other than global
  NormLimit segment_limit;  // of the group's gradients, or of each of them; with a Scope other than global
  bool norm_replicated;  // all ranks of a norm_process_group have its parameters
  bool differentiable;  // the caller wants gradients through the step
  bool master_weights;  // 16-bit parameters have a float32 copy among their states
  bool quantizes_states;  // they are made in 8 bits
  std::optional<c10::ScalarType> momentum_dtype;  // of the rule's momentum, where it is made
};

// Raises ValueError, TypeError or KeyError that names the argument, its value and the group.
Group read_group(PyObject* group, Py_ssize_t index, Rules::Id rule);

// Bounds of a value clip: None -> (-inf, inf), δ -> (-δ, δ), (low, high) as it is.
void read_clip_value(PyObject* value, const std::string& where, double* low, double* high);
NormClip read_norm_clip(PyObject* max_norm, PyObject* norm_type, const std::string& where);

}  // namespace fastclip
