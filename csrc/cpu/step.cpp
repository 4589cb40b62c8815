// A step on the CPU: threads fetch chunks.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>

#include "chosen.h"

namespace fastclip::cpu {
namespace {

// Elements per thread. With fewer, a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 32768;
// Chunks that a thread fetches at a time. A thread that is held up by other work on its core fetches less often.
constexpr int64_t kChunksPerFetch = 16;

// Calls body(tensor, first element, number of elements) for each tensor's share of a range of chunks.
template <class Body>
void for_each_run(const Step& step, int64_t first_chunk, int64_t last_chunk, const Body& body) {
  if (step.tensors.empty()) return;
  auto tensor = std::upper_bound(step.tensors.begin(), step.tensors.end(), first_chunk,
                                 [](int64_t chunk, const TensorEntry& entry) { return chunk < entry.first_chunk; });
  --tensor;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++tensor) {
    const int64_t begin = (chunk - tensor->first_chunk) * kChunk;
    const int64_t end = std::min(tensor->numel, (last_chunk - tensor->first_chunk) * kChunk);
    if (begin < end) body(*tensor, begin, end - begin);
    chunk += (end - begin + kChunk - 1) / kChunk;
  }
}

// Gives this thread the floating-point mode of the calling thread, for as long as the object lives.
// torch.set_flush_denormal sets the mode of one thread only. Without this, a subnormal number would count or not,
// depending on the thread that happens to fetch it.
class FloatingPointMode {
 public:
  explicit FloatingPointMode(const std::fenv_t& wanted) {
    std::fegetenv(&own_);
    std::fesetenv(&wanted);
  }
  ~FloatingPointMode() { std::fesetenv(&own_); }
  FloatingPointMode(const FloatingPointMode&) = delete;

 private:
  std::fenv_t own_;
};

// Runs one parallel region: calls body(first chunk, last chunk) until every chunk was fetched. `backwards` starts where
// the previous pass ended, on data that is still in the cache.
template <class Body>
void for_each_chunk(const Step& step, const ThreadPool& pool, bool backwards, const Body& body) {
  const int threads =
      static_cast<int>(std::min<int64_t>(pool.threads, std::max<int64_t>(step.elements / kElementsPerThread, 1)));
  if (threads == 1 && !backwards) return body(0, step.chunks);

  struct Work {
    const Body& body;
    const int64_t chunks;
    const bool backwards;
    std::atomic<int64_t> fetched{0};
    std::fenv_t mode{};

    void fetch_and_run() {
      for (;;) {
        const int64_t begin = fetched.fetch_add(kChunksPerFetch, std::memory_order_relaxed);
        if (begin >= chunks) return;
        const int64_t end = std::min(begin + kChunksPerFetch, chunks);
        backwards ? body(chunks - end, chunks - begin) : body(begin, end);
      }
    }
  } work{body, step.chunks, backwards};
  if (threads == 1) return work.fetch_and_run();
  std::fegetenv(&work.mode);
  const auto run_in_mode = [](void* context) {
    auto& work = *static_cast<Work*>(context);
    const FloatingPointMode mode(work.mode);
    work.fetch_and_run();
  };
  pool.run(threads, run_in_mode, &work);
}

// Calls body(chunk) for the chunks of the tensors from `first` to `end`.
template <class Body>
void for_chunks_of_tensors(const Step& step, size_t first, size_t end, const Body& body) {
  const auto first_chunk = [&](size_t tensor) {
    return tensor < step.tensors.size() ? step.tensors[tensor].first_chunk : step.chunks;
  };
  for (int64_t chunk = first_chunk(first); chunk < first_chunk(end); ++chunk) body(chunk);
}

// Returns the tensor behind the last one of a segment.
size_t end_of_segment(const Step& step, size_t segment) {
  return segment + 1 < step.segments.size() ? step.segments[segment + 1].first_tensor : step.tensors.size();
}

Constants constants_of(const Step& step, const Hyper& hyper, const Scaling& scaling, const Progress& progress) {
  Constants c;
  c.clip = clip_of<double>(hyper, step.asked, scaling);
  Rules::visit(step.rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    const auto rule_constants = R::constants(hyper, hyper.of<R>(), hyper.lr, progress);
    memcpy(c.rule, &rule_constants, sizeof(rule_constants));
  });
  c.stochastic_rounding = hyper.stochastic_rounding;
  c.rounding_seed = hyper.rounding_seed;
  c.step = static_cast<uint32_t>(static_cast<int64_t>(progress.step));
  if (step.limits.measures_params) c.params_norm = step.norm;
  return c;
}

