// Takes random steps by the CUDA kernels on the emulated device and by the CPU, and compares every byte of memory that
// they write, and what lies around it. A small program, so that sanitizers see nothing but the kernels.
//   check_step SCHEDULE(0, 1, 2) DEVICE(0, 1, 2) STEPS [FIRST SEED]
//   check_step huge
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "cuda_runtime.h"
#include "step.h"

using namespace fastclip;

namespace {

void one_thread(int count, void (*work)(void*), void* context) {
  for (int i = 0; i < count; ++i) work(context);
}

// The arrays of all tensors, each kind in one piece of memory with gaps that nobody may write to.
enum Kind { kParams, kRounded, kGrads, kStates, kKinds = kStates + kMaxStates };
struct Memory {
  std::vector<double> of[kKinds], steps, clip_history, skip_history;
  std::vector<std::vector<double>> scalars;  // of each tensor: one, or a row
  std::vector<std::vector<double>> segment_histories;  // empty where a segment's limit is no rule
  std::vector<std::vector<double>> model_norms;  // of each group; empty where the rule has no clip of its own
};

DType dtype_of(const TensorEntry& tensor, int kind) {
  if (kind == kRounded) return tensor.rounded_dtype;
  if (kind == kGrads) return tensor.grad_dtype;
  return kind == kParams ? tensor.dtype : tensor.state_dtypes[kind - kStates];
}

template <class Stored>
void fill(std::vector<double>& memory, int64_t at, int64_t numel, std::mt19937_64& random, bool squares) {
  std::normal_distribution<double> normal;
  auto* values = reinterpret_cast<Stored*>(memory.data()) + at;
  for (int64_t i = 0; i < numel; ++i) {
    const double value = normal(random);
    store(values[i], static_cast<ComputeType<Stored>>(squares ? value * value : value));
  }
}

template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::bfloat16: return body(BFloat16{});
    case DType::float16: return body(Float16{});
  }
}

// Hyperparameters for any rule, in place of csrc/host's GroupReader: what a rule reads is random.
struct RandomGroup {
  std::mt19937_64& random;
  const bool momentum;  // some rules have none

  struct Key {
    explicit Key(const char* name)
        : is_momentum(std::string_view(name) == "momentum"), is_eps(std::string_view(name) == "eps") {}
    bool is_momentum, is_eps;
  };
  double number(const Key& key) const {
    if (key.is_momentum) return momentum && random() % 4 ? 0.9 : 0;
    if (key.is_eps) return 0.1;  // a rounding of a norm must not grow
    const double choices[] = {0.25, 0.5, 0.9, 0.99};
    return choices[random() % 4];
  }
  double number_or_none(const Key& key, double none) const { return random() % 2 ? number(key) : none; }
  double count(const Key&) const { return static_cast<double>(1 + random() % 4); }
  bool flag(const Key&) const { return random() % 3 == 0; }
  void betas(const Key&, double& beta1, double& beta2) const {
    const double choices[] = {0.9, 0.5, 0.25};
    beta1 = choices[random() % 3];
    beta2 = 0.99;
  }
};

// Mostly a common one, which has several kernels.
Rules::Id random_rule(std::mt19937_64& random) {
  std::vector<Rules::Id> common, rare;
  Rules::each([&](auto tag) {
    using R = typename decltype(tag)::Rule;
    auto& ids = R::kIsCommon ? common : rare;
    ids.insert(ids.end(), R::kClipsInPlace ? 1 : 2, Rules::id_of<R>());
  });
  const auto& ids = random() % 4 ? common : rare;
  return ids[random() % ids.size()];
}

// What check_step has to know of a rule.
struct Traits {
  bool in_place, counts_steps, filled_by_first_step, has_scalar, limits_change, products, deltas;
};
Traits traits_of(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) {
    using R = typename decltype(tag)::Rule;
    return Traits{R::kClipsInPlace, R::kCountsSteps,   R::kFilledByFirstStep, R::kScalar.name != nullptr,
                  R::kLimitsChange, R::kNeedsProducts, R::kMeasuresDelta};
  });
}
uint32_t states_of(Rules::Id rule, Terms terms) {
  return Rules::visit(rule, [&](auto tag) { return decltype(tag)::Rule::writes(terms); });
}

bool is_momentum(Rules::Id rule, size_t state) {
  return Rules::visit(rule, [&](auto tag) {
    constexpr auto states = decltype(tag)::Rule::kStates;
    return state < states.size() && states.begin()[state].is_momentum;
  });
}

