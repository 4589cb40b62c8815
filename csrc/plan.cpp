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

PyObject* momentum_buffer_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

at::Tensor optional_scalar(PyObject* object, const char* name) {
  if (object == Py_None) return {};
  if (!THPVariable_Check(object) || THPVariable_Unpack(object).numel() != 1) {
    raise(PyExc_TypeError, std::string(name) + " must be None or a 1-element tensor");
  }
  return THPVariable_Unpack(object).detach();
}

void check_memory(const at::Tensor& covered, const char* what, const Place& place) {
  if (!is_in_memory(covered)) raise(PyExc_RuntimeError, what + place.text() + " has no memory: its storage was resized");
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
    plan_.new_buffers_.clear();
    plan_.alive_.clear();
    plan_.groups_.clear();
    plan_.busy_ = false;
  }

 private:
  Plan& plan_;
};

void Plan::clear() {
  for (auto& part : parts_) part.clear();
  touched_.clear();
  kept_alive_ = 0;
  written_addresses_ = 0;
  parameter_ = 0;
  reason_.clear();
  first_device_.reset();
  part_ = nullptr;
}

void Plan::not_covered(const std::string& reason) {
  if (reason_.empty()) reason_ = reason;
}

DevicePart& Plan::part_of(c10::Device device) {
  for (auto& part : parts_) {
    if (part.device == device) return part;
  }
  return parts_.emplace_back(device);
}

// Before Python may run, or the GIL is released: another thread may drop what the walk has found so far.
void Plan::keep_alive() {
  for (; kept_alive_ < touched_.size(); ++kept_alive_) {
    const Touched& touched = touched_[kept_alive_];
    for (c10::TensorImpl* tensor : {touched.param, touched.buffer, touched.grad}) {
      if (tensor) alive_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor));
    }
  }
}

// state[param]. A look-up by tensor runs Tensor.__hash__, in Python (100 ns), so each parameter's
// place in the dict is remembered. It is only a hint: the key found there says whether it still holds.
PyObject* Plan::state_entry(PyObject* param, PyObject* state) {
  if (places_.size() <= parameter_) places_.resize(parameter_ + 1, 0);
  PyObject *key, *entry;
  Py_ssize_t next = places_[parameter_];
  if (PyDict_Next(state, &next, &key, &entry) && key == param) return entry;

  keep_alive();
  entry = PyDict_GetItemWithError(state, param);
  if (!entry && PyErr_Occurred()) throw PythonError{};
  if (entry) {
    // Entries are mostly in the order of the parameters: look for it near its predecessor's.
    constexpr int kNear = 64;
    next = parameter_ > 0 ? places_[parameter_ - 1] : 0;
    for (int i = 0; i < kNear; ++i) {
      const Py_ssize_t place = next;
      if (!PyDict_Next(state, &next, &key, nullptr)) break;
      if (key == param) {
        places_[parameter_] = place;
        break;
      }
    }
  }
  return entry;
}

// state[param]["momentum_buffer"], or nullptr where there is none yet; old checkpoints hold None.
const at::Tensor* Plan::momentum_buffer(const Place& place, PyObject* state) {
  PyObject* entry = state_entry(place.param, state);
  if (!entry) return nullptr;
  if (!PyDict_Check(entry)) raise(PyExc_TypeError, "the state of " + place.text() + " must be a dict");
  PyObject *key, *buffer;
  Py_ssize_t first = 0;
  if (!PyDict_Next(entry, &first, &key, &buffer) || key != momentum_buffer_key()) {  // mostly the only one
    buffer = PyDict_GetItemWithError(entry, momentum_buffer_key());
    if (!buffer && PyErr_Occurred()) throw PythonError{};
  }
  if (!buffer || buffer == Py_None) return nullptr;
  if (!THPVariable_Check(buffer)) {
    raise(PyExc_TypeError,
          "the momentum_buffer of " + place.text() + " must be a tensor, got " + Py_TYPE(buffer)->tp_name);
  }
  return &THPVariable_Unpack(buffer);
}

