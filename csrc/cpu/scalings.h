// What follows from the measures, for each tensor: the factor of its gradient, that of its learning rate, and the
// constants of its update.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "chunks.h"
#include "loop_table.h"

namespace fastclip::cpu {
namespace {

// The factors of tensors, and their sums after that, by the segments that they are in; or one factor for all.
class Scalings {
 public:
  explicit Scalings(const Scaling& of_all) : of_all_(of_all) {}

  // Decides for each segment, and remembers its norm.
  void add_segments(const Step& step, const Decision& decision) {
    of_tensors_.resize(step.tensors.size());
    for (size_t i = 0; i < step.segments.size(); ++i) {
      const Segment& segment = step.segments[i];
      const NormLimit& limit = step.segment_limits[segment.group];
      const SegmentOutcome& of_all = step.passes == Passes::all ? step.segment_outcomes[i] : step.segment_totals[i];
      const Level level = of_all.level;
      SegmentDecision decided = decide_for(step.norm, limit, level, of_all.sum);
      if (!step.segment_changes.empty() && !step.measures_deltas && segment.first_tensor < end_of_segment(step, i)) {
        const Hyper& hyper = step.hypers[step.tensors[segment.first_tensor].hyper];
        limit_change(step.segment_changes[segment.group], change_of(step.rule, hyper, hyper.lr),
                     total_norm(step.norm, of_all.params), smallest_norm_of(step, i), decided);
      }
      record(step.segment_outcomes[i], decided);
      step.segment_outcomes[i].change = decided.change;
      const Scaling scaling = both(of_all_, decided.scaling);
      std::fill(of_tensors_.begin() + segment.first_tensor, of_tensors_.begin() + end_of_segment(step, i),
                OfTensor{scaling, TensorSums{decided.total_norm * scaling.product()}});
      if (remembers_segments(decision)) push(limit, segment.history, level, decided.total_norm, false, Alone{});
    }
  }

  // The same for the rule's own clip, of each group, and for the products. Only of a step that is taken.
  void add_products(const Step& step) {
    for (size_t group = 0; group < step.model_norms.size(); ++group) {
      if (step.model_norms[group]) clip_group(step, static_cast<uint32_t>(group));
    }
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      OfTensor& own = of_tensors_[i];
      for_chunks_of_tensors(step, i, i + 1, [&](int64_t chunk) {
        own.sums.param_times_grad += step.products[chunk].with_grad * own.scaling.product();
        own.sums.param_squared += step.products[chunk].squared;
      });
    }
  }

  // The factors of learning rates that follow from what the step would add, and from the limits on it.
  void add_deltas(const Step& step) {
    if (is_one()) of_tensors_.resize(step.tensors.size(), OfTensor{of_all_});
    std::vector<DeltaSums> sums(step.tensors.size());
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      const TensorEntry& tensor = step.tensors[i];
      for_chunks_of_tensors(step, i, i + 1, [&](int64_t chunk) { combine(sums[i], step.deltas[chunk]); });
      if (!tensor.grad) continue;
      const double numel = static_cast<double>(tensor.numel);
      of_tensors_[i].lr_factor = lr_factor_of(step.rule, step.hypers[tensor.hyper], numel, norms_of(sums[i]));
    }
    if (step.segments.empty()) {
      step.outcome->change = limit(sums, step.limits.on_delta, 0, step.tensors.size(), step.limits.smallest_norm);
    }
    for (size_t i = 0; i < step.segments.size() && !step.segment_changes.empty(); ++i) {
      const Segment& segment = step.segments[i];
      step.segment_outcomes[i].change = limit(sums, step.segment_changes[segment.group], segment.first_tensor,
                                              end_of_segment(step, i), smallest_norm_of(step, i));
    }
  }

  bool is_one() const { return of_tensors_.empty(); }
  const Scaling& of(const Step& step, const TensorEntry& tensor) const {
    return is_one() ? of_all_ : of_tensors_[&tensor - step.tensors.data()].scaling;
  }
  double lr_factor(const Step& step, const TensorEntry& tensor) const {
    return is_one() ? 1 : of_tensors_[&tensor - step.tensors.data()].lr_factor;
  }
  TensorSums sums(const Step& step, const TensorEntry& tensor) const {
    return is_one() ? TensorSums{} : of_tensors_[&tensor - step.tensors.data()].sums;
  }

 private:
  struct OfTensor {
    Scaling scaling;
    TensorSums sums{};
    double lr_factor = 1;
  };

