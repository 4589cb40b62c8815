// A plan: tensors, their states, and what a step needs besides.
#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

using namespace fastclip;

namespace {

void run_alone(int count, void (*work)(void*), void* context) {
  for (int i = 0; i < count; ++i) work(context);
}

bool has_scalar(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kScalar.name != nullptr; });
}

bool is_filled_by_first_step(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kFilledByFirstStep; });
}

template <class Stored>
void fill_as(std::vector<double>& array, int64_t numel, double value) {
  Stored stored;
  store(stored, value);
  std::fill_n(reinterpret_cast<Stored*>(array.data()), numel, stored);
}

void fill(std::vector<double>& array, DType dtype, int64_t numel, double value) {
  array.resize((numel * item_size(dtype) + sizeof(double) - 1) / sizeof(double));
  switch (dtype) {
    case DType::float32: return fill_as<float>(array, numel, value);
    case DType::float64: return fill_as<double>(array, numel, value);
    case DType::bfloat16: return fill_as<BFloat16>(array, numel, value);
    case DType::float16: return fill_as<Float16>(array, numel, value);
  }
}

}  // namespace

fastclip_plan::fastclip_plan(const char* optimizer, Settings settings)
    : pool_{1, run_alone},
      rule_(rule_named(optimizer)),
      optimizer_(optimizer),
      settings_(std::move(settings)),
      options_(read(settings_, rule_, optimizer)),
      step_(rule_) {}

void fastclip_plan::use_threads(int count, Run run) {
  pool_ = count > 1 && run ? cpu::ThreadPool{count, run} : cpu::ThreadPool{1, run_alone};
}

const fastclip_plan::Tensor& fastclip_plan::at(size_t tensor) const {
  if (tensor >= tensors_.size()) refuse("there is no tensor ", std::to_string(tensor));
  return tensors_[tensor];
}

void fastclip_plan::add(const fastclip_tensor& given) {
  constexpr int64_t kLargest = PTRDIFF_MAX / sizeof(double);
  const std::string name = "tensor " + std::to_string(tensors_.size());
  const DType dtype = dtype_of(given.dtype), grad_dtype = dtype_of(given.grad_dtype);
  if (given.numel < 0) refuse(name, " has a negative number of elements");
  if (given.numel > kLargest) refuse(name, " has more elements than there is memory");
  if (given.numel > 0 && !given.param) refuse(name, " has no memory for its parameter");
  if ((dtype == DType::float64) != (grad_dtype == DType::float64)) refuse(name, " mixes float64 with another dtype");
  if (dtype == DType::float64 && options_.momentum_dtype) refuse(name, " is float64, and so is its momentum");
  Tensor tensor{};
  tensor.given = given;
  lay_out(tensor);
  tensors_.push_back(std::move(tensor));
}

// Makes the states that a new tensor has under the settings.
void fastclip_plan::lay_out(Tensor& tensor) {
  const auto dtype = static_cast<DType>(tensor.given.dtype), grad_dtype = static_cast<DType>(tensor.given.grad_dtype);
  // What the first step fills begins as a copy of the gradient: after the weight decay, which promotes, as in torch.
  const bool promotes = options_.hyper.weight_decay != 0 && grad_dtype != dtype;
  const DType copied = promotes ? DType::float32 : grad_dtype;
  Rules::visit(rule_, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    tensor.scalar = static_cast<float>(R::kScalar.first);
    for (size_t s = 0; s < R::kStates.size(); ++s) {
      const bool is_momentum = R::kStates[s].is_momentum && options_.momentum_dtype;
      const DType own = R::kFilledByFirstStep ? copied : dtype;
      tensor.state_dtypes[s] = is_momentum ? *options_.momentum_dtype : own;
      if (!has(options_.arrays, static_cast<int>(s))) continue;
      fill(tensor.arrays[s], tensor.state_dtypes[s], tensor.given.numel, options_.new_value);
    }
  });
}

void fastclip_plan::set(const char* name, double value) {
  Settings changed = settings_;
  changed.set(name, value);
  const Options options = read(changed, rule_, optimizer_.c_str());
  const bool same_states = options.arrays == options_.arrays && options.counts == options_.counts &&
                           options.momentum_dtype == options_.momentum_dtype;
  if (!same_states) refuse(name, " can't be changed to this: it asks for other states");
  const bool promotes = options.hyper.weight_decay != 0, new_value = options.new_value != options_.new_value;
  const bool lays_out = promotes != (options_.hyper.weight_decay != 0) || new_value;
  settings_ = std::move(changed);
  options_ = options;
  if (!lays_out) return;
  for (Tensor& tensor : tensors_) {
    if (tensor.is_new) lay_out(tensor);
  }
}

void fastclip_plan::set_grad(size_t tensor, void* grad) { at(tensor).given.grad = grad; }

