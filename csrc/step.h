// The contract between the host and each device. Knows no torch and no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "rules/clip.h"
#include "rules/rules.h"

namespace fastclip {

// Tensors are cut into chunks of this many elements, the last of each being shorter. A chunk is the
// unit of scheduling and of the norm: its sum is always taken in the same order, and the sums are
// added in chunk order, so the norm has the same bits on any number of threads or blocks.
constexpr int64_t kChunk = 4096;

// One tensor with a gradient. All its arrays have the same element order in memory.
struct TensorEntry {
  void* param;   // what the rule updates: the parameter, its master weights, or the gradient itself
  void* rounded; // the parameter that master weights are rounded to, or nullptr
  void* grad;
  void* states[kMaxStates];  // nullptr where the rule, or the group, has none
  void* step;                // the number of steps this tensor has seen: read, and counted up by the step. Or nullptr
  void* scalar;              // the rule's number: read, and replaced by the step. Or nullptr
  int64_t numel;
  int64_t first_chunk;
  int32_t hyper;
  uint32_t index;  // among all parameters: of its own random numbers
  DType dtype;     // of `param`,
  DType rounded_dtype;
  DType grad_dtype;
  DType state_dtypes[kMaxStates];
  bool is_first;  // the step fills its states
  bool uniform;   // all arrays have the dtype of `param`, and nothing is rounded at random
  bool step_is_float64;
  bool scalar_is_float64;
};

// A number that is kept of a tensor in float32 or float64, as torch keeps its count of steps.
FASTCLIP_HD double number_at(const void* number, bool is_float64) {
  return is_float64 ? *static_cast<const double*>(number) : *static_cast<const float*>(number);
}
FASTCLIP_HD void store_number(void* number, bool is_float64, double value) {
  is_float64 ? *static_cast<double*>(number) = value : *static_cast<float*>(number) = static_cast<float>(value);
}

// How far a tensor is in this step. Entry is a TensorEntry, or has the same members.
template <class Entry>
FASTCLIP_HD Progress progress_of(const Entry& tensor) {
  return {tensor.step ? number_at(tensor.step, tensor.step_is_float64) + 1 : 0,
          tensor.scalar ? number_at(tensor.scalar, tensor.scalar_is_float64) : 0, bool{tensor.scalar_is_float64}};
}

// Notes that a tensor has taken its step. The scalar first, which is about the step before it is counted.
template <class R, class Entry>
FASTCLIP_HD void advance(const Entry& tensor, const Hyper& hyper) {
  if constexpr (R::kScalar.name != nullptr) {
    if (tensor.scalar) {
      const double next = R::next_scalar(hyper.of<R>(), progress_of(tensor));
      store_number(tensor.scalar, tensor.scalar_is_float64, next);
    }
  }
  if (tensor.step) store_number(tensor.step, tensor.step_is_float64, number_at(tensor.step, tensor.step_is_float64) + 1);
}

// Which passes a call makes. The two are called one by one where a norm is taken over several devices: in
// between, every device is given the sums of all.
enum class Passes : uint8_t { all, measure, update };

struct Step {
  explicit Step(Rules::Id of) : rule(of) {}

  Rules::Id rule;
  Passes passes = Passes::all;
  Norm norm = Norm::none;  // none: gradients are read once, and nothing is measured
  double max_norm = 0;
  bool skip_nonfinite = false;  // leave everything as it is where the measure met an inf or NaN
  std::vector<TensorEntry> tensors;
  std::vector<Hyper> hypers;
  int64_t chunks = 0;
  int64_t elements = 0;
  int64_t clampable = 0;      // elements under a value clip
  bool has_step_counts = false;  // some tensor has a `step`: then there is an outcome
  // Device memory, borrowed for the call.
  const float* grad_scale = nullptr;  // AMP: gradients are divided by it
  const float* found_inf = nullptr;   // AMP: not 0 means leave everything as it is
  Outcome* outcome = nullptr;
  // Counts of the elements that the value clip moved: one on the CPU, one per block on a GPU, 0 for blocks that there were
  // not. Written by every step that is not skipped. nullptr where there is no value clip.
  double* clamped = nullptr;
  Measure* measures = nullptr;  // scratch, where there is a norm: one per chunk on the CPU, cuda::measures()
  const Measure* sums = nullptr;  // Passes::update: the `sum` of each part's outcome, in device memory,
  int parts = 1;                  // and how many they are
  bool counts_skips = true;       // one part of a step counts the skipped steps
};

namespace cpu {

// Calls work(context) `count` times, on as many threads. The host gives torch's pool.
struct ThreadPool {
  int threads;
  void (*run)(int count, void (*work)(void*), void* context);
};

void run(const Step& step, const ThreadPool& pool);
const char* capability();  // the instruction set that runs: "AVX512", "AVX2" or "baseline"

}  // namespace cpu

namespace cuda {

// A step's table in device memory, for more tensors than fit into the kernel arguments (about 790).
struct DeviceTable {
  void* memory = nullptr;
  std::vector<unsigned char> uploaded;  // what is there
};

// The most blocks of a launch, and the length of Step::clamped.
constexpr int kMaxBlocks = 4096;

// What the host has to allocate for a step.
struct Needs {
  int64_t measures;     // where there is a norm
  int64_t table_bytes;  // 0: the table fits into the kernel arguments
};
Needs needs(const Step& step);

// Whether what is enqueued on the stream is captured by a CUDA graph.
bool is_capturing(void* stream);

// Enqueues one launch on `stream` of `device`, which is the current one, and never blocks. A norm takes a second launch where
// the device cannot run all blocks at once; a table in device memory that has changed, one per 32,000 bytes. Returns
// nullptr, or what went wrong.
const char* run(const Step& step, DeviceTable& table, int device, void* stream);

}  // namespace cuda

}  // namespace fastclip