  // Limits what the step adds to the tensors from `first` to `end`. Returns its norm.
  double limit(const std::vector<DeltaSums>& sums, const ChangeLimits& limits, size_t first, size_t end,
               double smallest) {
    if (!limits.measures_change) return 0;
    DeltaSums sum{};
    for (size_t i = first; i < end; ++i) {
      combine(Norm::two, sum.delta, multiplied(Norm::two, sums[i].delta, of_tensors_[i].lr_factor));
      combine(Norm::two, sum.param, sums[i].param);
    }
    double change;
    const double factor = limit_deltas(limits, sum.delta, sum.param, smallest, change);
    for (size_t i = first; i < end; ++i) of_tensors_[i].lr_factor *= factor;
    return change;
  }

  void clip_group(const Step& step, uint32_t group) {
    const auto for_segments = [&](const auto& body) {
      for (size_t i = 0; i < step.segments.size(); ++i) {
        const size_t end = end_of_segment(step, i);
        if (step.segments[i].group == group && step.segments[i].first_tensor < end) body(i, end);
      }
    };
    const Hyper* hyper = nullptr;
    double square = 0, count = 0;
    for_segments([&](size_t i, size_t) {
      const size_t place = step.segments[i].first_tensor;
      const TensorEntry& tensor = step.tensors[place];
      const Progress progress = progress_with_row(tensor, {}, static_cast<double>(tensor.numel));
      if (!hyper) count = progress.step - 1;
      hyper = &step.hypers[tensor.hyper];
      const double norm = of_tensors_[place].sums.norm * weight_of(step.rule, *hyper, progress);
      square += norm * norm;
    });
    if (!hyper) return;
    const double coefficient = coefficient_of_step(weighted_clip_of(step.rule, *hyper), step.model_norms[group],
                                                   static_cast<int64_t>(count), sqrt(square));
    for_segments([&](size_t i, size_t end) {
      step.segment_outcomes[i].coefficient *= coefficient;
      for (size_t tensor = step.segments[i].first_tensor; tensor < end; ++tensor) {
        of_tensors_[tensor].scaling.coefficient *= coefficient;
        of_tensors_[tensor].sums.norm *= coefficient;
      }
    });
  }

  Scaling of_all_;
  std::vector<OfTensor> of_tensors_;
};

Constants constants_of(const Step& step, const Hyper& hyper, const Scaling& scaling, const Progress& progress,
                       double lr_factor) {
  Constants c;
  c.clip = clip_of<double>(hyper, step.asked, scaling);
  Rules::visit(step.rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    const auto rule_constants = R::constants(hyper, hyper.of<R>(), hyper.lr * lr_factor, progress);
    memcpy(c.rule, &rule_constants, sizeof(rule_constants));
  });
  c.stochastic_rounding = hyper.stochastic_rounding;
  c.rounding_seed = hyper.rounding_seed;
  c.step = static_cast<uint32_t>(static_cast<int64_t>(progress.step));
  if (step.limits.measures_params) c.params_norm = step.norm;
  return c;
}

// The constants of one tensor after the other: derived anew where they are not those of the last one.
class ConstantsOfTensors {
 public:
  ConstantsOfTensors(const Step& step, const Scalings& scalings) : step_(step), scalings_(scalings) {}

  const Constants& of(const TensorEntry& tensor) {
    const TensorSums sums = needs_norms_ ? scalings_.sums(step_, tensor) : TensorSums{};
    const Progress progress = has_rows_ ? progress_with_row(tensor, sums, static_cast<double>(tensor.numel))
                              : counts_ ? progress_of(tensor, sums)
                                        : Progress{};
    const double lr_factor = scalings_.lr_factor(step_, tensor);
    const Hyper& hyper = step_.hypers[tensor.hyper];
    if (current_ != tensor.hyper || (counts_ && !(progress == progress_)) || lr_factor != lr_factor_) {
      constants_ = constants_of(step_, hyper, scalings_.of(step_, tensor), progress, lr_factor);
      current_ = tensor.hyper;
      progress_ = progress;
      lr_factor_ = lr_factor;
    } else if (!scalings_.is_one()) {
      constants_.clip = clip_of<double>(hyper, step_.asked, scalings_.of(step_, tensor));
    }
    return constants_;
  }
  Terms terms(const TensorEntry& tensor) const { return terms_of(step_.hypers[tensor.hyper].terms, tensor.is_first); }

 private:
  const Step& step_;
  const Scalings& scalings_;
  const bool counts_ = step_.has_step_counts, needs_norms_ = needs_norm(step_.rule),
             has_rows_ = needs_products(step_.rule);
  int32_t current_ = -1;
  Progress progress_{-1, -1, false};
  double lr_factor_ = 1;
  Constants constants_;
};

}  // namespace
}  // namespace fastclip::cpu
