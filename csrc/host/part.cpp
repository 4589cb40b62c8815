// A device's share of a step: the tensors that are there, and the scratch memory they need.
#include "part.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <string>
#include <utility>

namespace fastclip {
namespace {

// Below this a step is over sooner than other threads could make use of the GIL.
constexpr int64_t kElementsToReleaseGil = 1 << 18;

struct ReleasedGil {
  PyThreadState* state;
  explicit ReleasedGil(bool release) : state(release ? PyEval_SaveThread() : nullptr) {}
  ~ReleasedGil() {
    if (state) PyEval_RestoreThread(state);
  }
};

// By a call into torch: `at::parallel_for` would be compiled here, by clang for an OpenMP runtime that torch has not
// loaded.
void run_on_torch_threads(int count, void (*work)(void*), void* context) {
  struct Call {
    void (*work)(void*);
    void* context;
  } call{work, context};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Call& call = *static_cast<Call*>(context);
    for (int64_t i = begin; i < end; ++i) call.work(call.context);
  };
  TORCH_CHECK(torch_parallel_for(0, count, 1, run, &call) == AOTI_TORCH_SUCCESS,
              "torch's threads could not be started");
}

// The CPU computes with it right away, so there the copy has to be waited for.
at::Tensor moved_to(c10::Device device, const at::Tensor& scalar, at::ScalarType dtype) {
  return scalar.defined() ? scalar.to(device, dtype, /*non_blocking=*/device.is_cuda()) : scalar;
}

template <class T>
const T* pointer(const at::Tensor& scalar) {
  return scalar.defined() ? static_cast<const T*>(scalar.const_data_ptr()) : nullptr;
}

at::TensorOptions doubles_on(c10::Device device) { return at::TensorOptions().dtype(at::kDouble).device(device); }

constexpr int64_t kDoubles = sizeof(Measure) / sizeof(double), kDoublesOfSums = sizeof(Sums) / sizeof(double),
                  kDoublesOfLevels = sizeof(Levels) / sizeof(double), kDoublesOfLevel = sizeof(Level) / sizeof(double),
                  kDoublesOfSegment = sizeof(SegmentOutcome) / sizeof(double);
constexpr int64_t place_of(size_t offset) { return static_cast<int64_t>(offset / sizeof(double)); }

#if defined(FASTCLIP_CUDA)
// Without torch's CUDA headers, which a CPU-only torch does not have.
void* current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return guard.getStream(device).native_handle();
}
#endif

}  // namespace

void Part::clear() {
  step.tensors.clear();
  step.hypers.clear();
  step.scales.clear();
  step.chunks = step.elements = step.clampable = 0;
  step.has_step_counts = step.has_unmeasured_params = false;
  step.segments.clear();
  step.segment_changes.clear();
  step.model_norms.clear();
  awaited = keeps_tables = false;
  step.clip_history = step.skip_history = nullptr;
}

at::Tensor Part::sums() const {
  const int measured = 1 + step.limits.measures_change + step.limits.measures_params;
  return outcome_.narrow(0, place_of(offsetof(Outcome, sums)), measured * kDoubles);
}

at::Tensor Part::levels() const { return outcome_.narrow(0, place_of(offsetof(Outcome, levels)), kDoublesOfLevels); }

at::Tensor Part::total_norm() const { return outcome_.select(0, place_of(offsetof(Outcome, total_norm))); }

at::Tensor Part::max_norm() const { return outcome_.select(0, place_of(offsetof(Outcome, max_norm))); }

at::Tensor Part::skip_norm() const { return outcome_.select(0, place_of(offsetof(Outcome, skip_norm))); }

at::Tensor Part::coefficient() const { return outcome_.select(0, place_of(offsetof(Outcome, coefficient))); }

at::Tensor Part::change() const { return outcome_.select(0, place_of(offsetof(Outcome, change))); }

at::Tensor Part::skipped() const { return outcome_.view(at::kLong).select(0, place_of(offsetof(Outcome, skipped))); }

at::Tensor Part::skipped_steps() const {
  if (!outcome_.defined()) return {};
  return outcome_.view(at::kLong).select(0, place_of(offsetof(Outcome, skipped_steps)));
}

at::Tensor Part::clamped() const { return clamped_; }

