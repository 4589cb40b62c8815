// The walk over all tensors of a step: found, checked, cut into chunks, handed to their devices.
#include "walk.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

namespace fastclip {
namespace {

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

[[noreturn, gnu::noinline]] void raise_no_count(const Place& place) {
  raise(PyExc_ValueError, "the step of " + place.text() + " must be a count of steps, and is negative, infinite or NaN");
}

// Whether another tensor may lie in the same memory.
[[gnu::always_inline]] inline bool shares_storage(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().use_count() > 1;
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

}  // namespace

void Walk::begin() {
  for (auto& part : parts_) part.clear();
  addresses_ = 0;
  parameter_ = 0;
  reason_.clear();
  undone_.clear();
  masters_.begin();
  first_device_.reset();
  part_ = nullptr;
  reduction_ = nullptr;
  shards_.begin();
}

void Walk::end() {
  states_.end();
  borrowed_.clear();
}

void Walk::end_step() {
  borrowed_.bump_versions();
  masters_.remember();
}

void Walk::not_covered(const std::string& reason) {
  if (reason_.empty()) reason_ = reason;
  masters_.forget();  // nobody looks at versions in plain torch
}

DevicePart& Walk::part_of(c10::Device device, PyObject* reduction) {
  for (auto& part : parts_) {
    if (part.device == device && part.reduction == reduction) return part;
  }
  return parts_.emplace_back(device, reduction);
}

// Tensors of a group and dtype share a row of hyperparameters, and all that `blank` has.
void Walk::begin_row(DevicePart& part, const Hyper& hyper, Py_ssize_t group, DType dtype) {
  Hyper& row = part.step.hypers.emplace_back(hyper);
  row.clip_low = rounded_bound(dtype, hyper.clip_low);
  row.clip_high = rounded_bound(dtype, hyper.clip_high);
  part.group = group;
  part.clamps = clips_value(hyper);
  part.blank = {};
  part.blank.hyper = static_cast<int32_t>(part.step.hypers.size() - 1);
  part.blank.dtype = part.blank.rounded_dtype = part.blank.grad_dtype = dtype;
  std::fill_n(part.blank.state_dtypes, kMaxStates, dtype);
}

[[gnu::flatten]] void Walk::add_tensor(const at::Tensor* param, const at::Tensor& grad, const StateNames& names,
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

  uint64_t addresses = addresses_;  // in a register
  const auto hash = [&](const void* data, int64_t size) __attribute__((always_inline)) {
    addresses = (addresses ^ reinterpret_cast<uintptr_t>(data) ^ size * 0xd6e8feb86659fd93u) * 0x9e3779b97f4a7c15u;
  };
  const auto write = [&](const at::Tensor& tensor, const void* data, int64_t size) __attribute__((always_inline)) {
    hash(data, size);
    borrowed_.write(tensor);
  };
  const int64_t item = item_size(dtype), bytes = numel * item;
  bool uniform = true;
  const auto add = [&](const at::Tensor& tensor, auto* what, void*& data, DType& stored) __attribute__((always_inline)) {
    int64_t size = bytes;
    if (tensor.dtype() == grad.dtype()) {
      data = data_of(tensor, item, size, what, place);
    } else {
      uniform = false;
      stored = dtype_of(tensor);
      size = numel * item_size(stored);
      data = data_of(tensor, item_size(stored), size, what, place);
    }
    write(tensor, data, size);
  };
  entry.grad = data_of(grad, item, bytes, "gradient", place);
  if (!param) {
    write(grad, entry.grad, bytes);
  } else {
    borrowed_.read(grad);
    if (shares_storage(grad)) hash(entry.grad, bytes);  // others' addresses change at every step
    if (!states.master) {
      add(*param, "", entry.param, entry.dtype);
    } else {
      add(*states.master, names.master, entry.param, entry.dtype);
      add(*param, "", entry.rounded, entry.rounded_dtype);
      if (!param->is_inference() && masters_.add(parameter_, *param, *states.master, states.master_is_new) && undone_.empty()) {
        undone_ = place.text();
      }
    }
    for (int s = 0; s < names.count; ++s) add(*states.arrays[s], names.arrays[s], entry.states[s], entry.state_dtypes[s]);
    if (states.step) {
      entry.step_is_float64 = states.step->scalar_type() == at::kDouble;
      const int64_t item_of_step = entry.step_is_float64 ? 8 : 4;
      entry.step = data_of(*states.step, item_of_step, item_of_step, names.step, place);
      // The corrections of Adam's averages divide by 0 where this step is number 0.
      if (part.device.is_cpu()) {
        const double count = steps_seen(entry.step, entry.step_is_float64);
        if (!(count >= 0 && count < HUGE_VAL)) raise_no_count(place);
      }
      write(*states.step, entry.step, item_of_step);
      step.counts_steps = true;
    }
    entry.uniform = uniform && !(hyper.stochastic_rounding && item == 2);
  }
  addresses_ = addresses;
}

void Walk::check_memory(const at::Tensor& param, const at::Tensor& grad, const StateNames& names, const ParamStates& states,
                        const Place& place) const {
  const auto check = [&](const at::Tensor& tensor, auto* what) {
    if (!is_ordinary(tensor.unsafeGetTensorImpl())) return;
    const auto item = static_cast<int64_t>(tensor.itemsize());
    const bool dense = tensor.is_non_overlapping_and_dense();
    data_of(tensor, item, dense || tensor.numel() == 0 ? item * tensor.numel() : item, what, place);
  };
  check(param, "");
  check(grad, "gradient");
  for (int s = 0; s < names.count; ++s) {
    if (states.arrays[s]) check(*states.arrays[s], names.arrays[s]);
  }
  if (states.master) check(*states.master, names.master);
  if (states.step) check(*states.step, names.step);
}

// Makes the states that there are not, and says whether the kernels take those that there are.
[[gnu::flatten]] bool Walk::cover_states(const Group& group, const Held& held, const at::Tensor& param, const at::Tensor& like,
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

void Walk::add_param(const Group& group, const StateNames& names, Py_ssize_t group_index, Py_ssize_t index) {
  PyObject* object = PySequence_Fast_GET_ITEM(group.params.object, index);
  const Place place{group_index, index, group.param_names.object, object};
  if (!is_tensor(object)) {
    raise(PyExc_TypeError, place.text() + " must be a tensor, got " + Py_TYPE(object)->tp_name);
  }
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!first_device_) first_device_ = param.device();
  if (is_subclass(param)) {
    if (auto shard = shard_of(param, object)) return add_shard(group, names, place, std::move(*shard));
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
  if (held.object && states_.ran_python()) borrowed_.keep(std::move(held));  // another thread may have dropped it meanwhile
}

// Every rank takes part in the norm, whatever it has itself.
void Walk::await_norm(const Shard& param, const Place& place, const NormClip& norm_clip) {
  PyObject* const reduction = shards_.reduction_of(param, parameter_, place);
  const bool measured = norm_clip.norm != Norm::none || norm_clip.skip_nonfinite;
  reduction_ = measured ? reduction : nullptr;
  if (!reduction_) return;
  part_ = &part_of(param.local().device(), reduction_);
  part_->awaited = true;
}

std::optional<Shard> Walk::shard_of_grad(const at::Tensor& grad, const Shard& param, const Place& place) {
  auto shard = shard_of(grad);
  if (!shard) raise(PyExc_TypeError, "the gradient of " + place.text() + " is no DTensor, as the parameter is");
  if (shards_.placed_as(param, parameter_, *shard)) return shard;
  shards_.add_misplaced(place.param);
  not_covered("the gradient of " + place.text() + " is placed otherwise than the parameter");
  return {};
}

void Walk::add_shard(const Group& group, const StateNames& names, const Place& place, Shard shard) {
  borrowed_.hold();  // Python runs, here and there
  await_norm(shard, place, group.norm_clip);
  const at::Tensor& param = THPVariable_Unpack(place.param);
  if (grad_of(param).defined()) {
    if (auto grad = shard_of_grad(grad_of(param), shard, place)) {
      ParamStates states;
      if (names.any) states = states_.find(place, parameter_, names, &shard);
      const at::Tensor& whole_grad = THPVariable_Unpack(grad->whole.object);
      add_covered(group, names, place, shard.whole, states, shard.local(), grad->local(), whole_grad);
      borrowed_.write(param);
      std::move(shard).keep_in(borrowed_);
      std::move(*grad).keep_in(borrowed_);
      borrowed_.all_are_kept();
    }
  }
  reduction_ = nullptr;
}

void Walk::add_covered(const Group& group, const StateNames& names, const Place& place, const Held& held, ParamStates& states,
                       const at::Tensor& param, const at::Tensor& grad, const at::Tensor& like) {
  if (!is_plainly_covered(param, grad)) {
    const std::string why_not = why_not_covered(param, grad, place);
    if (!why_not.empty()) return not_covered(place.text() + " " + why_not);
  }
  Momentum momentum = Momentum::none;
  if (names.any) {
    if (rule_ == Rule::sgd && names.count > 0) momentum = states.arrays[0] ? Momentum::running : Momentum::first;
    if (!cover_states(group, held, param, like, place, names, states)) {
      return check_memory(param, grad, names, states, place);
    }
  }
  if (group.lr_tensor.object && THPVariable_Unpack(group.lr_tensor.object).device() != param.device()) {
    not_covered(place.text() + " is on another device than lr");
    return check_memory(param, grad, names, states, place);
  }
  if (grad.numel() > 0 || states.step) add_tensor(&param, grad, names, states, momentum, group.hyper, place);
}

[[gnu::flatten]] void Walk::add_group(Group& group, Py_ssize_t group_index) {
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

// Looked at only where an address is new.
bool Walk::shares_memory() {
  if (addresses_ == disjoint_addresses_) return false;
  using Ranges = std::vector<std::pair<uintptr_t, uintptr_t>>;
  Ranges ranges, read;
  for (const auto& part : parts_) {
    for (const auto& tensor : part.step.tensors) {
      const auto add_to = [](Ranges& to, const void* data, int64_t bytes) {
        const auto begin = reinterpret_cast<uintptr_t>(data);
        if (data && bytes > 0) to.emplace_back(begin, begin + bytes);
      };
      const auto add = [&](const void* written, int64_t bytes) { add_to(ranges, written, bytes); };
      if (tensor.param) add_to(read, tensor.grad, tensor.numel * item_size(tensor.grad_dtype));
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
  for (const auto& [begin, end] : read) {
    const auto after = std::lower_bound(ranges.begin(), ranges.end(), std::pair(end, uintptr_t{0}));
    if (after != ranges.begin() && std::prev(after)->second > begin) return true;
  }
  disjoint_addresses_ = addresses_;
  return false;
}

void Walk::add_grads(PyObject* params, const Hyper& hyper, const NormClip& norm_clip) {
  std::unordered_set<c10::TensorImpl*> seen;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++parameter_) {
    PyObject* object = PyList_GET_ITEM(params, i);
    const Place place{0, i, nullptr, object, /*in_optimizer=*/false};
    if (!is_tensor(object)) {
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
    auto grad_shard = shard ? shard_of_grad(whole, *shard, place) : std::nullopt;
    if (shard && !grad_shard) continue;
    const at::Tensor& grad = shard ? grad_shard->local() : whole;  // Python ran: p.grad may be another by now
    const std::string why_not = why_not_covered(grad, place);
    if (!why_not.empty()) {
      not_covered("the gradient of " + place.text() + " " + why_not);
    } else if (grad.numel() > 0) {
      add_tensor(nullptr, grad, {}, {}, Momentum::none, hyper, place);
      if (!shard) continue;
      borrowed_.write(THPVariable_Unpack(grad_shard->whole.object));
      std::move(*grad_shard).keep_in(borrowed_);
      borrowed_.all_are_kept();
    }
  }
}

}  // namespace fastclip