void* fastclip_plan::state(size_t index, const char* name, fastclip_dtype* dtype) {
  if (index >= tensors_.size() || !name) return nullptr;
  Tensor& tensor = tensors_[index];
  const auto is_named = [&](const char* other) { return other && std::strcmp(name, other) == 0; };
  const auto found = [&](void* state, DType of) {
    if (dtype) *dtype = static_cast<fastclip_dtype>(of);
    return state;
  };
  if (is_named("step")) return options_.counts ? found(&tensor.step, DType::float32) : nullptr;
  return Rules::visit(rule_, [&](auto tag) -> void* {
    using R = typename decltype(tag)::Rule;
    if (is_named(R::kScalar.name)) return found(&tensor.scalar, DType::float32);
    for (size_t s = 0; s < R::kStates.size(); ++s) {
      const bool is_there = has(options_.arrays, static_cast<int>(s));
      if (is_there && is_named(R::kStates[s].name)) return found(tensor.arrays[s].data(), tensor.state_dtypes[s]);
    }
    return nullptr;
  });
}

fastclip_result fastclip_plan::take_step() {
  list();
  measures_.resize(step_.chunks);  // before anything is changed
  if (options_.measures_deltas) deltas_.resize(step_.chunks);
  step_.norm = options_.norm;
  step_.limits = options_.limits;
  step_.skip_nonfinite = options_.skip_nonfinite;
  step_.has_step_counts = options_.counts;
  step_.outcome = &outcome_;
  step_.measures = measures_.data();
  step_.measures_deltas = options_.measures_deltas;
  step_.deltas = deltas_.data();
  step_.clamped = step_.clampable > 0 ? &clamped_ : nullptr;
  clamped_ = 0;
  cpu::run(step_, pool_);
  const bool measured = options_.norm != Norm::none, skipped = measured && outcome_.skipped;
  for (Tensor& tensor : tensors_) tensor.is_new &= skipped || !tensor.given.grad;
  const bool clips = options_.limits.max_norm.is_set();  // or only looks for inf and NaN
  return {clips ? outcome_.total_norm : std::nan(""), clips ? outcome_.coefficient : 1.0,
          static_cast<int64_t>(clamped_), skipped};
}

// A row of hyperparameters is for gradients of one dtype. Tensors without a gradient are left out.
void fastclip_plan::list() {
  step_.tensors.clear();
  step_.hypers.assign(kNumDTypes, options_.hyper);
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    Hyper& row = step_.hypers[dtype];
    row.clip_low = rounded_bound(static_cast<DType>(dtype), row.clip_low);
    row.clip_high = rounded_bound(static_cast<DType>(dtype), row.clip_high);
  }
  step_.chunks = step_.elements = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (tensors_[i].given.grad) step_.tensors.push_back(entry_of(tensors_[i], static_cast<uint32_t>(i)));
  }
  step_.clampable = clips_value(options_.hyper) ? step_.elements : 0;
  step_.segments.clear();
  if (needs_norm(rule_)) list_segments();
}

// Each tensor has a norm of its own, without a limit.
void fastclip_plan::list_segments() {
  for (uint32_t i = 0; i < step_.tensors.size(); ++i) step_.segments.push_back({i, 0, i, nullptr});
  step_.segment_limits.assign(1, NormLimit{});
  segment_outcomes_.resize(step_.segments.size());
  step_.segment_outcomes = segment_outcomes_.data();
}

TensorEntry fastclip_plan::entry_of(Tensor& tensor, uint32_t index) {
  const fastclip_tensor& given = tensor.given;
  TensorEntry entry{};
  entry.param = given.param;
  entry.grad = given.grad;
  entry.dtype = entry.rounded_dtype = static_cast<DType>(given.dtype);
  entry.grad_dtype = static_cast<DType>(given.grad_dtype);
  entry.numel = given.numel;
  entry.first_chunk = step_.chunks;
  entry.hyper = static_cast<int32_t>(given.grad_dtype);
  entry.index = index;
  entry.is_first = tensor.is_new && options_.arrays != 0 && is_filled_by_first_step(rule_);
  entry.uniform = entry.grad_dtype == entry.dtype;
  entry.rounds_at_random = options_.hyper.stochastic_rounding && item_size(entry.dtype) == 2;
  for (int s = 0; s < kMaxStates; ++s) {
    entry.state_dtypes[s] = tensor.state_dtypes[s];
    if (!has(options_.arrays, s)) continue;
    entry.states[s] = tensor.arrays[s].data();
    entry.uniform = entry.uniform && tensor.state_dtypes[s] == entry.dtype;
  }
  if (options_.counts) entry.step = &tensor.step;
  if (has_scalar(rule_)) entry.scalar = &tensor.scalar;
  step_.chunks += (given.numel + kChunk - 1) / kChunk;
  step_.elements += given.numel;
  return entry;
}
