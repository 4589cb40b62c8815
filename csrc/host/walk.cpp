// The walk over all tensors of a step: found, checked, cut into chunks, handed to their devices.
#include "walk.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace fastclip {
namespace {

// Of a tensor: parameter, master weights, gradient, states, their scales, two numbers.
constexpr size_t kMostArrays = 3 + 2 * kMaxStates + 2;

// Adds an array to a hash of addresses.
[[gnu::always_inline]] inline uint64_t hashed(uint64_t addresses, const void* data, int64_t size) {
  return (addresses ^ reinterpret_cast<uintptr_t>(data) ^ size * 0xd6e8feb86659fd93u) * 0x9e3779b97f4a7c15u;
}

// Whether another tensor may lie in the same memory.
[[gnu::always_inline]] inline bool shares_storage(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().use_count() > 1;
}

// The common case of what follows, without a call.
[[gnu::always_inline]] inline bool is_plain_number(const at::Tensor& number, const at::Tensor& param) {
  c10::TensorImpl* const impl = number.unsafeGetTensorImpl();
  return is_ordinary(impl) && impl->numel() == 1 && number.scalar_type() == at::kFloat && !impl->is_inference() &&
         on_same_device(impl, param.unsafeGetTensorImpl());
}

}  // namespace

Walk::Walk(Rules::Id rule, Ranks ranks)
    : rule_(rule), in_place_(clips_in_place(rule)), shards_(borrowed_, std::move(ranks)) {}

void Walk::begin() {
  for (auto& part : parts_) part.clear();
  addresses_ = 0;
  parameter_ = 0;
  ahead_.begin();
  reason_.reset();
  undone_.reset();
  masters_.begin();
  versions_.begin();
  measured_params_ = 0;
  first_device_.reset();
  part_ = nullptr;
  reduction_ = reduction_of_group_ = nullptr;
  shards_.begin();
}

void Walk::end() {
  states_.end();
  borrowed_.clear();
  reason_.reset();  // it may hold tensors
  seen_.clear();
}

void Walk::end_step() {
  borrowed_.bump_versions();
  masters_.remember();
  versions_.remember();
}

void Walk::not_covered(Reason reason) {
  if (!reason_) reason_ = std::move(reason);
  masters_.forget();  // nobody looks at versions in plain torch
  versions_.forget();
}

Part& Walk::part_of(c10::Device device, PyObject* reduction) {
  for (auto& part : parts_) {
    if (part.device == device && part.reduction == reduction) return part;
  }
  return parts_.emplace_back(device, reduction, rule_);
}