void* number_of_row(std::vector<double>& row, size_t i, const TensorEntry& tensor) {
  return reinterpret_cast<char*>(row.data()) + i * (tensor.scalar_is_float64 ? sizeof(double) : sizeof(float));
}

struct Case {
  std::mt19937_64 random;
  Memory cpu, gpu;
  Step step;  // over `cpu`
  const Traits traits = traits_of(step.rule);
  std::vector<int64_t> at_byte;     // where a tensor starts,
  std::vector<int64_t> grad_shift;  // and how many bytes later its gradient does
  std::vector<bool> has_rounded;    // master weights
  std::vector<bool> has_grad;       // others are only measured
  bool exact = true;  // to the bit; else the coefficient may be off by a rounding, as sums have another order

  explicit Case(uint64_t seed) : random(seed), step(random_rule(random)) {
    const auto draw = [&](auto... choices) {
      const std::common_type_t<decltype(choices)...> all[] = {choices...};
      return all[random() % sizeof...(choices)];
    };
    const bool mixed = random() % 4 == 0;
    const bool mixtures = random() % 3 == 0;
    const DType one = static_cast<DType>(random() % kNumDTypes);
    step.norm = draw(Norm::none, Norm::two, Norm::inf);
    step.limits.max_norm.ceiling = step.norm == Norm::none ? 0 : draw(0.5, 3.0, 1e9, HUGE_VAL);
    if (step.norm != Norm::none) step.limits.max_norm.kind = NormLimit::Kind::number;
    step.skip_nonfinite = step.norm != Norm::none && random() % 3 == 0;
    if (step.norm != Norm::none && traits.limits_change && random() % 2) {
      step.limits.measures_change = true;
      step.limits.measures_params = random() % 3;
      step.limits.max_change = draw(0.01, 3.0, HUGE_VAL);
      step.limits.max_relative_change = draw(0.01, HUGE_VAL);
      step.limits.smallest_norm = draw(0.0, 1e-3, 100.0);
    }
    const auto groups = draw(1, 2, 3);
    const bool momentum = random() % 2;
    for (int i = 0; i < groups; ++i) {
      Hyper hyper{};
      hyper.lr = 0.1;
      hyper.maximize = random() % 2;
      hyper.weight_decay = draw(0.0, 0.01);
      Rules::visit(step.rule, [&](auto tag) {
        using R = typename decltype(tag)::Rule;
        auto* const settings = new (hyper.settings) typename R::Settings{};
        R::read(RandomGroup{random, momentum}, *settings);
        hyper.terms = R::terms(hyper, *settings);
      });
      hyper.stochastic_rounding = !traits.in_place && mixtures && random() % 2;
      hyper.rounding_seed = 7;
      const bool clips = random() % 2;
      hyper.clip_low = clips ? -0.5 : -HUGE_VAL;
      hyper.clip_high = clips ? 0.25 : HUGE_VAL;
      step.hypers.push_back(hyper);
    }
    const int tensors = draw(1, 3, 20, 400, 1200);
    int64_t bytes = 16;
    for (int i = 0; i < tensors; ++i) {
      TensorEntry tensor{};
      tensor.numel =
          tensors > 20 ? draw(1, 2, 5, 17, 40) : draw(1, 3, 4, 7, 8, 9, 255, 1023, 1024, 1025, 4095, 4097, 6000, 30001);
      tensor.dtype = tensor.grad_dtype = tensor.rounded_dtype = mixed ? static_cast<DType>(random() % kNumDTypes) : one;
      tensor.hyper = static_cast<int32_t>(int64_t{i} * groups / tensors);
      tensor.index = static_cast<uint32_t>(random());
      for (DType& of_state : tensor.state_dtypes) of_state = tensor.dtype;
      tensor.uniform = true;
      bool master = false;
      if (!traits.in_place && mixtures && tensor.dtype != DType::float64) {
        const DType narrow = tensor.rounded_dtype = draw(DType::bfloat16, DType::float16);
        master = random() % 2;
        if (random() % 4) {  // else a master of its own dtype, or only rounded at random
          tensor.dtype = master ? DType::float32 : draw(DType::float32, narrow);
          tensor.grad_dtype = draw(DType::float32, narrow);
          for (DType& of_state : tensor.state_dtypes) of_state = draw(DType::float32, narrow);
        }
        tensor.uniform = false;
      }
      has_rounded.push_back(master);
      has_grad.push_back(!step.limits.measures_params || random() % 6);
      tensor.step_is_float64 = random() % 2;
      tensor.is_first =
          traits.filled_by_first_step && states_of(step.rule, step.hypers[tensor.hyper].terms) && random() % 2;
      tensor.scalar_is_float64 = random() % 2;
      tensor.first_chunk = step.chunks;
      step.chunks += (tensor.numel + kChunk - 1) / kChunk;
      step.elements += tensor.numel;
      step.tensors.push_back(tensor);
      // Some are aligned, some not, by any number of elements.
      const int item = tensor.uniform ? item_size(tensor.dtype) : item_size(DType::float32);
      bytes = (bytes + 15) / 16 * 16 + draw(0, 0, 1, 3) * item;
      at_byte.push_back(bytes);
      grad_shift.push_back(random() % 6 == 0 ? item : 0);  // as a view into a bucket
      bytes += tensor.numel * item + draw(16, 64);
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      cpu.of[kind].assign(bytes / 8 + 4, -12345.678);
      for (int i = 0; i < tensors; ++i) {
        with_type(dtype_of(step.tensors[i], kind), [&](auto stored) {
          const bool squares = kind >= kStates && !is_momentum(step.rule, kind - kStates);  // no less than 0
          fill<decltype(stored)>(cpu.of[kind], at(i, kind) / sizeof(stored), step.tensors[i].numel, random, squares);
        });
      }
    }
    for (const TensorEntry& tensor : step.tensors) {
      const float counted = random() % 1000;
      double& kept = cpu.steps.emplace_back(counted);
      if (!tensor.step_is_float64) memcpy(&kept, &counted, sizeof(counted));
      std::vector<double>& row = cpu.scalars.emplace_back(length_of_row(step.rule, step.hypers[tensor.hyper]));
      for (size_t i = 0; i < row.size(); ++i) {
        store_number(number_of_row(row, i, tensor), tensor.scalar_is_float64, 0.25f + random() % 100 / 200.0f);
      }
    }
    if (random() % (step.skip_nonfinite ? 2 : 8) == 0) {  // somewhere a NaN
      const auto which = random() % tensors;
      with_type(step.tensors[which].grad_dtype, [&](auto stored) {
        using Stored = decltype(stored);
        auto* grads = reinterpret_cast<Stored*>(cpu.of[kGrads].data()) + at(which, kGrads) / sizeof(Stored);
        store(grads[random() % step.tensors[which].numel], static_cast<ComputeType<Stored>>(NAN));
      });
    }
    if (step.norm != Norm::none && !traits.in_place && random() % 2) {
      step.limits.max_norm = random_rule_of_norms(cpu.clip_history);
      if (random() % 2) step.limits.skip_norm = random_rule_of_norms(cpu.skip_history);
      step.skip_nonfinite = true;
    }
    std::mt19937_64 scopes(seed + 77);  // of its own, so that all else is as without segments
    if (traits.deltas) measure_deltas(scopes);
    if (traits.products) add_model_norms(scopes);
    const bool scoped = step.norm != Norm::none && !traits.in_place && !step.limits.measures_change;
    if (needs_norm(step.rule)) {
      add_norms_of_tensors();
    } else if (scoped && scopes() % 2) {
      add_segments(scopes);
    }
    exact = step.norm != Norm::two;
    if (scopes() % 12 == 0) {  // AMP skips the step
      static const float overflow = 1;
      step.found_inf = &overflow;
    }
    gpu = cpu;
    place(cpu);
  }

