// The contract between the plan and each device. Knows no torch and no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "clip_rules.h"
#include "update_rules.h"

namespace fastclip {

// Tensors are cut into chunks of this many elements, the last of each being shorter. A chunk is the
// unit of scheduling and of the norm: its sum is always taken in the same order, and the sums are
// added in chunk order, so the norm has the same bits on any number of threads or blocks.
constexpr int64_t kChunk = 4096;

inline bool clips_value(const Hyper& hyper) { return hyper.clip_low > -HUGE_VAL || hyper.clip_high < HUGE_VAL; }

// One tensor with a gradient. All its arrays have the same element order in memory.
struct TensorEntry {
  void* param;   // what the rule updates: the parameter, or its master weights,
  void* rounded; // and then the parameter that these are rounded to, or nullptr
  void* grad;
  void* states[kMaxStates];  // nullptr where the rule, or the group, has none
  void* step;                // how many steps this tensor has seen: read, and counted up by the step. Or nullptr
  int64_t numel;
  int64_t first_chunk;
  int32_t hyper;
  uint32_t index;  // among all parameters: of its own random numbers
  DType dtype;     // of `param`,
  DType rounded_dtype;
  DType grad_dtype;
  DType state_dtypes[kMaxStates];
  Momentum momentum;
  bool uniform;  // all arrays have the dtype of `param`, and nothing is rounded at random
  bool step_is_float64;
};

// A tensor's count of steps, as torch keeps it.
FASTCLIP_HD double steps_seen(const void* step, bool is_float64) {
  if (!step) return 0;
  return is_float64 ? *static_cast<const double*>(step) : *static_cast<const float*>(step);
}
FASTCLIP_HD void count_step(void* step, bool is_float64) {
  if (!step) return;
  is_float64 ? *static_cast<double*>(step) += 1 : *static_cast<float*>(step) += 1;
}

// Which passes a call makes. The two are called one by one where a norm is taken over several devices: in
// between, every device is given the sums of all.
enum class Passes : uint8_t { all, measure, update };

struct Step {
  Rule rule = Rule::sgd;
  Passes passes = Passes::all;
  Norm norm = Norm::none;  // none: gradients are read once, and nothing is measured
  double max_norm = 0;
  bool skip_nonfinite = false;  // leave everything as it is where the measure met an inf or NaN
  std::vector<TensorEntry> tensors;
  std::vector<Hyper> hypers;
  int64_t chunks = 0;
  int64_t elements = 0;
  int64_t clampable = 0;      // elements under a value clip
  bool counts_steps = false;  // some tensor has a `step`: then there is an outcome
  // Device memory, borrowed for the call.
  const float* grad_scale = nullptr;  // AMP: gradients are divided by it
  const float* found_inf = nullptr;   // AMP: not 0 means leave everything as it is
  Outcome* outcome = nullptr;
  // How many elements the value clip moved, in parts, each set by every step that is not skipped: on the CPU one,
  // on a GPU one of each block and 0 for the blocks there were not. nullptr where there is no value clip.
  double* clamped = nullptr;
  Measure* measures = nullptr;  // scratch, where there is a norm: one per chunk on the CPU, cuda::measures()
  const Measure* sums = nullptr;  // Passes::update: the `sum` of each device's outcome, in device memory,
  int devices = 1;                // and how many they are
  bool counts = true;  // of several devices, one counts the skipped steps
};

namespace cpu {

// Runs work(context, i) for i in [0, count) on as many threads. Given by the plan: torch's pool.
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

// As many blocks has a launch at the most, and as many parts Step::clamped.
constexpr int kMaxBlocks = 4096;

// What the plan has to allocate for a step.
struct Needs {
  int64_t measures;     // where there is a norm
  int64_t table_bytes;  // 0: the table fits into the kernel arguments
};
Needs needs(const Step& step);

// Whether what is enqueued on the stream is captured by a CUDA graph.
bool is_capturing(void* stream);

// Enqueues one launch on `stream` of `device`, which is the current one, and waits for nothing: one more where a norm is taken and the device
// can't run all blocks at once, and one per 32,000 bytes of a table in device memory that has changed.
// Returns nullptr, or what went wrong.
const char* run(const Step& step, DeviceTable& table, int device, void* stream);

}  // namespace cuda

}  // namespace fastclip
