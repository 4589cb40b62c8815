// Takes one step over all parameter groups, and keeps its results (norm, statistics) until the next.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <optional>
#include <utility>
#include <vector>

#include "../step.h"
#include "groups.h"
#include "histories.h"
#include "part.h"
#include "walk.h"

namespace fastclip {

// Why the kernels did not take a step. `misplaced` are the parameters whose gradients have other placements than they
// have: all ranks have to redistribute these first, and call again.
struct NotCovered {
  Reason reason;
  std::vector<Held> misplaced;
};

// Owned by an optimizer.
class Engine {
 public:
  Engine(Rules::Id rule, Ranks ranks) : rule_(rule), walk_(rule, std::move(ranks)) {}
  Rules::Id rule() const { return rule_; }

  // One step over `groups` (a list of dicts) with `state` (a dict of dicts by parameter). Returns nothing when it was
  // taken, or skipped because found_inf says so; where the kernels do not cover it, nothing was changed. Raises for bad
  // input, and nothing was changed.
  std::optional<NotCovered> step(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf,
                                 PyObject* grad_factor);

  // Raises for what is wrong with one group alone.
  Group read(PyObject* group, Py_ssize_t index) const;

  // How many steps were taken, or skipped, by all engines of this process.
  static int64_t steps_taken();

  // Warns, once, that a step undoes what somebody wrote to a parameter that has master weights; `param` names it.
  void warn_of_undone(PyObject* param, int stack_level);

  // Clips the gradients of `params` (a list) in place: of the rule that does so. Returns as step does.
  std::optional<NotCovered> clip_grads(PyObject* params, double low, double high, NormClip norm_clip);

  // The norm before the norm clip of the last call, a float64 scalar on the parameters' device;
  // undefined if there was none to take.
  at::Tensor total_norm() const;

  // What the last step did to the gradients. Scalars on the parameters' device; undefined where there was no such clip.
  struct ClipStats {
    at::Tensor total_norm;        // float64
    at::Tensor coefficient;       // float64, of the norm clip
    at::Tensor clamped_fraction;  // float64: elements that the value clip moved, of those it looked at
    at::Tensor skipped;           // bool
    at::Tensor change;            // float64: that the clipped gradients make in the end
    at::Tensor max_norm;          // float64: the values of these limits
    at::Tensor skip_norm;         // float64
  };
  ClipStats clip_stats() const;

  // The measures of the gradients in the last step, float64 [parameters, 3], on the CPU, and the norm that they are
  // for. 0 without a gradient here; NaN where AMP skipped the step. Undefined if nothing was measured. Waits for the
  // device.
  std::pair<at::Tensor, Norm> measures_by_parameter() const;

  // Steps that were skipped since the engine was made, an int64 scalar on the parameters' device.
  at::Tensor skipped_steps() const;

 private:
  // What total_norm() and clip_stats() need to know about the last step that did not raise.
  struct LastStep {
    NormClip norm_clip;
    bool clamps = false;  // some group has a value clip
    bool asks_device = false;  // whether it was skipped
    bool skipped_by_host = false;
    Levels levels;  // where the host skipped it
    std::optional<c10::Device> device;  // of the first parameter
  };
  class Busy;

  void share_measures();
  void run(const NormClip& asked, const Amp& amp);
  void remember(const NormClip& norm_clip, bool skipped_by_host);
  bool asks_all_ranks(const NormClip& norm_clip) const;
  bool was_skipped() const;
  at::Tensor smallest_coefficient() const;
  at::Tensor change_of_segments() const;
  const Part* first_stepped() const;

  std::optional<NotCovered> not_covered();

  const Rules::Id rule_;
  Walk walk_;
  Histories histories_{walk_.borrowed(), walk_.states()};
  std::vector<Group> groups_;  // of the step being taken
  LastStep last_;
  int64_t skipped_by_host_ = 0;
  bool busy_ = false;
  bool warned_of_undone_ = false;
};

}  // namespace fastclip