at::Tensor Part::segments() const {
  const auto count = static_cast<int64_t>(step.segments.size());
  return segment_outcomes_.narrow(0, 0, count * kDoublesOfSegment).view({count, kDoublesOfSegment});
}

at::Tensor Part::of_stepped_segments(size_t offset) const {
  const at::Tensor rows = segment_outcomes_.narrow(0, 0, stepped_segments * kDoublesOfSegment);
  return rows.view({stepped_segments, kDoublesOfSegment}).select(1, place_of(offset));
}

at::Tensor Part::segment_coefficients() const { return of_stepped_segments(offsetof(SegmentOutcome, coefficient)); }

at::Tensor Part::segment_changes() const { return of_stepped_segments(offsetof(SegmentOutcome, change)); }

// Kept, as long as they are the same: a copy from the host would have to wait.
at::Tensor Part::segment_numbers() {
  const bool same = segment_numbers_.defined() && numbers_.size() == step.segments.size() &&
                    std::equal(numbers_.begin(), numbers_.end(), step.segments.begin(),
                               [](int64_t number, const Segment& segment) { return number == segment.number; });
  if (!same) {
    if (capturing_) raise_capturing();
    numbers_.clear();
    for (const Segment& segment : step.segments) numbers_.push_back(segment.number);
    segment_numbers_ = at::empty({static_cast<int64_t>(numbers_.size())}, at::TensorOptions().dtype(at::kLong));
    std::copy(numbers_.begin(), numbers_.end(), static_cast<int64_t*>(segment_numbers_.mutable_data_ptr()));
    segment_numbers_ = segment_numbers_.to(device);
  }
  return segment_numbers_;
}

std::vector<Measure> Part::measures_by_tensor() const {
  const bool by_amp = step.found_inf && skipped().item<int64_t>() != 0 && total_norm().item<double>() == HUGE_VAL;
  if (by_amp) return std::vector<Measure>(step.tensors.size(), Measure{NAN, NAN, NAN});  // nothing was measured
  if (device.is_cpu()) return cpu::measures_by_tensor(step);
#if defined(FASTCLIP_CUDA)
  const at::Tensor here = (captured_measures_.defined() ? captured_measures_ : measures_).cpu();
  return cuda::measures_by_tensor(step, here.const_data_ptr<double>());
#endif
  return {};
}

void Part::prepare(const NormClip& norm_clip, const Amp& amp, bool counts_skips) {
  amp_ = {moved_to(device, amp.grad_scale, at::kFloat), moved_to(device, amp.grad_factor, at::kDouble),
          moved_to(device, amp.found_inf, at::kFloat)};
  step.norm = norm_clip.norm;
  step.limits = norm_clip.limits;
  step.skip_nonfinite = norm_clip.skip_nonfinite;
  step.counts_skips = counts_skips;
  step.asked = {pointer<float>(amp_.grad_scale), pointer<double>(amp_.grad_factor)};
  step.found_inf = pointer<float>(amp_.found_inf);
  step.outcome = nullptr;
  step.measures = step.param_measures = nullptr;
  step.deltas = nullptr;
  step.products = nullptr;
  step.tensor_outcomes = nullptr;
  step.measures_deltas = norm_clip.measures_deltas;
  step.clamped = nullptr;
  // On the CPU, a tensor's place among the chunks says all of the layout.
  const cuda::Needs needs = device.is_cuda() ? prepare_gpu() : cuda::Needs{step.chunks, 0, step.chunks, 1, 0};
  if (step.clampable > 0 && !clips_in_place(step.rule)) {
    if (!clamped_.defined()) clamped_ = at::empty({device.is_cuda() ? cuda::kMaxBlocks : 1}, doubles_on(device));
    step.clamped = static_cast<double*>(clamped_.mutable_data_ptr());
  }
  if (step.norm == Norm::none && !step.found_inf && !step.has_step_counts) return;
  if (!outcome_.defined()) {
    // A replay would set it, and the count of skipped steps, back to 0. Clipping counts nothing.
    if (capturing_ && !clips_in_place(step.rule)) raise_capturing();
    outcome_ = at::zeros({sizeof(Outcome) / sizeof(double)}, doubles_on(device));
  }
  step.outcome = static_cast<Outcome*>(outcome_.mutable_data_ptr());
  if (step.norm == Norm::none) return;
  at::Tensor& measures = capturing_ ? captured_measures_ : measures_;
  if (!measures.defined() || measures.numel() < needs.measures * kDoubles) {
    measures = at::empty({needs.measures * kDoubles}, doubles_on(device));
  }
  step.measures = static_cast<Measure*>(measures.mutable_data_ptr());
  const bool products = needs_products(step.rule);
  if (device.is_cpu()) {
    if (products) step.products = static_cast<Products*>(room_by_chunk(products_, sizeof(Products)));
    if (step.measures_deltas) step.deltas = static_cast<DeltaSums*>(room_by_chunk(deltas_, sizeof(DeltaSums)));
  } else if (products || step.measures_deltas) {
    step.tensor_outcomes =
        static_cast<TensorOutcome*>(kept_room(tensor_outcomes_, needs.tensor_outcomes, sizeof(TensorOutcome)));
  }
  if (!step.segments.empty()) {
    const auto count = static_cast<int64_t>(step.segments.size());
    step.segment_outcomes = static_cast<SegmentOutcome*>(kept_room(segment_outcomes_, count, sizeof(SegmentOutcome)));
  }
  if (step.limits.measures_params) prepare_param_measures(needs);
}