// Tensors of a group and dtype share a row of hyperparameters, and all that `blank` has.
void Walk::begin_row(Part& part, const Hyper& hyper, Py_ssize_t group, DType dtype) {
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

void Walk::begin_segment(Part& part, Py_ssize_t group) {
  Step& step = part.step;
  const size_t number = scope_ == Scope::group ? static_cast<size_t>(group) : parameter_;
  if (!step.segments.empty() && step.segments.back().number == number) return;
  step.segments.push_back({static_cast<uint32_t>(number), static_cast<uint32_t>(group),
                           static_cast<uint32_t>(step.tensors.size()), nullptr});
}

// Begins the entry of a tensor: with no array yet.
TensorEntry& Walk::begin_entry(const at::Tensor& grad, const Hyper& hyper, const Place& place) {
  if (!part_ || part_->reduction != reduction_ || !(part_->device.is_cpu() && on_cpu(grad.unsafeGetTensorImpl()))) {
    part_ = &part_of(grad.device(), reduction_);
  }
  Part& part = *part_;
  Step& step = part.step;
  const int64_t numel = grad.unsafeGetTensorImpl()->numel_default();
  const DType dtype = dtype_of(grad);
  if (step.hypers.empty() || part.group != place.group || part.blank.grad_dtype != dtype)
    begin_row(part, hyper, place.group, dtype);

  if (scope_ != Scope::global) begin_segment(part, place.group);
  step.tensors.push_back(part.blank);
  TensorEntry& entry = step.tensors.back();
  entry.numel = numel;
  entry.first_chunk = step.chunks;
  entry.index = static_cast<uint32_t>(parameter_);
  step.chunks += (numel + kChunk - 1) / kChunk;
  step.elements += numel;
  return entry;
}

// The norm of the parameters counts: `measured` is this one, or its master weights.
// With `keeps_measures`, from one step to the next.
void Walk::note_params(Step& step, TensorEntry& entry, const at::Tensor& measured, const Place& place,
                       bool keeps_measures) {
  const at::Tensor& param = THPVariable_Unpack(place.param);
  measured_params_ += param.numel();
  if (!keeps_measures) return;
  entry.param_is_measured = versions_.add(parameter_, param, measured, entry.param, entry.first_chunk);
  step.has_unmeasured_params |= !entry.param_is_measured;
}

template <bool kPlain>
[[gnu::flatten]] void Walk::add_tensor(const at::Tensor& param, const at::Tensor& grad, const StateNames& names,
                                       const ParamStates& states, bool is_first, const Group& group,
                                       const Place& place) {
  const Hyper& hyper = group.hyper;
  TensorEntry& entry = begin_entry(grad, hyper, place);
  Part& part = *part_;
  Step& step = part.step;
  const int64_t numel = entry.numel;
  const DType dtype = entry.grad_dtype;
  if (part.clamps) step.clampable += numel;
  ahead_.make_room(kMostArrays);

  uint64_t addresses = addresses_;  // in a register
  const auto hash = [&](const void* data, int64_t size)
                        __attribute__((always_inline)) { addresses = hashed(addresses, data, size); };
  const auto write = [&](const at::Tensor& tensor, const void* data, int64_t size) __attribute__((always_inline)) {
    hash(data, size);
    borrowed_.write(tensor);
    ahead_.pass(tensor, data);
  };
  const int64_t item = item_size(dtype), bytes = numel * item;
  bool uniform = true;
  const auto add = [&](const at::Tensor& tensor, auto* part, void*& data, DType& stored)
                       __attribute__((always_inline)) {
                         int64_t size = bytes;
                         if (kPlain || tensor.dtype() == grad.dtype()) {
                           data = data_of(tensor, item, size, part, place);
                         } else {
                           uniform = false;
                           stored = dtype_of(tensor);
                           size = numel * item_size(stored);
                           data = data_of(tensor, item_size(stored), size, part, place);
                         }
                         write(tensor, data, size);
                       };
  entry.grad = data_of(grad, item, bytes, "gradient", place);
  borrowed_.read(grad);
  ahead_.pass(grad, entry.grad);
  if (shares_storage(grad)) hash(entry.grad, bytes);  // others' addresses change at every step
  if (kPlain || !states.master) {
    add(param, "", entry.param, entry.dtype);
  } else {
    add(*states.master, names.master, entry.param, entry.dtype);
    add(param, "", entry.rounded, entry.rounded_dtype);
    if (!param.is_inference() && masters_.add(parameter_, param, *states.master, states.master_is_new) && !undone_) {
      undone_ = place;
    }
  }
  for (int s = 0; s < names.count; ++s) {
    if (states.arrays[s] && (kPlain || !states.scales[s])) {
      add(*states.arrays[s], names.arrays[s], entry.states[s], entry.state_dtypes[s]);
    }
  }
  if (!kPlain && states.scales[0]) {
    uniform = false;
    StateScales& scales = step.scales.emplace_back();
    for (int s = 0; s < names.count; ++s) {
      if (!states.arrays[s]) continue;
      const int64_t size = blocks_of(numel) * int64_t{sizeof(float)};
      void* const of_state = data_of(*states.scales[s], sizeof(float), size, names.scales[s], place);
      write(*states.scales[s], of_state, size);
      scales.of[s] = static_cast<float*>(of_state);
      scales.is_signed[s] = s == names.momentum;
      entry.states[s] = data_of(*states.arrays[s], 1, numel, names.codes[s], place);
      write(*states.arrays[s], entry.states[s], numel);
    }
    entry.scales = &scales;
  }
  // Returns whether the number is float64.
  const auto add_numbers = [&](const at::Tensor& numbers, int64_t length, const Name* name, void*& data)
                               __attribute__((always_inline)) {
                                 const bool is_float64 = !kPlain && numbers.scalar_type() == at::kDouble;
                                 const int64_t size = is_float64 ? 8 : 4;
                                 data = data_of(numbers, size, length * size, name, place);
                                 write(numbers, data, length * size);
                                 return is_float64;
                               };
  bool step_is_float64 = false;
  if (states.step) {
    step_is_float64 = add_numbers(*states.step, 1, names.step, entry.step);
    // The corrections of Adam's averages divide by 0 where this step is number 0.
    if (part.device.is_cpu()) {
      const double count = number_at(entry.step, step_is_float64);
      if (!(count >= 0 && count < HUGE_VAL)) refuse("no_count", place, names.step->text, *states.step);
    }
    step.has_step_counts = true;
  }
  const bool scalar_is_float64 =
      states.scalar && add_numbers(*states.scalar, names.length_of_row, names.scalar, entry.scalar);
  entry.is_first = is_first;
  entry.uniform = uniform;
  entry.rounds_at_random = hyper.stochastic_rounding && item == 2;
  entry.step_is_float64 = step_is_float64;
  entry.scalar_is_float64 = scalar_is_float64;
  addresses_ = addresses;
  const Limits& limits = group.norm_clip.limits;
  if (limits.counts_params()) {
    note_params(step, entry, states.master ? *states.master : param, place, limits.measures_params);
  }
}

void Walk::add_unstepped(const Group& group, const StateNames& names, const Place& place, const at::Tensor& param,
                         const Shard* shard) {
  if (!THPVariable_Unpack(place.param).requires_grad()) return;
  ParamStates states;
  if (names.master) {
    states = shard ? states_.find_shards(place, parameter_, names, *shard) : states_.find(place, parameter_, names);
  }
  const at::Tensor& measured = states.master ? *states.master : param;
  if (!covers(measured, measured, place)) return;
  if (measured.numel() == 0) {
    measured_params_ += THPVariable_Unpack(place.param).numel();  // of other ranks
    return;
  }
  TensorEntry& entry = begin_entry(measured, group.hyper, place);
  const int64_t item = item_size(entry.dtype), bytes = entry.numel * item;
  entry.param = data_of(measured, item, bytes, "", place);
  entry.uniform = !states.master;
  borrowed_.read(measured);
  addresses_ = hashed(addresses_, entry.param, bytes);
  note_params(part_->step, entry, measured, place, group.norm_clip.limits.measures_params);
}

template <bool kInPlace>
void Walk::add_param(const Group& group, const StateNames& names, Py_ssize_t group_index, Py_ssize_t index) {
  PyObject* object = PySequence_Fast_GET_ITEM(group.params.object, index);
  const Place place{group_index, index, group.param_names.object, object, /*in_optimizer=*/!kInPlace};
  if (!is_tensor(object)) refuse("no_tensor", place, "", object);
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!first_device_) first_device_ = param.device();
  if (is_subclass(param)) {
    if (auto shard = shard_of(param, object)) return add_shard(group, names, place, std::move(*shard));
  }
  const at::Tensor* grad = &grad_of(param);
  if (!grad->defined() && group.norm_clip.counts_unstepped()) {
    return add_unstepped(group, names, place, param, nullptr);
  }
  if (!grad->defined() || (kInPlace && is_seen(*grad))) return;
  static const ParamStates kNone;
  const ParamStates* states = &kNone;
  if (names.any) {  // the look-up may run Python: the gradient is read afterwards
    states = &states_.find(place, parameter_, names);
    grad = &grad_of(param);
    if (!grad->defined()) return;
  }
  add_one(group, names, place, *states, kInPlace ? *grad : param, *grad, *grad);
}