void Plan::add_tensor(const at::Tensor* param, const at::Tensor& grad, const at::Tensor* buffer,
                      Momentum momentum, const Hyper& hyper, Py_ssize_t group_index) {
  if (!part_ || !(part_->device.is_cpu() && grad.is_cpu())) part_ = &part_of(grad.device());
  DevicePart& part = *part_;
  Step& step = part.step;
  const DType dtype = dtype_of(grad);
  if (step.hypers.empty() || part.group != group_index || part.dtype != dtype) {
    part.group = group_index;
    part.dtype = dtype;
    step.hypers.push_back(hyper);
    step.hypers.back().clip_low = round_to(dtype, hyper.clip_low);
    step.hypers.back().clip_high = round_to(dtype, hyper.clip_high);
  }
  const int64_t numel = grad.numel();
  TensorEntry& entry = step.tensors.emplace_back();
  entry.param = param ? data_of(*param, dtype) : nullptr;
  entry.grad = data_of(grad, dtype);
  entry.momentum_buffer = buffer ? data_of(*buffer, dtype) : nullptr;
  entry.numel = numel;
  entry.first_chunk = step.chunks;
  entry.hyper = static_cast<int32_t>(step.hypers.size() - 1);
  entry.dtype = dtype;
  entry.momentum = momentum;
  step.chunks += (numel + kChunk - 1) / kChunk;
  step.elements += numel;
  if (clips_value(hyper)) step.clampable += numel;
  for (const void* written : {param ? entry.param : entry.grad, entry.momentum_buffer}) {
    written_addresses_ = (written_addresses_ ^ reinterpret_cast<uintptr_t>(written) ^ numel) * 0x9e3779b97f4a7c15u;
  }
  touched_.push_back({param ? param->unsafeGetTensorImpl() : nullptr, buffer ? buffer->unsafeGetTensorImpl() : nullptr,
                      grad.unsafeGetTensorImpl()});
}

void Plan::add_param(const Group& group, Py_ssize_t group_index, Py_ssize_t index, PyObject* state) {
  PyObject* object = PySequence_Fast_GET_ITEM(group.params.object, index);
  const Place place{group_index, index, group.param_names.object, object};
  if (!THPVariable_Check(object)) {
    raise(PyExc_TypeError, place.text() + " must be a tensor, got " + Py_TYPE(object)->tp_name);
  }
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!first_device_) first_device_ = param.device();
  if (!grad_of(param).defined()) return;
  const at::Tensor* buffer = nullptr;
  Held held;
  if (group.hyper.momentum != 0) {  // the look-up may run Python: the gradient is read afterwards
    held = Held(object);
    buffer = momentum_buffer(place, state);
  }
  const at::Tensor& grad = grad_of(param);
  if (!grad.defined()) return;
  if (!is_plainly_covered(param, grad)) {
    if (const char* why_not = why_not_covered(param, grad, place)) {
      return not_covered(place.text() + " " + why_not);
    }
  }
  check_memory(param, "", place);
  check_memory(grad, "the gradient of ", place);
  Momentum momentum = Momentum::none;
  if (group.hyper.momentum != 0) {
    momentum = buffer ? Momentum::running : Momentum::first;
    if (!buffer) {
      new_buffers_.push_back({std::move(held), at::empty_like(grad.detach()), {}, {}});
      buffer = &new_buffers_.back().buffer;
    } else if (buffer->is_inference() && !c10::InferenceMode::is_enabled()) {
      raise(PyExc_RuntimeError, "the momentum_buffer of " + place.text() +
                                    " is an inference tensor: it can't be updated outside InferenceMode");
    } else if (buffer->sizes() != param.sizes()) {
      raise(PyExc_ValueError, "the momentum_buffer of " + place.text() + " has another shape than the parameter");
    } else if (!is_plainly_covered(param, *buffer) && !same_memory_layout(*buffer, param)) {
      return not_covered(place.text() + " has a momentum_buffer of another memory layout, dtype or device");
    }
    check_memory(*buffer, "the momentum_buffer of ", place);
  }
  if (group.lr_tensor.object && THPVariable_Unpack(group.lr_tensor.object).device() != param.device()) {
    return not_covered(place.text() + " is on another device than lr");
  }
  if (grad.numel() > 0) add_tensor(&param, grad, buffer, momentum, group.hyper, group_index);
}

void Plan::add_group(Group& group, Py_ssize_t group_index, PyObject* state) {
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
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params.object); ++i, ++parameter_) {
    add_param(group, group_index, i, state);  // to the end, for what has to be refused
  }
}

// All that can fail, or run Python, comes before the first byte is written; what store_new_buffers then
// does can only fail where memory ends.
void Plan::prepare_new_buffers(PyObject* state) {
  if (!new_buffers_.empty()) keep_alive();
  for (auto& added : new_buffers_) {
    added.wrapped = Held::stolen(THPVariable_Wrap(added.buffer));
    if (!added.wrapped.object) throw PythonError{};
    added.entry = Held::stolen(PyObject_GetItem(state, added.param.object));  // a defaultdict's default
    if (!added.entry.object) throw PythonError{};
    if (!PyDict_Check(added.entry.object)) raise(PyExc_TypeError, "an optimizer's state of a parameter must be a dict");
  }
}