// Calls body(tensor, first element, number of elements, place of the chunk) for each chunk of a tensor's share.
template <class Body>
void for_each_chunk_of(const TensorEntry& tensor, int64_t begin, int64_t size, const Body& body) {
  int64_t place = tensor.first_chunk + begin / kChunk;
  for (int64_t done = 0; done < size; done += kChunk) body(begin + done, std::min(kChunk, size - done), place++);
}

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
    if (segment.history) outcome.level = level_of(step.segment_limits[segment.group], segment.history);
  }
}

void measure_all(const Step& step, const ThreadPool& pool, const LoopTable& loops) {
  if (step.has_unmeasured_params) measure_params(step, pool, loops);
  const bool inf = step.norm == Norm::inf, multiplies = needs_products(step.rule);
  for_each_chunk(step, pool, false, [&](int64_t first_chunk, int64_t last_chunk) {
    int32_t current = -1;
    Clip<double> clip{};
    Seen seen = Seen::raw;
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      if (!tensor.grad) {
        return for_each_chunk_of(tensor, begin, size,
                                 [&](int64_t, int64_t, int64_t place) { step.measures[place] = {}; });
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
      for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
        loop(tensor, first, count, clip, step.measures[place]);
        if (multiplies) step.products[place] = products(tensor, first, count, clip);
      });
    });
  });
  step.outcome->sums = sum_all(step);
  sum_segments(step);
}

void read_levels(const Step& step) {
  step.outcome->levels = {level_of(step.limits.max_norm, step.clip_history),
                          level_of(step.limits.skip_norm, step.skip_history)};
}

const Levels& levels_of(const Step& step) { return step.passes == Passes::all ? step.outcome->levels : *step.levels; }

Decision decide_for(const Step& step) {
  const bool alone = step.passes == Passes::all;
  const Sums* sums = alone ? &step.outcome->sums : step.sums;
  Sums sum{};
  for (int part = 0; part < (alone ? 1 : step.parts); ++part) combine(step.norm, sum, sums[part]);
  return decide(step.norm, sum, step.limits, levels_of(step), step.skip_nonfinite);
}

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
      const SegmentDecision decided = decide_for(step.norm, limit, level, of_all.sum);
      record(step.segment_outcomes[i], decided);
      const Scaling scaling = both(of_all_, decided.scaling);
      std::fill(of_tensors_.begin() + segment.first_tensor, of_tensors_.begin() + end_of_segment(step, i),
                OfTensor{scaling, {decided.total_norm * scaling.product()}});
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

  bool is_one() const { return of_tensors_.empty(); }
  const Scaling& of(const Step& step, const TensorEntry& tensor) const {
    return is_one() ? of_all_ : of_tensors_[&tensor - step.tensors.data()].scaling;
  }
  TensorSums sums(const Step& step, const TensorEntry& tensor) const {
    return is_one() ? TensorSums{} : of_tensors_[&tensor - step.tensors.data()].sums;
  }

 private:
  struct OfTensor {
    Scaling scaling;
    TensorSums sums;
  };

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
      const Progress progress = progress_with_row(tensor, {});
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

