// Takes one step over all parameter groups, and keeps its results (norm, statistics) until the next.
#include "engine.h"

#include <ATen/ops/full.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cmath>

namespace fastclip {
namespace {

std::atomic<int64_t> steps_taken_of_all = 0;

at::Tensor optional_scalar(PyObject* object, const char* name) {
  if (object == Py_None) return {};
  if (!THPVariable_Check(object) || THPVariable_Unpack(object).numel() != 1) {
    raise(PyExc_TypeError, name, " must be None or a 1-element tensor");
  }
  return THPVariable_Unpack(object).detach();
}

// A mode (fake tensors, tracing, ...) or a functorch transform has to see operations; the kernels are none.
bool something_watches_operations() {
  using c10::DispatchKey;
  static const c10::DispatchKeySet transforms({DispatchKey::FuncTorchDynamicLayerFrontMode,
                                               DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::Functionalize,
                                               DispatchKey::PythonDispatcher, DispatchKey::PreDispatch});
  return c10::impl::dispatch_mode_enabled() ||
         !(c10::impl::tls_local_dispatch_key_set().included_ & transforms).empty();
}

}  // namespace

// Marks the engine as in use: its memory is one step's, and the GIL is released in the middle.
class Engine::Busy {
 public:
  explicit Busy(Engine& engine) : engine_(engine) {
    if (engine.busy_) raise(PyExc_RuntimeError, "this optimizer is being stepped by another thread");
    engine.busy_ = true;
    engine.walk_.begin();
  }
  ~Busy() {
    engine_.histories_.end();
    engine_.walk_.end();
    engine_.groups_.clear();
    engine_.busy_ = false;
  }

 private:
  Engine& engine_;
};

Group Engine::read(PyObject* object, Py_ssize_t index) const {
  Group group = read_group(object, index, rule_);
  const NormClip& clip = group.norm_clip;
  if (walk_.shards().beyond() && (clip.scope == Scope::group || clip.limits.counts_params())) {
    raise(PyExc_ValueError, clip.scope == Scope::group ? "norm_scope='group'" : "max_relative_change",
          " in param_groups[", index, "] can't be set beside norm_process_group: other ranks have ",
          "groups and parameters that this one knows nothing of");
  }
  if (walk_.shards().beyond() && needs_products(rule_)) {
    raise(PyExc_ValueError,
          "norm_process_group can't be set in an optimizer of this rule, whose steps follow from sums ",
          "over whole parameters that are here");
  }
  return group;
}

std::optional<NotCovered> Engine::step(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf,
                                       PyObject* grad_factor) {
  const Busy busy(*this);
  if (!PyList_Check(groups) && !PyTuple_Check(groups)) {
    raise_refusal("no_list", {object_of("param_groups"), object_of(groups)});
  }
  States& states = walk_.states();
  states.begin(state);
  const at::Tensor scale = optional_scalar(grad_scale, "grad_scale");
  const at::Tensor inf = optional_scalar(found_inf, "found_inf");
  const at::Tensor factor = optional_scalar(grad_factor, "grad_factor");
  // All groups first: reading a number may run Python.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(groups); ++i) {
    const Held group(PySequence_Fast_GET_ITEM(groups, i));
    groups_.push_back(read(group.object, i));
    if (!(groups_.back().norm_clip == groups_.front().norm_clip)) {
      raise_refusal("not_shared", {Held(groups), Held::stolen(PyLong_FromSsize_t(i))});
    }
  }
  share_measures();
  if (something_watches_operations()) walk_.not_covered(Reason("watched"));
  for (size_t i = 0; i < groups_.size(); ++i) walk_.add_group(groups_[i], static_cast<Py_ssize_t>(i));
  const NormClip norm_clip = groups_.empty() ? NormClip{} : groups_.front().norm_clip;
  if (norm_clip.is_local() || needs_products(rule_)) {
    if (walk_.shards().beyond()) walk_.not_covered(Reason("no_kernels_over_ranks"));
    if (walk_.devices() > 1) walk_.not_covered(Reason("no_kernels_over_devices"));
  }
  const bool measures_more =
      norm_clip.is_local() || norm_clip.limits.counts_params() || norm_clip.limits.measures_change;
  for (const Part& part : walk_.parts()) {
    if (!part.takes_codes(measures_more)) walk_.not_covered(Reason("no_kernels_for_these_codes"));
  }
  if (walk_.shards().beyond() && norm_clip.measures()) walk_.await_others();
  // Empty tensors share no memory.
  if (!walk_.reason() && (walk_.shares_memory() || states.makes_twice())) walk_.not_covered(Reason("shared_memory"));
  if (walk_.reason()) return not_covered();
  if (walk_.undone() && !warned_of_undone_) {
    walk_.borrowed().hold();
    constexpr int kCallerOfStep = 4;
    warn_of_undone(walk_.undone()->text().object, kCallerOfStep);
  }