void Plan::store_new_buffers() {
  for (auto& added : new_buffers_) {
    if (PyDict_SetItem(added.entry.object, momentum_buffer_key(), added.wrapped.object) != 0) throw PythonError{};
  }
}

// Whether two of the arrays that this step writes overlap: then the order of the tensors matters, which the
// kernels do not keep. Looked at only where an address is new.
bool Plan::shares_memory() {
  if (written_addresses_ == disjoint_addresses_) return false;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const auto& part : parts_) {
    ranges.clear();
    for (const auto& tensor : part.step.tensors) {
      for (const void* written : {tensor.param ? tensor.param : tensor.grad, tensor.momentum_buffer}) {
        const auto begin = reinterpret_cast<uintptr_t>(written);
        if (written) ranges.emplace_back(begin, begin + tensor.numel * item_size(tensor.dtype));
      }
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
      if (ranges[i].first < ranges[i - 1].second) return true;
    }
  }
  disjoint_addresses_ = written_addresses_;
  return false;
}

std::string Plan::step(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf) {
  const Busy busy(*this);
  if (!PyList_Check(groups) && !PyTuple_Check(groups)) raise(PyExc_TypeError, "param_groups must be a list");
  if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");
  const at::Tensor scale = optional_scalar(grad_scale, "grad_scale");
  const at::Tensor inf = optional_scalar(found_inf, "found_inf");
  // All groups first: reading a number may run Python, the walk over tensors only where a state is looked up.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(groups); ++i) {
    const Held group(PySequence_Fast_GET_ITEM(groups, i));
    groups_.push_back(read_group(group.object, i));
    if (!(groups_.back().norm_clip == groups_.front().norm_clip)) {
      raise(PyExc_ValueError, "max_norm, norm_type and skip_nonfinite hold for all groups together: param_groups[" +
                                  std::to_string(i) + "] has others than param_groups[0]");
    }
  }
  if (something_watches_operations()) not_covered("a dispatch mode or a functorch transform is active");
  for (size_t i = 0; i < groups_.size(); ++i) add_group(groups_[i], static_cast<Py_ssize_t>(i), state);
  const NormClip norm_clip = groups_.empty() ? NormClip{} : groups_.front().norm_clip;
  if (reason_.empty() && shares_memory()) not_covered("two parameters or buffers share memory");
  if (!reason_.empty()) return reason_;

  if (!new_buffers_.empty()) {  // a replay would make them anew each time
    for (const DevicePart& part : parts_) {
      if (part.in_use() && part.is_capturing()) part.raise_capturing();
    }
  }
  // A skipped step must leave "no buffer yet" as it is. Where there are none to make, a GPU decides by itself
  // and nobody waits.
  if (inf.defined() && (inf.is_cpu() || !new_buffers_.empty()) && inf.item<float>() != 0) {
    remember(norm_clip, /*skipped_by_host=*/true);
    ++skipped_by_host_;
    return {};
  }
  prepare_new_buffers(state);
  run(Rule::sgd, norm_clip, {scale, inf});
  if (new_buffers_.empty() || !was_skipped(norm_clip)) store_new_buffers();
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
    const at::Tensor& grad = grad_of(param);
    if (!grad.defined() || !seen.insert(grad.unsafeGetTensorImpl()).second) continue;
    if (const char* why_not = why_not_covered(grad, place)) {
      not_covered("the gradient of " + place.text() + " " + why_not);
    } else if (grad.numel() > 0) {
      check_memory(grad, "the gradient of ", place);
      add_tensor(nullptr, grad, nullptr, Momentum::none, hyper, 0);
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
  if (std::any_of(parts_.begin(), parts_.end(), [](const DevicePart& part) { return part.releases_gil(); })) keep_alive();
  run_parts(parts_, rule, norm_clip, amp);
  remember(asked, /*skipped_by_host=*/false);
  for (const Touched& tensor : touched_) {
    (tensor.param ? tensor.param : tensor.grad)->bump_version();
    if (tensor.buffer) tensor.buffer->bump_version();
  }
}

// Whether the step just taken found an inf or NaN. Waits for the device: asked only after a step that made
// momentum buffers, which a skipped step must not leave behind.
bool Plan::was_skipped(const NormClip& norm_clip) const {
  if (!norm_clip.skip_nonfinite) return false;
  return std::any_of(parts_.begin(), parts_.end(), [](const DevicePart& part) {
    return part.in_use() && !part.sum().isfinite().all().item<bool>();
  });
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
