// The CPU's step, taken by the CUDA kernels: with a libfastclip.so that has this instead of csrc/cpu/step.cpp, all
// tests of the CPU run on them.
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "step.h"

namespace fastclip::cpu {

// The measures of the parameters are in the order of a GPU's tiles: kept for each engine, by the address of the CPU's.
void keep_param_measures(Step& step, const cuda::Needs& needs) {
  if (!step.param_measures) return;
  struct Kept {
    std::vector<Measure> measures;
    uint64_t layout = 0;
  };
  static std::map<const Measure*, Kept> all;
  Kept& kept = all[step.param_measures];
  if (kept.layout != needs.layout || static_cast<int64_t>(kept.measures.size()) != needs.param_measures) {
    kept = {std::vector<Measure>(needs.param_measures), needs.layout};
    for (TensorEntry& tensor : step.tensors) tensor.param_is_measured = false;
    step.has_unmeasured_params = true;
  }
  step.param_measures = kept.measures.data();
}

// Leaves each tensor's sum at its first chunk, for measures_by_tensor.
void keep_measures(const Step& step, const Step& on_device) {
  if (step.norm == Norm::none || step.passes == Passes::update) return;
  const std::vector<Measure> sums =
      cuda::measures_by_tensor(on_device, reinterpret_cast<const double*>(on_device.measures));
  std::fill_n(step.measures, step.chunks, Measure{});
  for (size_t i = 0; i < sums.size(); ++i) {
    if (step.tensors[i].numel > 0) step.measures[step.tensors[i].first_chunk] = sums[i];
  }
}

std::vector<Measure> measures_by_tensor(const Step& step) {
  std::vector<Measure> sums;
  for (const TensorEntry& tensor : step.tensors) {
    sums.push_back(tensor.numel > 0 ? step.measures[tensor.first_chunk] : Measure{});
  }
  return sums;
}

bool takes_codes(const Step& step, bool measures_more) { return cuda::takes_codes(step, measures_more); }

void run(const Step& step, const ThreadPool&) {
  static std::mutex one_at_a_time;  // the emulated device knows one thread of the host
  const std::lock_guard<std::mutex> lock(one_at_a_time);

  // Scratch memory is the CPU's here: what a GPU's needs is made up for.
  Step on_device = step;
  const cuda::Needs needs = cuda::needs(step);
  std::vector<Measure> measures(step.norm == Norm::none ? 0 : needs.measures);
  on_device.measures = measures.data();
  keep_param_measures(on_device, needs);
  static std::vector<TensorOutcome> tensor_outcomes;  // each step leaves what the next one finds
  if (static_cast<size_t>(needs.tensor_outcomes) > tensor_outcomes.size()) {
    tensor_outcomes.resize(needs.tensor_outcomes);
  }
  on_device.tensor_outcomes = tensor_outcomes.data();
  std::vector<double> clamped(cuda::kMaxBlocks, std::nan(""));
  if (step.clamped) on_device.clamped = clamped.data();
  static std::vector<unsigned char> memory;
  static cuda::DeviceTable table;
  if (static_cast<size_t>(needs.table_bytes) > memory.size()) {
    memory.resize(needs.table_bytes);
    table = {memory.data(), {}};
  }

  // Every other step finds its learning rates in device memory, as schedulers under a CUDA graph leave them.
  static int steps = 0;
  std::vector<double> lr;
  if (++steps % 2 == 0) {
    lr.reserve(step.hypers.size());
    for (Hyper& hyper : on_device.hypers) {
      hyper.lr_on_device = &lr.emplace_back(hyper.lr);
      hyper.lr_is_float64 = true;
      hyper.lr = 1e30;  // not to be used
    }
  }
  if (const char* error = cuda::run(on_device, table, 0, nullptr)) throw std::runtime_error(error);
  keep_measures(step, on_device);
  if (step.clamped) *step.clamped = std::accumulate(clamped.begin(), clamped.end(), 0.0);
}

const char* capability() { return "CUDA on the CPU"; }

}  // namespace fastclip::cpu