// Scratch memory for each chunk; `memory` grows.
void* Part::room_by_chunk(at::Tensor& memory, size_t bytes) const {
  const int64_t size = step.chunks * place_of(bytes);
  if (!memory.defined() || memory.numel() < size) memory = at::empty({size}, doubles_on(device));
  return memory.mutable_data_ptr();
}

void Part::prepare_param_measures(const cuda::Needs& needs) {
  const bool fits = param_measures_.defined() && param_measures_.numel() >= needs.param_measures * kDoubles;
  if (!fits) {
    if (capturing_) raise_capturing();
    if (param_measures_.defined()) outgrown_.push_back(param_measures_);
    param_measures_ = at::empty({needs.param_measures * kDoubles}, doubles_on(device));
  }
  step.param_measures = static_cast<Measure*>(param_measures_.mutable_data_ptr());
  layout_ = needs.layout;
  if (fits && layout_ == measured_layout_) return;
  measured_layout_ = 0;
  for (TensorEntry& tensor : step.tensors) tensor.param_is_measured = false;
  step.has_unmeasured_params = true;
}

// Memory for `count` outcomes, which are kept until the next step, and begin as zeros.
void* Part::kept_room(at::Tensor& memory, int64_t count, size_t bytes) {
  const int64_t size = count * place_of(bytes);
  if (!memory.defined() || memory.numel() < size) {
    if (capturing_) raise_capturing();
    if (memory.defined()) outgrown_.push_back(memory);
    memory = at::zeros({size}, doubles_on(device));
  }
  return memory.mutable_data_ptr();
}

bool Part::is_capturing() const {
#if defined(FASTCLIP_CUDA)
  if (device.is_cuda()) {
    const c10::DeviceGuard guard(device);
    return cuda::is_capturing(current_stream(device));
  }
#endif
  return false;
}

bool Part::takes_codes(bool measures_more) const {
  if (step.scales.empty()) return true;
#if defined(FASTCLIP_CUDA)
  if (device.is_cuda()) return cuda::takes_codes(step, measures_more);
#endif
  return cpu::takes_codes(step, measures_more);
}

void Part::raise_capturing() const {
  raise(PyExc_RuntimeError, "fastclip on ", device.str(),
        ": take a step before a CUDA graph captures one, so that what it leaves ",
        "(momentum buffers, norm, count of skipped steps) is there already");
}

