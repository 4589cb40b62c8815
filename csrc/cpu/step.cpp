// A step on the CPU: measured, decided, updated.
#include <atomic>

#include "chosen.h"
#include "measures.h"

namespace fastclip::cpu {
namespace {

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

void update_all(const Step& step, const ThreadPool& pool, const LoopTable& loops, const Scalings& scalings) {
  // A norm was taken just before, by this call or by the one that deferred its clip: the last gradients are in a cache.
  const bool measured = step.norm != Norm::none || step.asked.grad_factor;
  std::atomic<int64_t> all_clamped{0};
  for_each_chunk(step, pool, measured, [&](int64_t first_chunk, int64_t last_chunk) {
    ConstantsOfTensors constants_of_tensors(step, scalings);
    int64_t clamped = 0;
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin, int64_t size) {
      if (!tensor.grad) return;
      const Constants& constants = constants_of_tensors.of(tensor);
      const UpdateLoop loop = loops.update(step.rule, tensor, constants_of_tensors.terms(tensor));
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
      advance<typename decltype(tag)::Rule>(tensor, step.hypers[tensor.hyper], scalings.sums(step, tensor),
                                            static_cast<double>(tensor.numel));
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
    if (step.measures_deltas) {
      if (!measures_deltas_at_once(step)) measure_all_deltas(step, pool, loops, scalings);
      scalings.add_deltas(step);
    }
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

bool takes_codes(const Step&, bool) { return true; }

const char* capability() { return instruction_set().name; }

}  // namespace fastclip::cpu