  // Norms of tensors, which the rule needs, beside that of all, if there is a limit on it.
  void add_norms_of_tensors() {
    if (step.norm == Norm::none) step.limits.max_norm.ceiling = HUGE_VAL;
    step.norm = Norm::two;
    for (uint32_t i = 0; i < step.tensors.size(); ++i) {
      step.segments.push_back({i, static_cast<uint32_t>(step.tensors[i].hyper), i, nullptr});
      step.tensors[i].index = i;
      cpu.segment_histories.emplace_back();
    }
    step.segment_limits.resize(step.hypers.size());
  }

  // Limits on what is added, and what the rule itself has to know of it; with a norm clip, or before.
  void measure_deltas(std::mt19937_64& some) {
    const bool limits = some() % 3;
    step.measures_deltas = limits;
    for (const Hyper& hyper : step.hypers) step.measures_deltas |= measured_of(step.rule, hyper) != 0;
    if (!step.measures_deltas) return;
    step.norm = Norm::two;
    if (!step.limits.max_norm.is_rule() && some() % 2) step.limits.max_norm = {};
    if (limits) step.limits.on_delta = random_limits(some);
    step.limits.smallest_norm = some() % 2 ? 100.0 : 0.0;
    for (size_t i = 0; step.limits.on_delta.measures_params && i < has_grad.size(); ++i) has_grad[i] = some() % 6;
  }