// A graph is replayed when the engine's own scratch memory may long have been replaced by larger one. What is
// allocated while it is captured comes from its pool, and stays valid for as long as the graph does.
cuda::Needs Part::prepare_gpu() {
#if defined(FASTCLIP_CUDA)
  capturing_ = is_capturing();
  captured_measures_.reset();
  captured_table_memory_.reset();
  const cuda::Needs needs = cuda::needs(step);
  at::Tensor& memory = capturing_ ? captured_table_memory_ : table_memory_;
  if (needs.table_bytes > 0 && (!memory.defined() || memory.numel() < needs.table_bytes)) {
    memory = at::empty({needs.table_bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    if (!capturing_) table_ = {memory.mutable_data_ptr(), {}};
  }
  return needs;
#else
  TORCH_INTERNAL_ASSERT(false);  // of a GPU, no tensor is ordinary
#endif
}

void Part::run(Passes passes) {
  step.passes = passes;
  device.is_cpu() ? run_on_cpu() : run_on_gpu();
  if (passes != Passes::measure) measured_layout_ = layout_;
}

void Part::run_update(at::Tensor sums, int parts) {
  sums_ = std::move(sums);
  step.sums = static_cast<const Sums*>(sums_.const_data_ptr());
  step.levels = reinterpret_cast<const Levels*>(step.sums + parts);
  step.parts = parts;
  run(Passes::update);
}

void Part::take_segments(const at::Tensor& sums, const at::Tensor& levels) {
  const at::Tensor numbers = segment_numbers();
  segment_totals_ = at::zeros({numbers.numel(), kDoublesOfSegment}, doubles_on(device));
  const auto take = [&](const at::Tensor& of_all, int64_t place) {
    const at::Tensor here = of_all.to(device, /*non_blocking=*/device.is_cuda()).index_select(0, numbers);
    segment_totals_.narrow(1, place, here.size(1)).copy_(here);
  };
  take(sums, 0);
  take(levels, kDoubles);
  step.segment_totals = static_cast<const SegmentOutcome*>(segment_totals_.const_data_ptr());
}

void Part::set_found_inf(const at::Tensor& found_inf) {
  amp_.found_inf = moved_to(device, found_inf, at::kFloat);
  step.found_inf = pointer<float>(amp_.found_inf);
}

bool Part::releases_gil() const { return device.is_cpu() && step.elements >= kElementsToReleaseGil; }

void Part::run_on_cpu() {
  const ReleasedGil released(releases_gil());
  cpu::run(step, cpu::ThreadPool{at::get_num_threads(), run_on_torch_threads});
}

void Part::run_on_gpu() {
#if defined(FASTCLIP_CUDA)
  cuda::DeviceTable captured;  // uploaded again at every replay
  if (captured_table_memory_.defined()) captured.memory = captured_table_memory_.mutable_data_ptr();
  const c10::DeviceGuard guard(device);
  if (const char* error = cuda::run(step, capturing_ ? captured : table_, device.index(), current_stream(device))) {
    raise(PyExc_RuntimeError, "fastclip on ", device.str(), ": ", error);
  }
#endif
}

namespace {

// Memory for the sums of some parts, and the levels.
at::Tensor new_sums(const Part& part, int64_t count) {
  return at::empty({count * kDoublesOfSums + kDoublesOfLevels}, doubles_on(part.device));
}

// Copies between GPUs are enqueued. The CPU has to wait for the others' sums: it computes with them.
void copy_to(const at::Tensor& to, int64_t place, const at::Tensor& from) {
  to.narrow(0, place, from.numel()).copy_(from, /*non_blocking=*/to.is_cuda());
}

// The first part has the histories.
void copy_levels(const at::Tensor& sums, const std::vector<Part*>& parts) {
  if (!parts.front()->step.limits.has_rules()) return;
  copy_to(sums, sums.numel() - kDoublesOfLevels, parts.front()->levels());
}

// One part's columns of its segments, in the rows of all segments: `fill` in those of others.
at::Tensor segments_among_all(Part& part, const NormClip& norm_clip, int64_t first, int64_t columns, double fill) {
  at::Tensor all = at::full({norm_clip.segments, columns}, fill, doubles_on(part.device));
  if (!part.step.segments.empty()) {
    all.index_copy_(0, part.segment_numbers(), part.segments().narrow(1, first, columns));
  }
  return all;
}

// The levels of all segments: one part has each, see Segment::history.
at::Tensor levels_of_segments(const std::vector<Part*>& parts, const NormClip& norm_clip) {
  const c10::Device device = parts.front()->device;
  const auto moved = [&](const at::Tensor& tensor) { return tensor.to(device, /*non_blocking=*/device.is_cuda()); };
  at::Tensor centers = at::full({norm_clip.segments, 1}, HUGE_VAL, doubles_on(device));
  at::Tensor deviations = at::zeros({norm_clip.segments, 1}, doubles_on(device));
  for (Part* part : parts) {
    const auto column = [&](size_t place, double fill) {
      return moved(segments_among_all(*part, norm_clip, kDoubles + place_of(place), 1, fill));
    };
    centers = at::minimum(centers, column(offsetof(Level, center), HUGE_VAL));
    deviations = at::maximum(deviations, column(offsetof(Level, deviation), 0));
  }
  return at::cat({centers, deviations}, 1);
}

void hand_out_segments(const std::vector<Part*>& parts, const NormClip& norm_clip, const at::Tensor& sums) {
  const at::Tensor levels = levels_of_segments(parts, norm_clip);
  for (Part* part : parts) part->take_segments(sums, levels);
}

// Here and below all sums are copied before any part updates, so that nothing can fail in between.
void update_over_ranks(const std::vector<Part*>& parts, const NormClip& norm_clip, const Amp& amp,
                       const Shards& shards) {
  std::vector<PartMeasure> measures;
  for (Part* part : parts) {
    at::Tensor measure = part->sums();
    if (norm_clip.segment_scope() != Scope::global) {
      measure = at::cat({measure, segments_among_all(*part, norm_clip, 0, kDoubles, 0).flatten()});
    }
    measures.emplace_back(part->reduction, measure);
  }
  const int64_t of_all = parts.front()->sums().numel();
  const auto [total, found_inf] = shards.total(measures, norm_clip.norm, amp.found_inf, of_all);
  std::vector<at::Tensor> sums;
  for (Part* part : parts) {
    copy_to(sums.emplace_back(new_sums(*part, 1)), 0, total.narrow(0, 0, of_all));
    copy_levels(sums.back(), parts);
    part->set_found_inf(found_inf);
  }
  if (norm_clip.segment_scope() != Scope::global) {
    const at::Tensor of_segments = total.narrow(0, of_all, total.numel() - of_all).view({-1, kDoubles});
    hand_out_segments(parts, norm_clip, of_segments);
  }
  for (size_t i = 0; i < parts.size(); ++i) parts[i]->run_update(std::move(sums[i]), 1);
}

void update_over_devices(const std::vector<Part*>& parts, const NormClip& norm_clip) {
  const auto count = static_cast<int64_t>(parts.size());
  std::vector<at::Tensor> sums;
  for (const Part* part : parts) {
    sums.push_back(new_sums(*part, count));
    for (int64_t i = 0; i < count; ++i) copy_to(sums.back(), i * kDoublesOfSums, parts[i]->sums());
    copy_levels(sums.back(), parts);
  }
  if (norm_clip.segment_scope() != Scope::global) {
    const c10::Device device = parts.front()->device;
    at::Tensor total = at::zeros({norm_clip.segments, kDoubles}, doubles_on(device));
    for (Part* part : parts) {
      const at::Tensor of_part = segments_among_all(*part, norm_clip, 0, kDoubles, 0).to(device);
      total = norm_clip.norm == Norm::inf ? at::maximum(total, of_part) : total.add(of_part);
    }
    hand_out_segments(parts, norm_clip, total);
  }
  for (int64_t i = 0; i < count; ++i) parts[i]->run_update(std::move(sums[i]), static_cast<int>(count));
}

// GPUs come first: they work while the CPU does its share.
std::vector<Part*> parts_in_use(std::vector<Part>& parts) {
  std::vector<Part*> in_use;
  for (const bool cpu : {false, true}) {
    for (auto& part : parts) {
      if (part.device.is_cpu() == cpu && part.in_use()) in_use.push_back(&part);
    }
  }
  return in_use;
}

}  // namespace

Part* first_in_use(std::vector<Part>& parts) {
  Part* first = nullptr;
  for (auto& part : parts) {
    if (!part.in_use()) continue;
    if (!part.device.is_cpu()) return &part;
    if (!first) first = &part;
  }
  return first;
}

void run_parts(std::vector<Part>& all_parts, const NormClip& norm_clip, const Amp& amp, const Shards& shards) {
  const std::vector<Part*> parts = parts_in_use(all_parts);
  for (Part* part : parts) part->prepare(norm_clip, amp, /*counts_skips=*/part == parts.front());
  const bool over_ranks = shards.over_ranks() && norm_clip.norm != Norm::none;
  if (!over_ranks && (parts.size() < 2 || norm_clip.norm == Norm::none)) {
    for (Part* part : parts) part->run(Passes::all);
    return;
  }
  for (Part* part : parts) part->run(Passes::measure);
  over_ranks ? update_over_ranks(parts, norm_clip, amp, shards) : update_over_devices(parts, norm_clip);
}

}  // namespace fastclip
