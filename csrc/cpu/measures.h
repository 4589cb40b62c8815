// The measuring pass, and the sums that it leaves.
#pragma once

#include <algorithm>

#include "chunks.h"
#include "scalings.h"

namespace fastclip::cpu {
namespace {

// Measures the parameters that somebody else has written to, or that no step has measured yet.
void measure_params(const Step& step, const ThreadPool& pool, const LoopTable& loops) {
  for_each_chunk(step, pool, false, [&](int64_t first_chunk, int64_t last_chunk) {
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      if (tensor.param_is_measured) return;
      const ParamsLoop loop = loops.params[tensor.dtype == DType::float64];
      for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
        step.param_measures[place] = loop(tensor, first, count, step.norm);
      });
    });
  });
}

// Adds up the measures of all chunks, in their order.
Sums sum_all(const Step& step) {
  Sums sums{};
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) combine(step.norm, sums.grads, step.measures[chunk]);
  if (step.limits.measures_change) {
    Measure of_row{};
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      const bool last = i + 1 == step.tensors.size();
      const TensorEntry& tensor = step.tensors[i];
      for_chunks_of_tensors(step, i, i + 1, [&](int64_t chunk) { combine(step.norm, of_row, step.measures[chunk]); });
      if (!last && step.tensors[i + 1].hyper == tensor.hyper) continue;
      const Hyper& hyper = step.hypers[tensor.hyper];
      combine(step.norm, sums.change, multiplied(step.norm, of_row, change_of(step.rule, hyper, hyper.lr)));
      of_row = {};
    }
  }
  if (step.limits.measures_params) {
    for (int64_t chunk = 0; chunk < step.chunks; ++chunk) combine(step.norm, sums.params, step.param_measures[chunk]);
  }
  return sums;
}

// Adds up the measures of each segment's chunks, in their order.
void sum_segments(const Step& step) {
  for (size_t i = 0; i < step.segments.size(); ++i) {
    const Segment& segment = step.segments[i];
    SegmentOutcome& outcome = step.segment_outcomes[i] = {};
    for_chunks_of_tensors(step, segment.first_tensor, end_of_segment(step, i),
                          [&](int64_t chunk) { combine(step.norm, outcome.sum, step.measures[chunk]); });
    if (step.limits.measures_params) {
      for_chunks_of_tensors(step, segment.first_tensor, end_of_segment(step, i),
                            [&](int64_t chunk) { combine(step.norm, outcome.params, step.param_measures[chunk]); });
    }
    if (segment.history) outcome.level = level_of(step.segment_limits[segment.group], segment.history);
  }
}

// The parts of DeltaSums that a tensor needs: those of its rule, and those of the limits on a change.
DeltaParts delta_parts(const Step& step, const TensorEntry& tensor, size_t& segment) {
  const ChangeLimits* limits = &step.limits.on_delta;
  if (!step.segment_changes.empty()) {
    const auto place = static_cast<size_t>(&tensor - step.tensors.data());
    while (place >= end_of_segment(step, segment)) ++segment;
    limits = &step.segment_changes[step.segments[segment].group];
  }
  return measured_of(step.rule, step.hypers[tensor.hyper]) | parts_of(*limits);
}

// Measures what the update would add to the chunks of one tensor after the other.
class DeltasOfTensors {
 public:
  DeltasOfTensors(const Step& step, const LoopTable& loops, const Scalings& scalings)
      : step_(step), loops_(loops), constants_of_tensors_(step, scalings) {}

  void begin(const TensorEntry& tensor) {
    parts_ = delta_parts(step_, tensor, segment_);
    if (parts_ == 0 || !tensor.grad) return;
    loop_ = loops_.deltas[tensor.dtype == DType::float64];
    rule_ = &loops_.delta_of(step_.rule, constants_of_tensors_.terms(tensor));
    constants_ = &constants_of_tensors_.of(tensor);
  }
  void measure(const TensorEntry& tensor, int64_t first, int64_t count, int64_t place) const {
    DeltaSums& sums = step_.deltas[place] = {};
    if (parts_ == 0) return;
    if (tensor.grad) {
      sums = loop_(tensor, first, count, *constants_, parts_, *rule_);
    } else if (parts_ & kParam) {  // it counts in the norm of the parameters
      sums.param = loops_.params[tensor.dtype == DType::float64](tensor, first, count, Norm::two);
    }
  }

 private:
  const Step& step_;
  const LoopTable& loops_;
  ConstantsOfTensors constants_of_tensors_;
  size_t segment_ = 0;
  DeltaParts parts_ = 0;
  DeltaLoop loop_ = nullptr;
  const Delta* rule_ = nullptr;
  const Constants* constants_ = nullptr;
};

// By a pass of its own.
void measure_all_deltas(const Step& step, const ThreadPool& pool, const LoopTable& loops, const Scalings& scalings) {
  for_each_chunk(step, pool, /*backwards=*/true, [&](int64_t first_chunk, int64_t last_chunk) {
    DeltasOfTensors deltas(step, loops, scalings);
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      deltas.begin(tensor);
      for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
        deltas.measure(tensor, first, count, place);
      });
    });
  });
}

void measure_all(const Step& step, const ThreadPool& pool, const LoopTable& loops) {
  if (step.has_unmeasured_params) measure_params(step, pool, loops);
  const bool inf = step.norm == Norm::inf, multiplies = needs_products(step.rule);
  const bool looks_at_deltas = measures_deltas_at_once(step);
  const Scalings unscaled({});
  for_each_chunk(step, pool, false, [&](int64_t first_chunk, int64_t last_chunk) {
    int32_t current = -1;
    Clip<double> clip{};
    Seen seen = Seen::raw;
    DeltasOfTensors deltas(step, loops, unscaled);
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      if (looks_at_deltas) deltas.begin(tensor);
      if (!tensor.grad) {
        return for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
          step.measures[place] = {};
          if (looks_at_deltas) deltas.measure(tensor, first, count, place);
        });
      }
      if (current != tensor.hyper) {
        const Hyper& hyper = step.hypers[tensor.hyper];
        clip = clip_of<double>(hyper, step.asked, {});
        const bool clips = clip.unscale != 1 || clips_value(hyper);
        seen = !clips ? Seen::raw : step.skip_nonfinite ? Seen::clipped_or_nonfinite : Seen::clipped;
        current = tensor.hyper;
      }
      const ProductsLoop products = loops.products[tensor.dtype == DType::float64];
      const MeasureLoop loop = loops.measures[static_cast<int>(tensor.grad_dtype)][inf][static_cast<int>(seen)];
      if (!multiplies && !looks_at_deltas) {
        return loop(tensor, begin, size, clip, &step.measures[tensor.first_chunk + begin / kChunk]);
      }
      for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
        loop(tensor, first, count, clip, &step.measures[place]);
        if (multiplies) step.products[place] = products(tensor, first, count, clip);
        if (looks_at_deltas) deltas.measure(tensor, first, count, place);
      });
    });
  });
  step.outcome->sums = sum_all(step);
  sum_segments(step);
}

}  // namespace
}  // namespace fastclip::cpu