void update_all(const Step& step, const ThreadPool& pool, const LoopTable& loops, const Scalings& scalings) {
  // A norm was taken just before, by this call or by the one that deferred its clip: the last gradients are in a cache.
  const bool measured = step.norm != Norm::none || step.asked.grad_factor;
  const bool counts = step.has_step_counts, needs_norms = needs_norm(step.rule), has_rows = needs_products(step.rule);
  std::atomic<int64_t> all_clamped{0};
  for_each_chunk(step, pool, measured, [&](int64_t first_chunk, int64_t last_chunk) {
    int32_t current = -1;
    Progress current_progress{-1, -1, false};
    Constants constants;
    Terms terms = 0;
    int64_t clamped = 0;
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      if (!tensor.grad) return;
      const TensorSums sums = needs_norms ? scalings.sums(step, tensor) : TensorSums{};
      const Progress progress = has_rows ? progress_with_row(tensor, sums)
                                : counts ? progress_of(tensor, sums)
                                         : Progress{};
      if (current != tensor.hyper || (counts && !(progress == current_progress))) {
        const Hyper& hyper = step.hypers[tensor.hyper];
        constants = constants_of(step, hyper, scalings.of(step, tensor), progress);
        terms = hyper.terms;
        current = tensor.hyper;
        current_progress = progress;
      } else if (!scalings.is_one()) {
        constants.clip = clip_of<double>(step.hypers[tensor.hyper], step.asked, scalings.of(step, tensor));
      }
      const UpdateLoop loop = loops.update(step.rule, tensor, terms_of(terms, tensor.is_first));
      if (!step.limits.measures_params) {
        clamped += loop(tensor, begin, size, constants).clamped;
        return;
      }
      for_each_chunk_of(tensor, begin, size, [&](int64_t first, int64_t count, int64_t place) {
        const Updated updated = loop(tensor, first, count, constants);
        clamped += updated.clamped;
        step.param_measures[place] = updated.params;
      });
    });
    all_clamped.fetch_add(clamped, std::memory_order_relaxed);
  });
  if (step.clamped) *step.clamped = static_cast<double>(all_clamped);
  if (!step.has_step_counts) return;
  Rules::visit(step.rule, [&](auto tag) {
    for (const TensorEntry& tensor : step.tensors)
      advance<typename decltype(tag)::Rule>(tensor, step.hypers[tensor.hyper], scalings.sums(step, tensor));
  });
}

}  // namespace

void run(const Step& step, const ThreadPool& pool) {
  const LoopTable& loops = instruction_set().loops;
  if (step.passes != Passes::update && step.outcome) read_levels(step);
  if (step.found_inf && *step.found_inf != 0) {
    if (step.has_unmeasured_params) measure_params(step, pool, loops);  // the next step takes them for measured
    if (step.passes != Passes::measure) record(*step.outcome, skipped(step.limits, levels_of(step)), step.counts_skips);
    return;
  }
  Scalings scalings({});
  if (step.norm != Norm::none) {
    if (step.passes != Passes::update) measure_all(step, pool, loops);
    if (step.passes == Passes::measure) return;
    const Decision decision = decide_for(step);
    record(*step.outcome, decision, step.counts_skips);
    const Levels& levels = levels_of(step);
    push(step.limits.max_norm, step.clip_history, levels.max_norm, decision.total_norm, false, Alone{});
    push(step.limits.skip_norm, step.skip_history, levels.skip_norm, decision.total_norm, true, Alone{});
    scalings = Scalings(decision.scaling);
    if (!step.segments.empty()) scalings.add_segments(step, decision);
    if (decision.skip) return;
    if (needs_products(step.rule)) scalings.add_products(step);
    if (clips_in_place(step.rule) && decision.scaling.coefficient == 1.0) return;
  }
  update_all(step, pool, loops, scalings);
}

std::vector<Measure> measures_by_tensor(const Step& step) {
  std::vector<Measure> sums;
  for (const TensorEntry& tensor : step.tensors) {
    Measure& sum = sums.emplace_back();
    const Measure* const first = step.measures + tensor.first_chunk;
    for (int64_t i = 0; i < (tensor.numel + kChunk - 1) / kChunk; ++i) combine(step.norm, sum, first[i]);
  }
  return sums;
}

const char* capability() { return instruction_set().name; }

}  // namespace fastclip::cpu
