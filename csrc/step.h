// The contract between the host and each device. Knows no torch and no Python.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "rules/clip.h"
#include "rules/decision.h"
#include "rules/quantized.h"
#include "rules/rules.h"
#include "rules/segment.h"

// What libfastclip.so has for the host, which is compiled for each layout of torch.
#define FASTCLIP_API __attribute__((visibility("default")))

namespace fastclip {

// Elements of a chunk. Tensors are cut into chunks, and the last chunk of a tensor may be shorter. A chunk is the CPU's
// unit of scheduling and of the norm: its sum is always taken in the same order, and the sums are added in chunk order.
// So the norm has the same bits on any number of threads. A GPU's unit is the tile, see cuda/table.cuh.
constexpr int64_t kChunk = 4096;

// What belongs to the states of a tensor that are kept in 8 bits: the scale of each block, see rules/quantized.h.
struct StateScales {
  float* of[kMaxStates];
  bool is_signed[kMaxStates];
};

// One tensor. All its arrays have the same element order in memory.
struct TensorEntry {
  void* param;    // the array that the rule updates: the parameter, its master weights, or the gradient itself
  void* rounded;  // the 16-bit parameter that master weights are rounded to, or nullptr
  void* grad;     // nullptr: the tensor stays as it is, and only its norm is measured
  void* states[kMaxStates];  // nullptr where the rule, or the group, has no such state
  void* step;                // the tensor's count of steps, or nullptr. The step reads it and counts it up
  void* scalar;              // the rule's number, or row of them, or nullptr. The step reads and replaces it
  const StateScales* scales;  // the states are codes, with these scales; nullptr where they are numbers
  int64_t numel;
  int64_t first_chunk;
  int32_t hyper;   // its row in Step::hypers
  uint32_t index;  // its place among all parameters: each has random numbers of its own
  DType dtype;     // the dtype of `param`
  DType rounded_dtype;
  DType grad_dtype;
  DType state_dtypes[kMaxStates];
  bool is_first : 1;  // the step fills its states
  bool uniform : 1;   // all arrays have the dtype of `param`
  bool rounds_at_random : 1;  // that dtype has 16 bits, and the group rounds these at random
  bool step_is_float64 : 1;
  bool scalar_is_float64 : 1;
  bool param_is_measured : 1;  // its part of Step::param_measures is right
};

static_assert(sizeof(TensorEntry) == 104, "a step walks over all of them, up to three times");

// Reads a number that a tensor keeps in float32 or float64, as torch keeps its count of steps.
FASTCLIP_HD double number_at(const void* number, bool is_float64) {
  return is_float64 ? *static_cast<const double*>(number) : *static_cast<const float*>(number);
}
FASTCLIP_HD void store_number(void* number, bool is_float64, double value) {
  is_float64 ? *static_cast<double*>(number) = value : *static_cast<float*>(number) = static_cast<float>(value);
}

// What was measured of a tensor, after all clips.
struct TensorSums {
  double norm = 0;
  double param_times_grad = 0;
  double param_squared = 0;
};

// Returns a tensor's progress in this step. Entry is a TensorEntry, or has the same members.
template <class Entry>
FASTCLIP_HD Progress progress_of(const Entry& tensor, const TensorSums& sums = {}) {
  return {tensor.step ? number_at(tensor.step, tensor.step_is_float64) + 1 : 0,
          tensor.scalar ? number_at(tensor.scalar, tensor.scalar_is_float64) : 0, bool{tensor.scalar_is_float64},
          sums.norm};
}
// With kNeedsProducts.
template <class Entry>
FASTCLIP_HD Progress progress_with_row(const Entry& tensor, const TensorSums& sums, double numel) {
  Progress progress = progress_of(tensor, sums);
  progress.numbers = tensor.scalar;
  progress.numel = numel;
  progress.param_times_grad = sums.param_times_grad;
  progress.param_squared = sums.param_squared;
  return progress;
}

// Counts the step of a tensor of `numel` elements. The scalar comes first: its next value depends on the count before
// that.
template <class R, class Entry>
FASTCLIP_HD void advance(const Entry& tensor, const Hyper& hyper, const TensorSums& sums, double numel) {
  if constexpr (R::kNeedsProducts) {
    R::next_numbers(hyper.of<R>(), progress_with_row(tensor, sums, numel), [&](int place, double value) {
      const int64_t byte = place * (tensor.scalar_is_float64 ? sizeof(double) : sizeof(float));
      store_number(static_cast<char*>(tensor.scalar) + byte, tensor.scalar_is_float64, value);
    });
  } else if constexpr (R::kScalar.name != nullptr) {
    if (tensor.scalar) {
      const double next = R::next_scalar(hyper.of<R>(), progress_of(tensor, sums));
      store_number(tensor.scalar, tensor.scalar_is_float64, next);
    }
  }
  if (tensor.step)
    store_number(tensor.step, tensor.step_is_float64, number_at(tensor.step, tensor.step_is_float64) + 1);
}

// A part of the step with a norm of its own: the tensors from this one to that of the next segment. There may be none,
// where only other ranks have elements.
struct Segment {
  uint32_t number;  // its place among all groups, or all parameters
  uint32_t group;
  uint32_t first_tensor;
  History* history;  // of its limit, if that is a rule; in one part of a step only
};

// The sums of a chunk's param * gradient, and of its param * param.
struct Products {
  double with_grad;
  double squared;
};

// What a GPU measures of a tensor besides the norm of its gradient, and what follows.
struct TensorOutcome {
  Measure sums[3];  // DeltaSums with kMeasuresDelta; with kNeedsProducts, Products, each the `medium` of one
  double factor;    // of the tensor's learning rate; with kNeedsProducts of its gradient, by the rule's own clip
  uint32_t measured;  // its tiles that are measured; 0 between steps
  uint32_t unused;
};

// The passes that a call makes. A norm over several devices takes two calls, `measure` and `update`: in between, every
// device is given the sums of all.
enum class Passes : uint8_t { all, measure, update };

struct Step {
  explicit Step(Rules::Id id) : rule(id) {}