// Every rank takes part in the norm, whatever it has itself.
void Walk::await_norm(const Shard& param, const Place& place, const Group& group) {
  const bool replicated = group.norm_replicated && shards_.beyond();
  PyObject* const reduction = shards_.reduction_of(param, parameter_, place, replicated);
  reduction_ = group.norm_clip.measures() ? reduction : nullptr;
  if (!reduction_) return;
  part_ = &part_of(param.local().device(), reduction_);
  part_->awaited = true;
  if (scope_ != Scope::global) begin_segment(*part_, place.group);
}

void Walk::await_others() { part_of(first_device_.value_or(c10::Device(at::kCPU)), nullptr).awaited = true; }

std::optional<Shard> Walk::shard_of_grad(const at::Tensor& grad, const Shard& param, const Place& place) {
  auto shard = shard_of(grad);
  if (!shard) refuse("no_dtensor", place, "gradient");
  if (shards_.placed_as(param, parameter_, *shard)) return shard;
  shards_.add_misplaced(place.param);
  not_covered({"other_placements", place, "gradient", {grad, THPVariable_Unpack(place.param)}});
  return {};
}

void Walk::add_shard(const Group& group, const StateNames& names, const Place& place, Shard shard) {
  if (needs_products(rule_)) refuse("no_shards", place, "");
  if (group.norm_clip.is_local()) not_covered(Reason("no_kernels_over_ranks"));
  borrowed_.hold();  // Python runs, here and there
  await_norm(shard, place, group);
  const at::Tensor& param = THPVariable_Unpack(place.param);
  if (!grad_of(param).defined() && group.norm_clip.counts_unstepped()) {
    add_unstepped(group, names, place, shard.local(), &shard);
    std::move(shard).keep_in(borrowed_);
    borrowed_.all_are_kept();
  } else if (grad_of(param).defined() && !is_seen(grad_of(param))) {
    if (auto grad = shard_of_grad(grad_of(param), shard, place)) {
      ParamStates states;
      if (names.any) states = states_.find_shards(place, parameter_, names, shard);
      const at::Tensor& whole_grad = THPVariable_Unpack(grad->whole.object);
      add_one(group, names, place, states, in_place_ ? grad->local() : shard.local(), grad->local(), whole_grad);
      borrowed_.write(in_place_ ? whole_grad : param);
      std::move(shard).keep_in(borrowed_);
      std::move(*grad).keep_in(borrowed_);
      borrowed_.all_are_kept();
    }
  }
  reduction_ = reduction_of_group_;
}

