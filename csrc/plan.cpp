// From an optimizer's groups to a Step: tensors found, checked, cut into chunks, handed to a device.
#include "plan.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>


namespace fastclip {
namespace {

// Bounds as clamp_ has them: rounded to the tensor's dtype.
double round_to(DType dtype, double bound) {
  if (dtype == DType::bfloat16) return static_cast<float>(c10::BFloat16(static_cast<float>(bound)));
  if (dtype == DType::float16) return static_cast<float>(c10::Half(static_cast<float>(bound)));
  return bound;
}

at::Tensor optional_scalar(PyObject* object, const char* name) {
  if (object == Py_None) return {};
  if (!THPVariable_Check(object) || THPVariable_Unpack(object).numel() != 1) {
    raise(PyExc_TypeError, std::string(name) + " must be None or a 1-element tensor");
  }
  return THPVariable_Unpack(object).detach();
}

// `what` is of the parameter: its gradient, a state; or "" for itself.
[[noreturn, gnu::noinline]] void raise_no_memory(const char* what, const Place& place) {
  const std::string of = *what ? std::string("the ") + what + " of " : "";
  raise(PyExc_RuntimeError, of + place.text() + " has no memory: its storage was resized");
}
[[noreturn, gnu::noinline]] void raise_no_memory(PyObject* state, const Place& place) {
  raise_no_memory(PyUnicode_AsUTF8(state), place);
}

// The address of a tensor's first element; `bytes` is the size of all of them. FSDP, for one, frees the storage of a
// parameter that it has no use for, and leaves the sizes as they were.
template <class What>
[[gnu::always_inline]] inline void* data_of(const at::Tensor& covered, int64_t item_size, int64_t bytes, What* what,
                                            const Place& place) {
  c10::TensorImpl* const impl = covered.unsafeGetTensorImpl();
  auto* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const int64_t begin = impl->storage_offset_default() * item_size;
  if (begin + bytes > static_cast<int64_t>(storage->nbytes()) && bytes > 0) raise_no_memory(what, place);
  return static_cast<char*>(storage->mutable_data()) + begin;
}

// The common case of what follows, without a call.
[[gnu::always_inline]] inline bool is_plain_count(const at::Tensor& step, const at::Tensor& param) {
  c10::TensorImpl* const impl = step.unsafeGetTensorImpl();
  return is_ordinary(impl) && impl->numel() == 1 && step.scalar_type() == at::kFloat && !impl->is_inference() &&
         on_same_device(impl, param.unsafeGetTensorImpl());
}

// nullptr where the kernels can count in it.
const char* why_step_not_covered(const at::Tensor& step, const at::Tensor& param, const Place& place) {
  if (step.numel() != 1) raise(PyExc_ValueError, "the step of " + place.text() + " must be a 1-element tensor");
  if (step.is_inference() && !c10::InferenceMode::is_enabled()) {
    raise(PyExc_RuntimeError, "the step of " + place.text() + " is an inference tensor: it can't be updated outside InferenceMode");
  }
  if (!is_ordinary(step.unsafeGetTensorImpl())) return "that is no ordinary tensor";
  if (step.scalar_type() != at::kFloat && step.scalar_type() != at::kDouble) return "of a dtype that the kernels do not cover";
  if (step.device() != param.device()) return "on another device";
  return nullptr;
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

// Marks the plan as in use: its memory is one step's, and the GIL is released in the middle.
class Plan::Busy {
 public:
  explicit Busy(Plan& plan) : plan_(plan) {
    if (plan.busy_) raise(PyExc_RuntimeError, "this optimizer is being stepped by another thread");
    plan.busy_ = true;
    plan.clear();
  }
  ~Busy() {
    plan_.states_.end();
    plan_.borrowed_.clear();
    plan_.groups_.clear();
    plan_.busy_ = false;
  }

 private:
  Plan& plan_;
};

void Plan::clear() {
  for (auto& part : parts_) part.clear();
  written_addresses_ = 0;
  parameter_ = 0;
  reason_.clear();
  first_device_.reset();
  part_ = nullptr;
  reduction_ = nullptr;
  shards_.begin();
}

void Plan::not_covered(const std::string& reason) {
  if (reason_.empty()) reason_ = reason;
}

DevicePart& Plan::part_of(c10::Device device, PyObject* reduction) {
  for (auto& part : parts_) {
    if (part.device == device && part.reduction == reduction) return part;
  }
  return parts_.emplace_back(device, reduction);
}

// Tensors of a group and dtype share a row of hyperparameters, and all that `blank` has.
void Plan::begin_row(DevicePart& part, const Hyper& hyper, Py_ssize_t group, DType dtype) {
  Hyper& row = part.step.hypers.emplace_back(hyper);
  row.clip_low = round_to(dtype, hyper.clip_low);
  row.clip_high = round_to(dtype, hyper.clip_high);
  part.group = group;
  part.clamps = clips_value(hyper);
  part.blank = {};
  part.blank.hyper = static_cast<int32_t>(part.step.hypers.size() - 1);
  part.blank.dtype = part.blank.rounded_dtype = part.blank.grad_dtype = dtype;
  std::fill_n(part.blank.state_dtypes, kMaxStates, dtype);
}

[[gnu::flatten]] void Plan::add_tensor(const at::Tensor* param, const at::Tensor& grad, const StateNames& names,
                                       const ParamStates& states, Momentum momentum, const Hyper& hyper, const Place& place) {
  if (!part_ || part_->reduction != reduction_ || !(part_->device.is_cpu() && on_cpu(grad.unsafeGetTensorImpl()))) {
    part_ = &part_of(grad.device(), reduction_);
  }
  DevicePart& part = *part_;
  Step& step = part.step;
  const int64_t numel = grad.unsafeGetTensorImpl()->numel_default();
  const DType dtype = dtype_of(grad);
  if (step.hypers.empty() || part.group != place.group || part.blank.grad_dtype != dtype) begin_row(part, hyper, place.group, dtype);

  step.tensors.push_back(part.blank);
  TensorEntry& entry = step.tensors.back();
  entry.numel = numel;
  entry.first_chunk = step.chunks;
  entry.index = static_cast<uint32_t>(parameter_);
  entry.momentum = momentum;
  step.chunks += (numel + kChunk - 1) / kChunk;
  step.elements += numel;
  if (part.clamps) step.clampable += numel;

  uint64_t addresses = written_addresses_;  // in a register
  const auto write = [&](const at::Tensor& tensor, const void* data) __attribute__((always_inline)) {
    addresses = (addresses ^ reinterpret_cast<uintptr_t>(data) ^ numel) * 0x9e3779b97f4a7c15u;
    borrowed_.write(tensor);
  };
  const int64_t item = item_size(dtype), bytes = numel * item;
  bool uniform = true;
  const auto add = [&](const at::Tensor& tensor, auto* what, void*& data, DType& stored) __attribute__((always_inline)) {
    if (tensor.dtype() == grad.dtype()) {
      data = data_of(tensor, item, bytes, what, place);
    } else {
      uniform = false;
      stored = dtype_of(tensor);
      data = data_of(tensor, item_size(stored), numel * item_size(stored), what, place);
    }
    write(tensor, data);
  };
  entry.grad = data_of(grad, item, bytes, "gradient", place);
  if (!param) {
    write(grad, entry.grad);
  } else {
    borrowed_.read(grad);
    if (!states.master) {
      add(*param, "", entry.param, entry.dtype);
    } else {
      add(*states.master, names.master, entry.param, entry.dtype);
      add(*param, "", entry.rounded, entry.rounded_dtype);
    }
    for (int s = 0; s < names.count; ++s) add(*states.arrays[s], names.arrays[s], entry.states[s], entry.state_dtypes[s]);
    if (states.step) {
      entry.step_is_float64 = states.step->scalar_type() == at::kDouble;
      const int64_t item_of_step = entry.step_is_float64 ? 8 : 4;
      entry.step = data_of(*states.step, item_of_step, item_of_step, names.step, place);
      write(*states.step, entry.step);
      step.counts_steps = true;
    }
    entry.uniform = uniform && !(hyper.stochastic_rounding && item == 2);
  }
  written_addresses_ = addresses;
}

// Makes the states that there are not, and says whether the kernels take those that there are.
[[gnu::flatten]] bool Plan::cover_states(const Group& group, const Held& held, const at::Tensor& param, const at::Tensor& like,
                                         const Place& place, const StateNames& names, ParamStates& states) {
  if (names.master && !states.master) {  // it is made of the parameter, which has to be there
    const int64_t item = item_size(dtype_of(param));
    data_of(param, item, item * param.numel(), "", place);
  }
  if (!states.has_all(names)) states_.make_missing(rule_, group, held, like, place, names, states);
  c10::TensorImpl* const p = param.unsafeGetTensorImpl();
  const bool contiguous = is_contiguous(p);
  const auto covers = [&](const at::Tensor& state, PyObject* name) __attribute__((always_inline)) {
    c10::TensorImpl* const s = state.unsafeGetTensorImpl();
    if (contiguous && !s->is_inference() && is_like(s, p)) return true;
    if (const char* why_not = why_not_covered(state, name, param, place)) {
      not_covered(place.text() + " has a " + PyUnicode_AsUTF8(name) + " " + why_not);
      return false;
    }
    return true;
  };
  for (int s = 0; s < names.count; ++s) {
    if (!covers(*states.arrays[s], names.arrays[s])) return false;
  }
  if (states.master) {
    if (states.master->scalar_type() != at::kFloat) {
      raise(PyExc_TypeError, "the master_param of " + place.text() + " must be float32");
    }
    if (!covers(*states.master, names.master)) return false;
  }
  if (!names.step) return true;
  // On a GPU the device decides whether a step is skipped, so it counts them, too.
  if (param.is_cuda() && states.step->is_cpu()) {
    states.step = states_.make(held, names.step, states.step->to(param.device()));
  }
  if (is_plain_count(*states.step, param)) return true;
  if (const char* why_not = why_step_not_covered(*states.step, param, place)) {
    not_covered(place.text() + " has a step " + why_not);
    return false;
  }
  return true;
}

void Plan::add_param(const Group& group, const StateNames& names, Py_ssize_t group_index, Py_ssize_t index) {
  PyObject* object = PySequence_Fast_GET_ITEM(group.params.object, index);
  const Place place{group_index, index, group.param_names.object, object};
  if (!THPVariable_Check(object)) {
    raise(PyExc_TypeError, place.text() + " must be a tensor, got " + Py_TYPE(object)->tp_name);
  }
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!first_device_) first_device_ = param.device();
  if (is_subclass(param)) {
    if (const auto shard = shard_of(param, object)) return add_shard(group, names, place, *shard);
  }
  if (!grad_of(param).defined()) return;
  ParamStates states;
  Held held;
  if (names.any) {  // the look-up may run Python: the gradient is read afterwards
    held = Held(object);
    states = states_.find(place, parameter_, names, nullptr);
  }
  const at::Tensor& grad = grad_of(param);
  if (grad.defined()) add_covered(group, names, place, held, states, param, grad, grad);
}

// Every rank takes part in the norm, whatever it has itself.
void Plan::await_norm(const Shard& param, const Place& place, const NormClip& norm_clip) {
  PyObject* const reduction = shards_.reduction_of(param, parameter_, place);
  const bool measured = norm_clip.norm != Norm::none || norm_clip.skip_nonfinite;
  reduction_ = measured ? reduction : nullptr;
  if (!reduction_) return;
  part_ = &part_of(param.local().device(), reduction_);
  part_->awaited = true;
}

std::optional<Shard> Plan::shard_of_grad(const at::Tensor& grad, const Shard& param, const Place& place) {
  auto shard = shard_of(grad);
  if (!shard) raise(PyExc_TypeError, "the gradient of " + place.text() + " is no DTensor, as the parameter is");
  if (same_placement(*shard, param)) return shard;
  shards_.add_misplaced(place.param);
  not_covered("the gradient of " + place.text() + " is placed otherwise than the parameter");
  return {};
}

void Plan::add_shard(const Group& group, const StateNames& names, const Place& place, const Shard& shard) {
  borrowed_.hold();  // Python runs, here and there
  await_norm(shard, place, group.norm_clip);
  const at::Tensor& param = THPVariable_Unpack(place.param);
  const at::Tensor grad = grad_of(param);
  if (grad.defined()) {
    const Held held(place.param);
    if (const auto grad_shard = shard_of_grad(grad, shard, place)) {
      ParamStates states;
      if (names.any) states = states_.find(place, parameter_, names, &shard);
      add_covered(group, names, place, held, states, shard.local(), grad_shard->local(), grad);
      borrowed_.write(param);
      borrowed_.hold();
    }
  }
  reduction_ = nullptr;
}

void Plan::add_covered(const Group& group, const StateNames& names, const Place& place, const Held& held, ParamStates& states,
                       const at::Tensor& param, const at::Tensor& grad, const at::Tensor& like) {
  if (!is_plainly_covered(param, grad)) {
    if (const char* why_not = why_not_covered(param, grad, place)) {
      return not_covered(place.text() + " " + why_not);
    }
  }
  Momentum momentum = Momentum::none;
  if (names.any) {
    if (rule_ == Rule::sgd && names.count > 0) momentum = states.arrays[0] ? Momentum::running : Momentum::first;
    if (!cover_states(group, held, param, like, place, names, states)) return;
  }
  if (group.lr_tensor.object && THPVariable_Unpack(group.lr_tensor.object).device() != param.device()) {
    return not_covered(place.text() + " is on another device than lr");
  }
  if (grad.numel() > 0 || states.step) add_tensor(&param, grad, names, states, momentum, group.hyper, place);
}

[[gnu::flatten]] void Plan::add_group(Group& group, Py_ssize_t group_index) {
  if (group.lr_tensor.object) {  // on a GPU: read there
    const at::Tensor& lr = THPVariable_Unpack(group.lr_tensor.object);
    if (lr.is_cuda() && (lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble)) {
      group.hyper.lr_on_device = lr.const_data_ptr();
      group.hyper.lr_is_float64 = lr.scalar_type() == at::kDouble;
    } else {
      not_covered("lr is a tensor of a device or dtype that the kernels do not cover");
    }
  }
  if (group.differentiable) not_covered("the step is to be differentiable");
  const StateNames names = state_names(rule_, group);
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params.object); ++i, ++parameter_) {
    add_param(group, names, group_index, i);  // to the end, for what has to be refused
  }
}

