// A device's share of a step: the tensors that are there, and the scratch memory they need. Where a norm is taken over
// ranks, one for all tensors whose sums are added up over the same ranks.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <vector>

#include "../step.h"
#include "groups.h"
#include "shards.h"

namespace fastclip {

// The scalars that AMP, and a deferred clip, hand to a step, each of them or undefined.
struct Amp {
  at::Tensor grad_scale;
  at::Tensor grad_factor;
  at::Tensor found_inf;
};

class Part {
 public:
  Part(c10::Device on, PyObject* over, Rules::Id rule) : device(on), reduction(over), step(rule) {}

  void clear();
  bool in_use() const { return awaited || !step.tensors.empty() || !step.segments.empty(); }  // by this step

  // Allocates what the step needs. Raises where it can't be taken, with nothing enqueued yet.
  void prepare(const NormClip& norm_clip, const Amp& amp, bool counts_skips);

  // On the CPU: does it. On a GPU: enqueues it on the current stream.
  void run(Passes passes);

  // The update of a step that spans several parts: `sums` holds all their sums, here, and behind them the levels.
  void run_update(at::Tensor sums, int parts);
  // Before that: the sums of its segments over all parts, and their levels, float64 [segments of all, 3] and [.., 2].
  void take_segments(const at::Tensor& sums, const at::Tensor& levels);

  // Ranks have put their verdicts together: the one that the update goes by.
  void set_found_inf(const at::Tensor& found_inf);

  bool releases_gil() const;  // while it runs
  bool is_capturing() const;  // a CUDA graph, on the current stream
  [[noreturn]] void raise_capturing() const;

  // Views into what the step leaves behind, for as long as no other step is taken.
  at::Tensor sums() const;           // Sums, as float64: those that are measured
  at::Tensor levels() const;         // Levels, as float64
  at::Tensor total_norm() const;     // float64
  at::Tensor max_norm() const;       // float64
  at::Tensor skip_norm() const;      // float64
  at::Tensor coefficient() const;    // float64
  at::Tensor change() const;         // float64
  at::Tensor skipped() const;        // int64, 0 or 1
  at::Tensor skipped_steps() const;  // int64
  at::Tensor clamped() const;        // float64, to be added up
  at::Tensor segment_coefficients() const;  // float64, of the last step that did not raise
  at::Tensor segment_changes() const;       // the same
  at::Tensor segments() const;       // SegmentOutcomes, as float64, one row per segment
  // The number of each of its segments among all, int64, on its device.
  at::Tensor segment_numbers();
  // Whether its kernels take its tensors whose states are in 8 bits, if there are some; see step.h.
  bool takes_codes(bool measures_more) const;
  // The measure of each tensor's gradient, or all NaN where AMP skipped the step. Waits for the device.
  std::vector<Measure> measures_by_tensor() const;

  const c10::Device device;
  PyObject* const reduction;  // over which ranks its sum is added up; nullptr where all hold the same
  bool awaited = false;       // by other ranks, also where this one has no elements or no gradients
  Step step;
  // The last step that did not raise: whether it came here, and how many elements its value clip looked at, and
  // how many segments it had.
  bool stepped = false;
  bool keeps_tables = false;  // `step` is still that step's: no later one has begun
  int64_t stepped_clampable = 0;
  int64_t stepped_segments = 0;
  // The current row of hyperparameters: its group, whether it clips values, and the template for its tensors' entries.
  Py_ssize_t group = 0;
  bool clamps = false;
  TensorEntry blank{};

 private:
  cuda::Needs prepare_gpu();
  void prepare_param_measures(const cuda::Needs& needs);
  void* room_by_chunk(at::Tensor& memory, size_t bytes) const;
  void* kept_room(at::Tensor& memory, int64_t count, size_t bytes);
  at::Tensor of_stepped_segments(size_t offset) const;
  void run_on_cpu();
  void run_on_gpu();

  Amp amp_;
  at::Tensor sums_;
  at::Tensor outcome_;   // Outcome, as float64
  at::Tensor clamped_;   // Step::clamped
  at::Tensor measures_;  // as float64
  // Step::param_measures, as float64, and the layout in which the last step left them.
  at::Tensor param_measures_;
  at::Tensor products_;
  at::Tensor deltas_;
  uint64_t layout_ = 0, measured_layout_ = 0;
  at::Tensor tensor_outcomes_;   // as float64
  at::Tensor segment_outcomes_;  // the same
  at::Tensor segment_totals_;
  at::Tensor segment_numbers_;
  std::vector<int64_t> numbers_;  // that `segment_numbers_` has
  at::Tensor table_memory_;
  cuda::DeviceTable table_;
  // While a CUDA graph is captured: memory of the graph's own pool instead.
  at::Tensor captured_measures_;
  at::Tensor captured_table_memory_;
  bool capturing_ = false;
  std::vector<at::Tensor> outgrown_;  // memory: a graph that was captured may use it
};

// Returns the part that `run_parts` takes first, or nullptr. It has the histories.
Part* first_in_use(std::vector<Part>& parts);

// One step over all parts that are in use, and one norm over all of them, on all ranks.
void run_parts(std::vector<Part>& parts, const NormClip& norm_clip, const Amp& amp, const Shards& shards);

}  // namespace fastclip