  ChangeLimits random_limits(std::mt19937_64& some) {
    ChangeLimits limits;
    limits.measures_change = true;
    limits.measures_params = some() % 2;
    limits.max_change = some() % 2 ? 0.05 : HUGE_VAL;
    limits.max_relative_change = limits.measures_params && some() % 3 ? 0.01 : HUGE_VAL;
    return limits;
  }

  // What the clip of a rule remembers; some groups have none.
  void add_model_norms(std::mt19937_64& some) {
    std::lognormal_distribution<double> norm(1.0, 1.0);
    for (const Hyper& hyper : step.hypers) {
      const WeightedClip clip = weighted_clip_of(step.rule, hyper);
      std::vector<double>& memory = cpu.model_norms.emplace_back();
      if (!clip.is_set()) continue;
      memory.resize(doubles_of_norms(clip));
      for (double& number : memory) number = norm(some);
    }
    step.model_norms.resize(step.hypers.size());
    step.skip_nonfinite = true;
  }

  // Norms of groups, or of tensors, in place of that of all. Some segments have no tensor.
  void add_segments(std::mt19937_64& scopes) {
    const bool by_group = scopes() % 2;
    for (uint32_t i = 0; i < step.tensors.size(); ++i) {
      const auto group = static_cast<uint32_t>(step.tensors[i].hyper);
      if (by_group && i > 0 && step.tensors[i - 1].hyper == step.tensors[i].hyper) continue;
      const uint32_t number = 2 * (by_group ? group : i);
      if (scopes() % 8 == 0) step.segments.push_back({number + 1, group, i, nullptr});
      step.segments.push_back({number, group, i, nullptr});
    }
    for (size_t group = 0; group < step.hypers.size(); ++group) {
      NormLimit& limit = step.segment_limits.emplace_back();
      std::vector<double> unused;
      if (scopes() % 3 == 0) {
        limit.kind = NormLimit::Kind::number;
        limit.ceiling = scopes() % 2 ? 0.5 : 3.0;
      } else if (scopes() % 4) {
        limit = random_rule_of_norms(unused);
      }
    }
    const bool can_limit_change = step.measures_deltas || traits.limits_change;
    step.limits.on_delta = {};
    for (size_t group = 0; can_limit_change && scopes() % 2 && group < step.hypers.size(); ++group) {
      ChangeLimits& limits = step.segment_changes.emplace_back();
      if (scopes() % 4) limits = random_limits(scopes);
      (step.measures_deltas ? step.limits.on_delta : step.limits).measures_params |= limits.measures_params;
    }
    step.segment_changes.resize(step.segment_changes.empty() ? 0 : step.hypers.size());
    const bool unstepped = step.limits.measures_params || step.limits.on_delta.measures_params;
    for (size_t i = 0; i < has_grad.size(); ++i) has_grad[i] = !unstepped || scopes() % 6;
    for (const Segment& segment : step.segments) {
      const NormLimit& limit = step.segment_limits[segment.group];
      std::vector<double>& history = cpu.segment_histories.emplace_back();
      if (limit.is_rule()) fill_history(limit, history);
    }
    step.limits.max_norm = {};
    cpu.clip_history.clear();
  }

  // A rule, and a history that it has: of none, some, or more norms than it keeps.
  NormLimit random_rule_of_norms(std::vector<double>& history) {
    NormLimit limit;
    limit.kind = random() % 2 ? NormLimit::Kind::quantile : NormLimit::Kind::ema;
    const bool quantile = limit.kind == NormLimit::Kind::quantile;
    const int windows[] = {2, 5, 31, 32, 33, 128, 1024};
    if (quantile) limit.window = windows[random() % 7];
    limit.reciprocal = !quantile && random() % 2;
    limit.warmup = 1 + random() % 2;
    limit.q = random() % 5 / 4.0;
    limit.factor = random() % 2 ? 1.0 : 0.125;
    limit.z = quantile ? 0 : random() % 4 / 2.0;
    limit.decay = 0.9;
    if (random() % 4 == 0) limit.floor = 2.0, limit.ceiling = 20.0;
    fill_history(limit, history);
    return limit;
  }