  Part* const first = norm_clip.limits.has_rules() ? first_in_use(walk_.parts()) : nullptr;
  if (first) histories_.prepare(groups_, *first);
  if (norm_clip.scope != Scope::global) histories_.prepare_segments(groups_, walk_.parts());
  if (needs_products(rule_)) {
    if (Part* const part = first_in_use(walk_.parts())) histories_.prepare_model_norms(groups_, *part);
  }
  if (states.has_new()) {  // a replay would make them again each time
    for (const Part& part : walk_.parts()) {
      if (part.in_use() && part.is_capturing()) part.raise_capturing();
    }
  }
  // A skipped step must leave "no state yet" as it is. Where there are none to make, a GPU decides by itself
  // and nobody waits.
  const bool joint = asks_all_ranks(norm_clip);  // and then no rank skips by itself, while others wait for it
  if (inf.defined() && !joint && (inf.is_cpu() || states.has_new()) && inf.item<float>() != 0) {
    remember(norm_clip, /*skipped_by_host=*/true);
    last_.levels = histories_.levels(norm_clip.limits);
    ++skipped_by_host_;
    ++steps_taken_of_all;
    return {};
  }
  states.prepare();
  run(norm_clip, {scale, factor, inf});
  ++steps_taken_of_all;
  if (states.has_new() && !((norm_clip.may_skip() || (joint && inf.defined())) && was_skipped())) {
    states.store();
  }
  return {};
}

// What one group measures concerns the passes over all. With a Scope other than global, a group does not know whether
// another one has a limit: all ask for the norm, which may not be needed.
void Engine::share_measures() {
  bool limits = false, changes = false, params = false, deltas = false;
  for (const Group& group : groups_) {
    limits |= group.segment_limit.is_set();
    changes |= group.segment_change.measures_change;
    params |= group.segment_change.measures_params;
    deltas |= group.measures_deltas;
  }
  for (Group& group : groups_) {
    NormClip& clip = group.norm_clip;
    if (clip.scope != Scope::global && !limits && !changes) {
      clip.scope = Scope::global;
      if (!clip.limits.skip_norm.is_set()) clip.norm = Norm::none;
    }
    if (deltas && clip.norm == Norm::none) clip.norm = Norm::two;  // measured beside them at no byte
    clip.measures_deltas = deltas;
    clip.limits_segments = changes;
    (deltas ? clip.limits.on_delta.measures_params : clip.limits.measures_params) |= params;
  }
}

int64_t Engine::steps_taken() { return steps_taken_of_all; }

std::optional<NotCovered> Engine::clip_grads(PyObject* params, double low, double high, NormClip norm_clip) {
  const Busy busy(*this);
  if (something_watches_operations()) walk_.not_covered(Reason("watched"));
  Group group{};
  group.params = Held(params);
  group.norm_clip = norm_clip;
  group.hyper.clip_low = low;
  group.hyper.clip_high = high;
  walk_.add_group(group, 0);
  if (!walk_.reason() && walk_.shares_memory()) walk_.not_covered(Reason("shared_memory"));
  if (walk_.reason()) return not_covered();
  run(norm_clip, {});
  return {};
}

std::optional<NotCovered> Engine::not_covered() {
  return NotCovered{std::move(*walk_.reason()), walk_.shards().take_misplaced()};
}

// Once: whoever does it does it at every step.
void Engine::warn_of_undone(PyObject* param, int stack_level) {
  if (warned_of_undone_) return;
  warned_of_undone_ = true;
  const char* const message =
      "%U was written to, and this step changes it back: with master_weights the float32 copy in the state is "
      "what is updated. To keep what was written, delete optimizer.state[p]['master_param'] of each such parameter p; "
      "the next step makes it of the parameter";
  if (PyErr_WarnFormat(PyExc_UserWarning, stack_level, message, param) != 0) throw PythonError{};
}