// Whether two of the arrays that this step writes overlap: then the order of the tensors matters, which the
// kernels do not keep. Looked at only where an address is new.
bool Plan::shares_memory() {
  if (written_addresses_ == disjoint_addresses_) return false;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const auto& part : parts_) {
    for (const auto& tensor : part.step.tensors) {
      const auto add = [&](const void* written, int64_t bytes) {
        const auto begin = reinterpret_cast<uintptr_t>(written);
        if (written && bytes > 0) ranges.emplace_back(begin, begin + bytes);
      };
      add(tensor.param ? tensor.param : tensor.grad, tensor.numel * item_size(tensor.dtype));
      add(tensor.rounded, tensor.numel * item_size(tensor.rounded_dtype));
      for (int s = 0; s < kMaxStates; ++s) add(tensor.states[s], tensor.numel * item_size(tensor.state_dtypes[s]));
      add(tensor.step, item_size(tensor.step_is_float64 ? DType::float64 : DType::float32));
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  disjoint_addresses_ = written_addresses_;
  return false;
}

std::string Plan::step(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf) {
  const Busy busy(*this);
  if (!PyList_Check(groups) && !PyTuple_Check(groups)) raise(PyExc_TypeError, "param_groups must be a list");
  states_.begin(state);
  const at::Tensor scale = optional_scalar(grad_scale, "grad_scale");
  const at::Tensor inf = optional_scalar(found_inf, "found_inf");
  // All groups first: reading a number may run Python, the walk over tensors only where a state is looked up.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(groups); ++i) {
    const Held group(PySequence_Fast_GET_ITEM(groups, i));
    groups_.push_back(read_group(group.object, i, rule_));
    if (!(groups_.back().norm_clip == groups_.front().norm_clip)) {
      raise(PyExc_ValueError, "max_norm, norm_type and skip_nonfinite hold for all groups together: param_groups[" +
                                  std::to_string(i) + "] has others than param_groups[0]");
    }
  }
  if (something_watches_operations()) not_covered("a dispatch mode or a functorch transform is active");
  for (size_t i = 0; i < groups_.size(); ++i) add_group(groups_[i], static_cast<Py_ssize_t>(i));
  const NormClip norm_clip = groups_.empty() ? NormClip{} : groups_.front().norm_clip;
  if (reason_.empty() && shares_memory()) not_covered("two parameters or buffers share memory");
  if (!reason_.empty()) return reason_;

  if (states_.has_new()) {  // a replay would make them anew each time
    for (const DevicePart& part : parts_) {
      if (part.in_use() && part.is_capturing()) part.raise_capturing();
    }
  }
  // A skipped step must leave "no state yet" as it is. Where there are none to make, a GPU decides by itself
  // and nobody waits.
  const bool joint = asks_all_ranks(norm_clip);  // and then no rank skips by itself, while others wait for it
  if (inf.defined() && !joint && (inf.is_cpu() || states_.has_new()) && inf.item<float>() != 0) {
    remember(norm_clip, /*skipped_by_host=*/true);
    ++skipped_by_host_;
    return {};
  }
  states_.prepare();
  run(rule_, norm_clip, {scale, inf});
  if (states_.has_new() && !((norm_clip.skip_nonfinite || (joint && inf.defined())) && was_skipped())) states_.store();
  return {};
}