  void fill_history(const NormLimit& limit, std::vector<double>& history) {
    history.assign(doubles_of_history(limit), 0.0);
    std::lognormal_distribution<double> norm(4.0, 1.0);
    for (auto count = random() % 3 * (limit.window ? limit.window - 1 : 3); count > 0; --count) {
      auto* const filled = reinterpret_cast<History*>(history.data());
      push(limit, filled, level_of(limit, filled), norm(random), false, Alone{});
    }
  }

  int64_t at(size_t tensor, int kind) const { return at_byte[tensor] + (kind == kGrads ? grad_shift[tensor] : 0); }

  void place(Memory& memory) {
    const auto history = [](std::vector<double>& doubles) {
      return doubles.empty() ? nullptr : reinterpret_cast<History*>(doubles.data());
    };
    step.clip_history = history(memory.clip_history);
    step.skip_history = history(memory.skip_history);
    for (size_t i = 0; i < step.segments.size(); ++i) step.segments[i].history = history(memory.segment_histories[i]);
    for (size_t i = 0; i < step.model_norms.size(); ++i) {
      std::vector<double>& doubles = memory.model_norms[i];
      step.model_norms[i] = doubles.empty() ? nullptr : reinterpret_cast<ModelNorms*>(doubles.data());
    }
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      TensorEntry& tensor = step.tensors[i];
      const auto array = [&](int kind) { return reinterpret_cast<char*>(memory.of[kind].data()) + at(i, kind); };
      const uint32_t states = states_of(step.rule, step.hypers[tensor.hyper].terms);
      tensor.param = array(traits.in_place ? kGrads : kParams);
      tensor.rounded = has_rounded[i] ? array(kRounded) : nullptr;
      tensor.grad = has_grad[i] ? array(kGrads) : nullptr;
      tensor.param_is_measured = false;
      step.has_unmeasured_params = step.limits.measures_params;
      for (int s = 0; s < kMaxStates; ++s) tensor.states[s] = states >> s & 1 ? array(kStates + s) : nullptr;
      const bool counts = traits.counts_steps || (!tensor.uniform && step.hypers[tensor.hyper].stochastic_rounding);
      tensor.step = counts ? &memory.steps[i] : nullptr;
      tensor.scalar = traits.has_scalar ? memory.scalars[i].data() : nullptr;
      if (!has_grad[i]) tensor.step = tensor.rounded = tensor.states[0] = nullptr;
      step.has_step_counts |= tensor.step != nullptr;
    }
  }
};

// One device of those that share a step: its tensors, and the scratch memory they need.
struct Device {
  Step step;
  Outcome outcome{};
  std::vector<Measure> measures, param_measures;
  std::vector<SegmentOutcome> segment_outcomes, segment_totals;
  std::vector<TensorOutcome> tensor_outcomes;
  std::vector<double> counts = std::vector<double>(cuda::kMaxBlocks, std::nan(""));
  std::vector<unsigned char> table_memory;
  cuda::DeviceTable table;
  bool on_cpu = false;

  Device(const Step& whole, size_t begin, size_t end) : step(whole) {
    step.tensors.assign(whole.tensors.begin() + begin, whole.tensors.begin() + end);
    step.chunks = step.elements = 0;
    for (TensorEntry& tensor : step.tensors) {
      tensor.first_chunk = step.chunks;
      step.chunks += (tensor.numel + kChunk - 1) / kChunk;
      step.elements += tensor.numel;
    }
    step.segments.clear();
    for (size_t i = 0; i < whole.segments.size(); ++i) {
      Segment segment = whole.segments[i];
      const size_t last = i + 1 < whole.segments.size() ? whole.segments[i + 1].first_tensor : whole.tensors.size();
      if (last < begin || segment.first_tensor > end || (last == begin && begin > 0)) continue;
      if (segment.first_tensor == end && end < whole.tensors.size()) continue;
      if (segment.first_tensor < begin) segment.history = nullptr;  // the other device has it
      segment.first_tensor = static_cast<uint32_t>(std::max<size_t>(segment.first_tensor, begin) - begin);
      step.segments.push_back(segment);
    }
    segment_outcomes.resize(step.segments.size());
    segment_totals.resize(step.segments.size());
    step.segment_outcomes = segment_outcomes.data();
    const cuda::Needs needs = cuda::needs(step);
    measures.resize(std::max<int64_t>(needs.measures, step.chunks));
    param_measures.resize(std::max<int64_t>(needs.param_measures, step.chunks));
    step.param_measures = param_measures.data();
    tensor_outcomes.resize(needs.tensor_outcomes);
    step.tensor_outcomes = tensor_outcomes.data();
    table_memory.resize(needs.table_bytes);
    table.memory = table_memory.data();
    step.outcome = &outcome;
    step.measures = measures.data();
    if (step.clamped) step.clamped = counts.data();
  }