void Engine::remember(const NormClip& norm_clip, bool skipped_by_host) {
  last_ = {norm_clip, false, false, skipped_by_host, {}, walk_.first_device()};
  for (const Group& group : groups_) last_.clamps |= clips_value(group.hyper);
  for (Part& part : walk_.parts()) {
    part.stepped = part.keeps_tables = part.in_use() && !skipped_by_host;
    part.stepped_clampable = part.stepped ? part.step.clampable : 0;
    part.stepped_segments = part.stepped ? static_cast<int64_t>(part.step.segments.size()) : 0;
    last_.asks_device |= part.stepped && (part.step.found_inf || norm_clip.may_skip());
  }
}

void Engine::run(const NormClip& asked, const Amp& amp) {
  NormClip norm_clip = asked;
  // Looking for inf and NaN is taking the inf norm, and clipping nothing.
  if (asked.measures() && asked.norm == Norm::none) norm_clip.norm = asked.needs_norms ? Norm::two : Norm::inf;
  if (asked.limits.counts_params()) {
    norm_clip.limits.smallest_norm = smallest_norm(asked.norm, walk_.measured_params());
  }
  const Scope scope = asked.segment_scope();
  norm_clip.segments = scope == Scope::group       ? static_cast<int64_t>(groups_.size())
                       : scope == Scope::parameter ? walk_.parameters()
                                                   : 0;
  auto& parts = walk_.parts();
  const bool gil_is_released =
      std::any_of(parts.begin(), parts.end(), [](const auto& part) { return part.releases_gil(); });
  walk_.borrowed().check();
  if (gil_is_released) walk_.borrowed().hold_all();
  if (asks_all_ranks(asked)) walk_.borrowed().hold();  // Python adds up
  if (scope != Scope::global) {
    for (Part& part : parts) {
      part.step.segment_limits.clear();
      for (const Group& group : groups_) part.step.segment_limits.push_back(group.segment_limit);
      if (!asked.limits_segments) continue;
      for (const Group& group : groups_) part.step.segment_changes.push_back(group.segment_change);
    }
  }
  run_parts(parts, norm_clip, amp, walk_.shards());
  remember(asked, /*skipped_by_host=*/false);
  walk_.end_step();
}

bool Engine::asks_all_ranks(const NormClip& norm_clip) const {
  return walk_.shards().over_ranks() && norm_clip.measures();
}

// Whether the step just taken changed nothing. Waits for the device: asked only after a step that made states, which a
// skipped step must not leave behind.
bool Engine::was_skipped() const {
  const Part* const part = first_stepped();
  return part && part->skipped().item<int64_t>() != 0;
}

const Part* Engine::first_stepped() const {
  const auto found =
      std::find_if(walk_.parts().begin(), walk_.parts().end(), [](const auto& part) { return part.stepped; });
  return found == walk_.parts().end() ? nullptr : &*found;
}

// Copies, here and below: the next step writes over what it was, and whoever logs may look later.
at::Tensor Engine::total_norm() const {
  if (last_.norm_clip.norm == Norm::none) return {};
  if (last_.skipped_by_host)
    return at::full({}, HUGE_VAL, at::TensorOptions().dtype(at::kDouble).device(last_.device.value_or(at::kCPU)));
  if (const Part* part = first_stepped()) return part->total_norm().clone();
  if (!last_.device) return {};
  return at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(*last_.device));  // of no gradients
}