std::string Plan::clip_grads(PyObject* params, double low, double high, NormClip norm_clip) {
  const Busy busy(*this);
  Hyper hyper{};
  hyper.clip_low = low;
  hyper.clip_high = high;
  std::unordered_set<c10::TensorImpl*> seen;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    PyObject* object = PyList_GET_ITEM(params, i);
    const Place place{0, i, nullptr, object, /*in_optimizer=*/false};
    if (!THPVariable_Check(object)) {
      raise(PyExc_TypeError, place.text() + " must be a tensor, got " + Py_TYPE(object)->tp_name);
    }
    const at::Tensor& param = THPVariable_Unpack(object);
    if (!first_device_) first_device_ = param.device();
    reduction_ = nullptr;
    const auto shard = shard_of(param, object);
    if (shard) {
      borrowed_.hold();
      await_norm(*shard, place, norm_clip);
    }
    const at::Tensor& whole = grad_of(param);
    if (!whole.defined() || !seen.insert(whole.unsafeGetTensorImpl()).second) continue;
    const auto grad_shard = shard ? shard_of_grad(whole, *shard, place) : std::nullopt;
    if (shard && !grad_shard) continue;
    const at::Tensor& grad = shard ? grad_shard->local() : whole;
    if (const char* why_not = why_not_covered(grad, place)) {
      not_covered("the gradient of " + place.text() + " " + why_not);
    } else if (grad.numel() > 0) {
      add_tensor(nullptr, grad, {}, {}, Momentum::none, hyper, place);
      if (shard) borrowed_.write(whole);
    }
  }
  if (something_watches_operations()) not_covered("a dispatch mode or a functorch transform is active");
  if (reason_.empty() && shares_memory()) not_covered("two gradients share memory");
  if (reason_.empty()) run(Rule::clip_grad, norm_clip, {});
  return reason_;
}