  Rules::Id rule;
  Passes passes = Passes::all;
  Norm norm = Norm::none;  // none: nothing is measured, and gradients are read once
  Limits limits;
  bool skip_nonfinite = false;  // change nothing if the measure met an inf or NaN
  std::vector<TensorEntry> tensors;
  std::vector<Hyper> hypers;
  std::deque<StateScales> scales;  // what tensors point to
  int64_t chunks = 0;
  int64_t elements = 0;
  int64_t clampable = 0;      // number of elements under a value clip
  bool has_unmeasured_params = false;  // some tensor's `param_is_measured` is false
  bool has_step_counts = false;  // some tensor has a `step`; `outcome` is set then
  // Device memory, borrowed for the call.
  Asked asked;
  const float* found_inf = nullptr;   // AMP: change nothing unless it is 0
  Outcome* outcome = nullptr;
  // Counts of clamped elements: one on the CPU, one per block on a GPU (unused ones are 0). Written by every step that
  // is not skipped. nullptr without a value clip.
  double* clamped = nullptr;
  Measure* measures = nullptr;    // scratch memory for a norm: one per chunk on the CPU, Needs::measures on a GPU
  // With Limits::measures_params: the measure of each chunk, or tile, of the parameters. An update writes what it makes
  // of them, and the next step reads that. As long as tensors have the same chunks, or Needs::layout is the same.
  Measure* param_measures = nullptr;
  // With rules among the limits: what they remember. The measuring pass reads their levels, the update pushes the norm.
  // Set in one part of a step only.
  History* clip_history = nullptr;
  History* skip_history = nullptr;
  // With a Scope other than global, the parts that have a norm of their own, and the limits, one per group.
  std::vector<Segment> segments;
  std::vector<NormLimit> segment_limits;
  SegmentOutcome* segment_outcomes = nullptr;  // one per segment
  std::vector<ChangeLimits> segment_changes;  // the limits on their change, one per group; or none
  const SegmentOutcome* segment_totals = nullptr;  // for Passes::update: their sums over all parts, and their levels
  // With kNeedsProducts, what the WeightedClip of each group remembers, nullptr where it has none.
  std::vector<ModelNorms*> model_norms;
  bool measures_deltas = false;  // with kMeasuresDelta: something is measured of it
  // Memory for these two, whose steps are made in one call: for each chunk on the CPU, for each tensor on a GPU.
  Products* products = nullptr;
  DeltaSums* deltas = nullptr;
  TensorOutcome* tensor_outcomes = nullptr;
  const Sums* sums = nullptr;  // for Passes::update: the sums of each part's outcome, in device memory
  const Levels* levels = nullptr;  // and the levels of that part which has the histories
  int parts = 1;  // number of these sums
  bool counts_skips = true;  // exactly one part of a step counts skipped steps
};

// Returns the tensor behind the last one of a segment.
inline size_t end_of_segment(const Step& step, size_t segment) {
  return segment + 1 < step.segments.size() ? step.segments[segment + 1].first_tensor : step.tensors.size();
}

// Returns Limits::smallest_norm of a segment.
inline double smallest_norm_of(const Step& step, size_t segment) {
  int64_t numel = 0;
  for (size_t i = step.segments[segment].first_tensor; i < end_of_segment(step, segment); ++i) {
    numel += step.tensors[i].numel;
  }
  return smallest_norm(step.norm, numel);
}

// Whether the gradients that the rule sees are known before their norm is: then what is added is measured beside it.
inline bool measures_deltas_at_once(const Step& step) {
  bool clips = step.limits.max_norm.is_set();
  for (const NormLimit& limit : step.segment_limits) clips |= !step.segments.empty() && limit.is_set();
  return step.measures_deltas && !clips;
}

namespace cpu {

// Runs work(context) `count` times, each on a thread of its own. The host provides torch's pool.
struct ThreadPool {
  int threads;
  void (*run)(int count, void (*work)(void*), void* context);
};

FASTCLIP_API void run(const Step& step, const ThreadPool& pool);
// Adds up what a step has left in Step::measures, for each of its tensors.
FASTCLIP_API std::vector<Measure> measures_by_tensor(const Step& step);
// Whether a step takes tensors whose states are in 8 bits. measures_more: of the parameters, or of what is added.
FASTCLIP_API bool takes_codes(const Step& step, bool measures_more);
FASTCLIP_API const char* capability();  // the instruction set that runs: "AVX512", "AVX2", "baseline" or "NEON"

}  // namespace cpu

namespace cuda {

// A step's table in device memory. It is used for more tensors than fit into the kernel arguments (about 790).
struct DeviceTable {
  void* memory = nullptr;
  std::vector<unsigned char> uploaded;  // the bytes that are there
};

// The largest number of blocks in a launch, and the length of Step::clamped.
constexpr int kMaxBlocks = 4096;

// The memory that the host must allocate for a step.
struct Needs {
  int64_t measures;  // number of Measures, for a norm
  int64_t tensor_outcomes;
  int64_t param_measures;  // number of Measures of the parameters
  uint64_t layout;  // a hash of the places of each tensor's measures, not 0
  int64_t table_bytes;  // 0: the table fits into the kernel arguments
};
FASTCLIP_API Needs needs(const Step& step);

// Adds up what a step has left in Step::measures, of which `measures` is a copy on the host, for each of its tensors.
FASTCLIP_API std::vector<Measure> measures_by_tensor(const Step& step, const double* measures);

// As cpu::takes_codes. A GPU has kernels for the most common steps.
FASTCLIP_API bool takes_codes(const Step& step, bool measures_more);

// Returns whether a CUDA graph captures the stream.
FASTCLIP_API bool is_capturing(void* stream);

// Enqueues one launch on `stream` of `device`, which must be the current device, and never blocks. A norm takes a
// second launch on a device that cannot run all blocks at once. A changed table in device memory takes one more launch
// per 32,000 bytes. Returns nullptr, or the error's description.
FASTCLIP_API const char* run(const Step& step, DeviceTable& table, int device, void* stream);

}  // namespace cuda

}  // namespace fastclip