Engine::ClipStats Engine::clip_stats() const {
  const Part* const first = first_stepped();
  const auto options = at::TensorOptions().device(first ? first->device : last_.device.value_or(at::kCPU));
  const Limits& limits = last_.norm_clip.limits;
  ClipStats stats;
  stats.total_norm = total_norm();
  if (last_.asks_device) {
    stats.skipped = first->skipped().ne(0);
  } else {
    stats.skipped = at::full({}, last_.skipped_by_host, options.dtype(at::kBool));
  }
  if (stats.total_norm.defined()) {
    const double norm = last_.skipped_by_host ? HUGE_VAL : 0;  // where nothing was measured
    const Decision of_none = decision_at(norm, limits, last_.levels);
    const auto number = [&](at::Tensor (Part::*of_part)() const, double value) {
      return first ? (first->*of_part)().clone() : at::full({}, value, options.dtype(at::kDouble));
    };
    stats.coefficient = number(&Part::coefficient, of_none.scaling.product());
    if (last_.norm_clip.scope != Scope::global || needs_products(rule_))
      stats.coefficient = smallest_coefficient().to(options.device());
    if (limits.max_norm.is_set()) stats.max_norm = number(&Part::max_norm, of_none.max_norm);
    if (limits.skip_norm.is_set()) stats.skip_norm = number(&Part::skip_norm, of_none.skip_norm);
  }
  if (last_.norm_clip.limits_segments) {
    stats.change = change_of_segments().to(options.device());
  } else if (limits.measures_change || limits.on_delta.measures_change) {
    stats.change = first ? first->change().clone() : at::zeros({}, options.dtype(at::kDouble));
  }
  if (last_.clamps) {
    stats.clamped_fraction = at::zeros({}, options.dtype(at::kDouble));
    int64_t clampable = 0;
    for (const Part& part : walk_.parts()) {
      if (part.stepped_clampable == 0) continue;
      clampable += part.stepped_clampable;
      stats.clamped_fraction += part.clamped().sum().to(options.device(), /*non_blocking=*/part.device.is_cuda());
    }
    if (clampable > 0) stats.clamped_fraction /= static_cast<double>(clampable);
    stats.clamped_fraction.masked_fill_(stats.skipped, 0);  // nothing was written then, and not this either
  }
  return stats;
}

// Of all segments; 0 where the step was skipped.
at::Tensor Engine::smallest_coefficient() const {
  at::Tensor smallest = at::ones({}, at::TensorOptions().dtype(at::kDouble));
  for (const Part& part : walk_.parts()) {
    if (!part.stepped || part.stepped_segments == 0) continue;
    const at::Tensor of_part = part.segment_coefficients().min().masked_fill(part.skipped().ne(0), 0);
    smallest = at::minimum(smallest.to(of_part.device()), of_part);
  }
  return last_.skipped_by_host ? at::zeros_like(smallest) : smallest;
}

// Of all segments together; 0 where the step was skipped.
at::Tensor Engine::change_of_segments() const {
  const bool largest = last_.norm_clip.norm == Norm::inf;
  at::Tensor change = at::zeros({}, at::TensorOptions().dtype(at::kDouble));
  for (const Part& part : walk_.parts()) {
    if (!part.stepped || part.stepped_segments == 0) continue;
    const at::Tensor of_part = part.segment_changes();
    change = largest ? of_part.max() : of_part.square().sum().sqrt();
    change = change.masked_fill(part.skipped().ne(0), 0);
  }
  return last_.skipped_by_host ? at::zeros_like(change) : change;
}

std::pair<at::Tensor, Norm> Engine::measures_by_parameter() const {
  const NormClip& clip = last_.norm_clip;
  if (!clip.measures() || !last_.device) return {{}, Norm::none};
  const Norm norm = clip.norm != Norm::none ? clip.norm : clip.needs_norms ? Norm::two : Norm::inf;
  at::Tensor measures = at::full({walk_.parameters(), kParts}, last_.skipped_by_host ? NAN : 0.0, at::kDouble);
  auto* const rows = static_cast<Measure*>(measures.mutable_data_ptr());
  for (const Part& part : walk_.parts()) {
    if (!part.stepped) continue;
    if (!part.keeps_tables) return {{}, Norm::none};
    const std::vector<Measure> of_part = part.measures_by_tensor();
    for (size_t i = 0; i < of_part.size(); ++i) combine(norm, rows[part.step.tensors[i].index], of_part[i]);
  }
  return {measures, norm};
}

at::Tensor Engine::skipped_steps() const {
  at::Tensor count =
      at::full({}, skipped_by_host_, at::TensorOptions().dtype(at::kLong).device(last_.device.value_or(at::kCPU)));
  for (const auto& part : walk_.parts()) {
    const at::Tensor counted = part.skipped_steps();
    if (counted.defined()) count = counted.add(count.to(counted.device(), /*non_blocking=*/counted.is_cuda()));
  }
  return count;
}

}  // namespace fastclip