void Plan::remember(const NormClip& norm_clip, bool skipped_by_host) {
  last_ = {norm_clip, false, false, skipped_by_host, first_device_};
  for (const Group& group : groups_) last_.clamps |= clips_value(group.hyper);
  for (DevicePart& part : parts_) {
    part.stepped = part.in_use() && !skipped_by_host;
    part.stepped_clampable = part.stepped ? part.step.clampable : 0;
    last_.asks_device |= part.stepped && (part.step.found_inf || norm_clip.skip_nonfinite);
  }
}

void Plan::run(Rule rule, const NormClip& asked, const Amp& amp) {
  NormClip norm_clip = asked;
  // Looking for inf and NaN is taking the inf norm, and clipping nothing.
  if (asked.skip_nonfinite && asked.norm == Norm::none) norm_clip = {Norm::inf, HUGE_VAL, true};
  if (std::any_of(parts_.begin(), parts_.end(), [](const DevicePart& part) { return part.releases_gil(); })) borrowed_.hold();
  if (asks_all_ranks(asked)) borrowed_.hold();  // Python adds up
  run_parts(parts_, rule, norm_clip, amp, shards_);
  remember(asked, /*skipped_by_host=*/false);
  borrowed_.bump_versions();
}

bool Plan::asks_all_ranks(const NormClip& norm_clip) const {
  return shards_.over_ranks() && (norm_clip.norm != Norm::none || norm_clip.skip_nonfinite);
}