  double clamped() const { return on_cpu ? counts[0] : std::accumulate(counts.begin(), counts.end(), 0.0); }

  // The outcome of a segment that this device may have.
  const SegmentOutcome* outcome_of(uint32_t number) const {
    for (size_t i = 0; i < step.segments.size(); ++i) {
      if (step.segments[i].number == number) return &segment_outcomes[i];
    }
    return nullptr;
  }

  // Takes the sums of both devices for the totals, and the level of the one that has the history.
  void total_segments(const Device& other) {
    for (size_t i = 0; i < step.segments.size(); ++i) {
      segment_totals[i] = segment_outcomes[i];
      if (const SegmentOutcome* of_other = other.outcome_of(step.segments[i].number)) {
        combine(step.norm, segment_totals[i].sum, of_other->sum);
        if (!step.segments[i].history) segment_totals[i].level = of_other->level;
      }
    }
    step.segment_totals = segment_totals.data();
  }

  bool run(Passes passes) {
    step.passes = passes;
    if (on_cpu) return cpu::run(step, cpu::ThreadPool{1, one_thread}), true;
    const char* error = cuda::run(step, table, 0, nullptr);
    if (error) std::printf("error: %s\n", error);
    return !error;
  }
};

// Whether the update has measured the parameters as a pass over them does, to the bit.
bool same_params_measured_again(Device& device) {
  const std::vector<Measure> before = device.param_measures;
  device.step.found_inf = nullptr;
  device.run(Passes::measure);
  return memcmp(before.data(), device.param_measures.data(), before.size() * sizeof(Measure)) == 0;
}

bool same(double a, double b, bool exact, double tolerance = 1e-13) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return exact ? a == b : a == b || std::fabs(a - b) <= tolerance * std::fabs(b);
}

// The norms in them may differ in their last digits.
bool same_histories(const std::vector<double>& a, const std::vector<double>& b) {
  bool good = a.size() == b.size();
  for (size_t i = 0; good && i < a.size(); ++i) good &= same(a[i], b[i], false, 1e-12);
  return good;
}

// What follows from a norm may differ in its last digits.
bool same_scalars(const Case& c) {
  if (!needs_norm(c.step.rule)) return c.gpu.scalars == c.cpu.scalars;
  bool good = true;
  for (size_t i = 0; i < c.step.tensors.size(); ++i) {
    const TensorEntry& tensor = c.step.tensors[i];
    const bool wide = tensor.scalar_is_float64;
    auto of_gpu = c.gpu.scalars[i], of_cpu = c.cpu.scalars[i];
    for (size_t j = 0; j < of_cpu.size(); ++j) {
      const double a = number_at(number_of_row(of_gpu, j, tensor), wide);
      const double b = number_at(number_of_row(of_cpu, j, tensor), wide);
      good &=
          same(a, b, false, wide ? 1e-12 : 2e-7) || std::fabs(a - b) < (wide ? 1e-11 : 1e-6);  // a sum may be near 0
    }
  }
  return good;
}

// A CPU sums parameters of float32 in float32. What is added has the roundings of the norm's coefficient.
double tolerance_of_params(const Case& c) {
  return c.step.limits.measures_params || c.step.measures_deltas ? 1e-6 : 1e-13;
}

// What a device has recorded of its segments.
bool same_segments(const Case& c, const Device& device, const std::vector<SegmentOutcome>& expected) {
  bool good = true;
  for (size_t i = 0; i < c.step.segments.size(); ++i) {
    const SegmentOutcome* const found = device.outcome_of(c.step.segments[i].number);
    if (!found) continue;
    good &= found->measured == 0 && same(found->total_norm, expected[i].total_norm, c.exact) &&
            same(found->max_norm, expected[i].max_norm, c.exact) &&
            same(found->coefficient, expected[i].coefficient, c.exact, tolerance_of_params(c));
    if (!c.step.segment_changes.empty()) {
      good &= same(found->change, expected[i].change, false, std::max(1e-12, tolerance_of_params(c)));
    }
  }
  for (const TensorOutcome& tensor : device.tensor_outcomes) good &= tensor.measured == 0;
  return good;
}