// Whether all is as most have it: then there is nothing to make, and nothing to refuse but memory that is not there.
bool Walk::is_plain(const Group& group, const StateNames& names, const ParamStates& states, const at::Tensor& param,
                    const at::Tensor& grad) {
  c10::TensorImpl* const p = param.unsafeGetTensorImpl();
  const auto is_number = [&](const Name* name, const at::Tensor* number)
                             __attribute__((always_inline)) { return !name || is_plain_number(*number, param); };
  if (!fastclip::is_plain(p) || !is_like(grad.unsafeGetTensorImpl(), p)) return false;
  if (p->numel_default() == 0 || group.lr_tensor.object) return false;
  if (!names.any) return true;
  if (!states.complete || states.scales[0] || states.master) return false;
  for (int s = 0; s < names.count; ++s) {
    if (states.arrays[s] && !is_like(states.arrays[s]->unsafeGetTensorImpl(), p)) return false;
  }
  return is_number(names.step, states.step) && names.length_of_row == 1 && is_number(names.scalar, states.scalar);
}

void Walk::add_one(const Group& group, const StateNames& names, const Place& place, const ParamStates& states,
                   const at::Tensor& param, const at::Tensor& grad, const at::Tensor& like) {
  if (is_plain(group, names, states, param, grad)) {
    add_tensor<true>(param, grad, names, states, /*is_first=*/false, group, place);
  } else {
    add_any(group, names, place, states, param, grad, like);
  }
}

void Walk::add_any(const Group& group, const StateNames& names, const Place& place, ParamStates states,
                   const at::Tensor& param, const at::Tensor& grad, const at::Tensor& like) {
  if (!covers(param, grad, place)) return;
  bool is_first = false;
  if (names.any) {
    is_first = names.filled_by_first_step && !states.arrays[0];
    if (!cover_states(group, param, like, place, names, states)) {
      return check_memory(param, grad, names, states, place);
    }
  }
  if (group.lr_tensor.object && THPVariable_Unpack(group.lr_tensor.object).device() != param.device()) {
    not_covered({"other_device_than_lr", place, "", {param, THPVariable_Unpack(group.lr_tensor.object)}});
    return check_memory(param, grad, names, states, place);
  }
  if (grad.numel() > 0 || states.step) {
    add_tensor<false>(param, grad, names, states, is_first, group, place);
  } else if (scope_ != Scope::global) {
    begin_segment(part_of(param.device(), reduction_), place.group);
  } else if (group.norm_clip.limits.counts_params()) {
    measured_params_ += THPVariable_Unpack(place.param).numel();  // of other ranks
  }
}

[[gnu::flatten]] void Walk::add_group(Group& group, Py_ssize_t group_index) {
  if (group.lr_tensor.object) {  // on a GPU: read there
    const at::Tensor& lr = THPVariable_Unpack(group.lr_tensor.object);
    if (lr.is_cuda() && (lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble)) {
      group.hyper.lr_on_device = lr.const_data_ptr();
      group.hyper.lr_is_float64 = lr.scalar_type() == at::kDouble;
    } else {
      not_covered({"no_kernels_for_lr", {lr}});
    }
  }
  if (group.differentiable) not_covered(Reason("differentiable"));
  scope_ = group.norm_clip.segment_scope();
  const bool replicated = group.norm_replicated && shards_.beyond() && group.norm_clip.measures();
  reduction_ = reduction_of_group_ = replicated ? shards_.replicated() : nullptr;
  const StateNames names = state_names(rule_, group);
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params.object); ++i, ++parameter_) {
    in_place_ ? add_param<true>(group, names, group_index, i)
              : add_param<false>(group, names, group_index, i);  // to the end, for what has to be refused
  }
  reduction_ = reduction_of_group_ = nullptr;
}

}  // namespace fastclip