// Whether the step just taken changed nothing. Waits for the device: asked only after a step that made states, which a
// skipped step must not leave behind.
bool Plan::was_skipped() const {
  const DevicePart* const part = first_stepped();
  return part && part->skipped().item<int64_t>() != 0;
}

const DevicePart* Plan::first_stepped() const {
  const auto found = std::find_if(parts_.begin(), parts_.end(), [](const auto& part) { return part.stepped; });
  return found == parts_.end() ? nullptr : &*found;
}

// Copies, here and below: the next step writes over what it was, and whoever logs may look later.
at::Tensor Plan::total_norm() const {
  if (last_.norm_clip.norm == Norm::none) return {};
  if (last_.skipped_by_host) return at::full({}, HUGE_VAL, at::kDouble);
  if (const DevicePart* part = first_stepped()) return part->total_norm().clone();
  if (!last_.device) return {};
  return at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(*last_.device));  // of no gradients
}

Plan::ClipStats Plan::clip_stats() const {
  const DevicePart* const first = first_stepped();
  const auto options = at::TensorOptions().device(first ? first->device : last_.device.value_or(at::kCPU));
  ClipStats stats;
  stats.total_norm = total_norm();
  if (last_.asks_device) {
    stats.skipped = first->skipped().ne(0);
  } else {
    stats.skipped = at::full({}, last_.skipped_by_host, options.dtype(at::kBool));
  }
  if (stats.total_norm.defined()) {
    const double of_none = clip_coefficient(last_.skipped_by_host ? HUGE_VAL : 0, last_.norm_clip.max_norm);
    stats.coefficient = first ? first->coefficient().clone() : at::full({}, of_none, options.dtype(at::kDouble));
  }
  if (last_.clamps) {
    stats.clamped_fraction = at::zeros({}, options.dtype(at::kDouble));
    int64_t clampable = 0;
    for (const DevicePart& part : parts_) {
      if (part.stepped_clampable == 0) continue;
      clampable += part.stepped_clampable;
      stats.clamped_fraction += part.clamped().sum().to(options.device(), /*non_blocking=*/part.device.is_cuda());
    }
    if (clampable > 0) stats.clamped_fraction /= static_cast<double>(clampable);
    stats.clamped_fraction.masked_fill_(stats.skipped, 0);  // nothing was written then, and not this either
  }
  return stats;
}

at::Tensor Plan::skipped_steps() const {
  at::Tensor count = at::full({}, skipped_by_host_, at::kLong);
  for (const auto& part : parts_) {
    const at::Tensor counted = part.skipped_steps();
    if (counted.defined()) count = counted.add(count.to(counted.device(), /*non_blocking=*/counted.is_cuda()));
  }
  return count;
}

}  // namespace fastclip