// Values to the bit where the case is exact, but for which NaN a NaN is; else with a rounding of the coefficient in its
// last place. And all the bytes around them.
bool same_memory(const Case& c, int kind) {
  const auto &a = c.gpu.of[kind], &b = c.cpu.of[kind];
  if (memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0) return true;
  std::vector<double> rest_a = a, rest_b = b;  // without the tensors
  for (size_t i = 0; i < c.step.tensors.size(); ++i) {
    bool close = true;
    with_type(dtype_of(c.step.tensors[i], kind), [&](auto stored) {
      using Stored = decltype(stored);
      const double of_float64 = tolerance_of_params(c) > 1e-12 ? 1e-6 : 1e-12;
      const double tolerance = c.exact ? 0 : sizeof(Stored) == 8 ? of_float64 : sizeof(Stored) == 4 ? 1e-5 : 0.02;
      const auto at = c.at(i, kind) / static_cast<int64_t>(sizeof(Stored));
      auto* of_a = reinterpret_cast<Stored*>(rest_a.data()) + at;
      auto* of_b = reinterpret_cast<Stored*>(rest_b.data()) + at;
      for (int64_t j = 0; j < c.step.tensors[i].numel; ++j) {
        const double x = load(of_a[j]), y = load(of_b[j]);
        close &= (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * (1 + std::fabs(y));
        of_a[j] = of_b[j] = Stored{};
      }
    });
    if (!close) return false;
  }
  return memcmp(rest_a.data(), rest_b.data(), a.size() * sizeof(double)) == 0;
}

bool check(uint64_t seed) {
  Case c(seed);
  Outcome expected{};
  std::vector<Measure> measures(c.step.chunks), param_measures(c.step.chunks);
  double expected_clamped = 0;
  c.step.outcome = &expected;
  c.step.measures = measures.data();
  c.step.param_measures = param_measures.data();
  std::vector<SegmentOutcome> segments(c.step.segments.size());
  c.step.segment_outcomes = segments.data();
  std::vector<DeltaSums> deltas(c.step.chunks);
  std::vector<Products> products(c.step.chunks);
  c.step.deltas = deltas.data();
  c.step.products = products.data();
  if (!c.traits.in_place && seed % 4 != 0) c.step.clamped = &expected_clamped;
  cpu::run(c.step, cpu::ThreadPool{1, one_thread});

  c.place(c.gpu);
  const size_t tensors = c.step.tensors.size();
  bool good = true;
  Outcome outcome;
  double clamped = 0;
  const bool alone = c.step.measures_deltas || c.traits.products || !c.step.segment_changes.empty();
  if (c.step.norm != Norm::none && tensors > 1 && seed % 3 == 0 && !alone) {  // as two devices, with one norm
    Device first(c.step, 0, tensors / 2), second(c.step, tensors / 2, tensors);
    second.on_cpu = seed % 2;
    good &= first.run(Passes::measure) && second.run(Passes::measure);
    const Sums sums[] = {first.outcome.sums, second.outcome.sums};
    second.step.clip_history = second.step.skip_history = nullptr;
    for (Device* part : {&first, &second}) {
      part->step.sums = sums;
      part->step.levels = &first.outcome.levels;
      part->step.parts = 2;
      part->step.counts_skips = part == &first;
      part->total_segments(part == &first ? second : first);
    }
    good &= first.run(Passes::update) && second.run(Passes::update);
    good &= same_segments(c, first, segments) && same_segments(c, second, segments);
    good &= same(first.outcome.total_norm, second.outcome.total_norm, true);
    outcome = first.outcome;
    outcome.skipped_steps += second.outcome.skipped_steps;
    good &= first.outcome.skipped == second.outcome.skipped;
    clamped = first.clamped() + second.clamped();
    for (Device* part : {&first, &second}) {
      if (c.step.limits.measures_params) good &= same_params_measured_again(*part);
    }
  } else {
    Device whole(c.step, 0, tensors);
    good &= whole.run(Passes::all) && same_segments(c, whole, segments);
    outcome = whole.outcome;
    clamped = whole.clamped();
    if (c.step.limits.measures_params) good &= same_params_measured_again(whole);
  }
  good &= outcome.arrived == 0 && outcome.finished == 0 && outcome.skipped == expected.skipped;
  good &= outcome.skipped_steps == expected.skipped_steps;
  if (c.step.clamped && !expected.skipped) good &= clamped == expected_clamped;
  const double tolerance = tolerance_of_params(c);
  good &= same(outcome.total_norm, expected.total_norm, c.exact) &&
          same(outcome.coefficient, expected.coefficient, c.exact, tolerance) &&
          same(outcome.change, expected.change, c.exact, tolerance) &&
          same(outcome.max_norm, expected.max_norm, c.exact) && same(outcome.skip_norm, expected.skip_norm, c.exact) &&
          same_histories(c.gpu.clip_history, c.cpu.clip_history) &&
          same_histories(c.gpu.skip_history, c.cpu.skip_history);
  for (size_t i = 0; i < c.step.segments.size(); ++i) {
    good &= same_histories(c.gpu.segment_histories[i], c.cpu.segment_histories[i]);
  }
  for (size_t i = 0; i < c.step.model_norms.size(); ++i) {
    good &= same_histories(c.gpu.model_norms[i], c.cpu.model_norms[i]);
  }
  good &= c.gpu.steps == c.cpu.steps && same_scalars(c);
  for (int kind = 0; kind < kKinds; ++kind) good &= same_memory(c, kind);
  if (!good) std::printf("seed %llu differs: %zu tensors\n", static_cast<unsigned long long>(seed), tensors);
  return good;
}

}  // namespace

// One tensor of more than 2^31 elements. Its pages are all the same two megabytes, and beyond them there is nothing: a
// gradient of ones that is clipped to a half is right wherever it is looked at, and its norm counts its elements.
bool check_huge() {
  constexpr int64_t kNumel = (int64_t{1} << 31) + 5001;
  constexpr size_t kPiece = 2 << 20, kNowhere = size_t{16} << 30;
  const size_t bytes = (kNumel * sizeof(BFloat16) + kPiece - 1) / kPiece * kPiece;
  const int file = memfd_create("huge", 0);
  if (file < 0 || ftruncate(file, kPiece) != 0) return std::perror("memfd"), false;
  auto* reserved = static_cast<char*>(
      mmap(nullptr, bytes + 2 * kNowhere, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (reserved == MAP_FAILED) return std::perror("mmap"), false;
  auto* grads = reinterpret_cast<BFloat16*>(reserved + kNowhere);
  for (size_t at = 0; at < bytes; at += kPiece) {
    if (mmap(reserved + kNowhere + at, kPiece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
      return std::perror("mmap"), false;
    }
  }
  for (size_t i = 0; i < kPiece / sizeof(BFloat16); ++i) store(grads[i], 1.0f);

  Step step(Rules::id_of<ClipGrad>());
  step.norm = Norm::two;
  step.limits.max_norm.ceiling = std::sqrt(double{kNumel}) / 2;
  step.hypers.push_back({});
  step.hypers[0].clip_low = -HUGE_VAL;
  step.hypers[0].clip_high = HUGE_VAL;
  TensorEntry& tensor = step.tensors.emplace_back();
  tensor.param = tensor.grad = grads;
  tensor.numel = kNumel;
  tensor.dtype = tensor.grad_dtype = DType::bfloat16;
  tensor.uniform = true;
  Device device(step, 0, 1);
  const bool good = device.run(Passes::measure) && device.outcome.sums.grads.medium == double{kNumel};
  step.norm = Norm::none;
  step.hypers[0].clip_high = 0.5;
  Device clips(step, 0, 1);
  bool clipped = clips.run(Passes::all);
  for (size_t i = 0; i < kPiece / sizeof(BFloat16); ++i) clipped &= load(grads[i]) == 0.5f;
  std::printf("huge: %s\n", good && clipped ? "right" : "wrong");
  return good && clipped;
}

// One for the whole run: what a device has room for is asked only once.
cuda_on_cpu::Device device_of(int kind) {
  cuda_on_cpu::Device device;
  if (kind == 1) device.cooperative = 0;
  if (kind == 2) {  // keeps few gradients between the passes
    device.multiprocessors = 2;
    device.threads_per_multiprocessor = 256;
    device.shared_per_multiprocessor = device.shared_per_block_optin = 40 << 10;
  }
  return device;
}

int main(int, char** arguments) {
  if (std::string_view(arguments[1]) == "huge") return !check_huge();
  const int schedule = std::atoi(arguments[1]), steps = std::atoi(arguments[3]);
  const uint64_t first = arguments[4] ? std::strtoull(arguments[4], nullptr, 10) : 0;
  const cuda_on_cpu::Device device = device_of(std::atoi(arguments[2]));
  cuda_on_cpu::set_device(&device);
  int taken = 0;
  bool good = true;
  for (; good && taken < steps; ++taken) {
    cuda_on_cpu::set_schedule(schedule, first + taken);
    good = check(first + taken);
  }
  std::printf("%d steps, %d different\n", taken, !good);
  return !good;
}
