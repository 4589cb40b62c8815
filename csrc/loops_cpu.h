// The CPU's loops over a run of elements: one per dtype and set of terms, each for three instruction sets.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "halves_cpu.h"
#include "step.h"

namespace fastclip::cpu {
namespace {

// What a loop needs besides its tensor, in double; each loop converts it to its compute type, as
// torch does with the scalars of an operation.
struct Constants {
  Clip<double> clip;
  SGD<double> sgd;
  Adam<double> adam;
  bool stochastic_rounding;
  uint32_t rounding_seed;
  uint32_t step;  // this one; 0 where nobody counts
};

template <template <class> class Rule>
FASTCLIP_HD const Rule<double>& rule_of(const Constants& constants) {
  if constexpr (std::is_same_v<Rule<double>, Adam<double>>) {
    return constants.adam;
  } else {
    return constants.sgd;
  }
}

template <class T>
FASTCLIP_HD Clip<T> convert(const Clip<double>& c) {
  return {T(c.unscale), T(c.low), T(c.high), T(c.coefficient)};
}

// The hardware prefetcher stops at each page and looks too short a way ahead: one core reads one stream
// at about 60 % of what it can. Asking for the lines this far ahead brings the rest.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kCacheLine = 64;

// Asks for `count` elements, some way ahead of `from`.
template <class Stored>
FASTCLIP_HD void prefetch(const Stored* from, int64_t count, int64_t bytes_ahead = kPrefetchBytes) {
  const char* ahead = reinterpret_cast<const char*>(from) + bytes_ahead;
  for (int64_t byte = 0; byte < count * int64_t{sizeof(Stored)}; byte += kCacheLine) __builtin_prefetch(ahead + byte);
}

// Elements are updated so many at a time. What the value clip moved is counted in a register per block, as wide as
// what is compared: a count over all blocks would be kept in memory.
constexpr int64_t kBlock = 128;

// Updates `size` elements of arrays in the compute type. Returns how many the value clip moved.
template <class T, template <class> class Rule, class WhichTerms>
FASTCLIP_HD int64_t update_block(T* params, const T* grads, T* const* states, int64_t size, const Clip<T>& clip,
                                 const Rule<T>& rule) {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr WhichTerms terms{};
  constexpr int kReads = Rule<T>::reads(terms), kWrites = Rule<T>::writes(terms);
  T* const s0 = states[0];
  T* const s1 = states[1];
  T* const s2 = states[2];
  Count clamped = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    T param = params[i];
    T state[kMaxStates]{};
    if constexpr (kReads > 0) state[0] = s0[i];
    if constexpr (kReads > 1) state[1] = s1[i];
    if constexpr (kReads > 2) state[2] = s2[i];
    clamped += clip.clamps(grads[i]);
    rule(terms, param, clip(grads[i]), state);
    params[i] = param;
    if constexpr (kWrites > 0) s0[i] = state[0];
    if constexpr (kWrites > 1) s1[i] = state[1];
    if constexpr (kWrites > 2) s2[i] = state[2];
  }
  return clamped;
}

// Elements [begin, begin + size) of a tensor whose arrays all have the type it is computed in.
template <class T, template <class> class Rule, class WhichTerms>
FASTCLIP_HD int64_t update_uniform(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& constants) {
  constexpr int kWrites = Rule<T>::writes(WhichTerms{});
  const auto clip = convert<T>(constants.clip);
  const Rule<T> rule(rule_of<Rule>(constants));
  auto* const params = static_cast<T*>(tensor.param) + begin;
  const auto* const grads = static_cast<const T*>(tensor.grad) + begin;
  T* states[kMaxStates];
  for (int s = 0; s < kMaxStates; ++s) states[s] = static_cast<T*>(tensor.states[s]) + (s < kWrites ? begin : 0);
  const auto at = [&](int64_t i, T* (&moved)[kMaxStates]) __attribute__((always_inline)) {
    for (int s = 0; s < kMaxStates; ++s) moved[s] = states[s] + (s < kWrites ? i : 0);
  };
  int64_t i = 0, clamped = 0;
  for (; i + kBlock <= size; i += kBlock) {
    T* moved[kMaxStates];
    at(i, moved);
    prefetch(params + i, kBlock);
    prefetch(grads + i, kBlock);
    for (int s = 0; s < kWrites; ++s) prefetch(moved[s], kBlock);
    clamped += update_block<T, Rule, WhichTerms>(params + i, grads + i, moved, kBlock, clip, rule);
  }
  T* moved[kMaxStates];
  at(i, moved);
  return clamped + update_block<T, Rule, WhichTerms>(params + i, grads + i, moved, size - i, clip, rule);
}

// A block of an array of any of the narrower dtypes, in float.
template <class Stored>
FASTCLIP_HD void read_block(const void* from, int64_t at, int64_t size, float* to) {
  const auto* const values = static_cast<const Stored*>(from) + at;
  for (int64_t i = 0; i < size; ++i) to[i] = load(values[i]);
}
template <class Stored>
FASTCLIP_HD void write_block(void* to, int64_t at, int64_t size, const float* from) {
  auto* const values = static_cast<Stored*>(to) + at;
  for (int64_t i = 0; i < size; ++i) store(values[i], from[i]);
}
template <class Stored>
FASTCLIP_HD void round_block(void* to, int64_t at, int64_t size, const float* from, uint32_t key) {
  auto* const values = static_cast<Stored*>(to) + at;
  const auto first = static_cast<uint32_t>(at);
  for (uint32_t i = 0; i < size; ++i) store(values[i], from[i], noise(key, first + i));
}

template <class Set>
void read_any(DType dtype, const void* from, int64_t at, int64_t size, float* to) {
  if (dtype == DType::float32) return Set::template read_as<float>(from, at, size, to);
  if (dtype == DType::bfloat16) return Set::template read_as<BFloat16>(from, at, size, to);
  Set::Halves::read(static_cast<const Float16*>(from) + at, size, to);
}
template <class Set>
void write_any(DType dtype, void* to, int64_t at, int64_t size, const float* from) {
  if (dtype == DType::float32) return Set::template write_as<float>(to, at, size, from);
  if (dtype == DType::bfloat16) return Set::template write_as<BFloat16>(to, at, size, from);
  Set::Halves::write(static_cast<Float16*>(to) + at, size, from);
}
template <class Set>
void round_any(DType dtype, void* to, int64_t at, int64_t size, const float* from, uint32_t key) {
  if (dtype == DType::float32) return Set::template write_as<float>(to, at, size, from);
  if (dtype == DType::bfloat16) return Set::template round_as<BFloat16>(to, at, size, from, key);
  Set::template round_as<Float16>(to, at, size, from, key);
}

// The same for a tensor with 16-bit arrays, or a mixture of float32 and those: a block at a time is brought to float,
// into the innermost cache.
template <class Set, template <class> class Rule, class WhichTerms>
FASTCLIP_HD int64_t update_staged(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& constants) {
  constexpr int kReads = Rule<float>::reads(WhichTerms{}), kWrites = Rule<float>::writes(WhichTerms{});
  const auto clip = convert<float>(constants.clip);
  const Rule<float> rule(rule_of<Rule>(constants));
  alignas(kCacheLine) float params[kBlock], grads[kBlock], states[kMaxStates][kBlock];
  float* const rows[kMaxStates] = {states[0], states[1], states[2]};
  int64_t clamped = 0;
  for (const int64_t end = begin + size; begin < end; begin += kBlock) {
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    const auto write = [&](int array, DType dtype, void* to, const float* from) {
      if (!constants.stochastic_rounding) return write_any<Set>(dtype, to, begin, count, from);
      const uint32_t key = noise_key(constants.rounding_seed, constants.step, tensor.index, array, begin);
      round_any<Set>(dtype, to, begin, count, from, key);
    };
    read_any<Set>(tensor.dtype, tensor.param, begin, count, params);
    read_any<Set>(tensor.grad_dtype, tensor.grad, begin, count, grads);
    for (int s = 0; s < kReads; ++s) read_any<Set>(tensor.state_dtypes[s], tensor.states[s], begin, count, states[s]);
    clamped += update_block<float, Rule, WhichTerms>(params, grads, rows, count, clip, rule);
    write(0, tensor.dtype, tensor.param, params);
    if (tensor.rounded) write_any<Set>(tensor.rounded_dtype, tensor.rounded, begin, count, params);
    for (int s = 0; s < kWrites; ++s) write(1 + s, tensor.state_dtypes[s], tensor.states[s], states[s]);
  }
  return clamped;
}

template <class Set, class Stored>
FASTCLIP_HD void clip_loop(const TensorEntry& tensor, int64_t begin, int64_t size, const Clip<double>& of_group) {
  const auto clip = convert<ComputeType<Stored>>(of_group);
  auto* const grads = static_cast<Stored*>(tensor.grad) + begin;
  if constexpr (std::is_same_v<Stored, Float16>) {
    alignas(kCacheLine) float block[kBlock];
    for (int64_t at = 0; at < size; at += kBlock) {
      const int64_t count = size - at < kBlock ? size - at : kBlock;
      Set::Halves::read(grads + at, count, block);
      for (int64_t i = 0; i < count; ++i) block[i] = clip(block[i]);
      Set::Halves::write(grads + at, count, block);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) store(grads[i], clip(load(grads[i])));
  }
}

// A chunk is summed in this many lanes, on every instruction set, and so to the same bits.
constexpr int kLanes = 32;
// A whole chunk is read as four streams: one core keeps more lines in flight over several pages.
constexpr int kStreams = 4;

// What a norm is taken of: gradients as they are, after unscaling and value clip, or so but for inf and NaN.
enum class Seen { raw, clipped, clipped_or_nonfinite };

template <class Set, class Stored, Norm kNorm, Seen kSeen>
FASTCLIP_HD void measure_loop(const TensorEntry& tensor, int64_t begin, int64_t size, const Clip<double>& of_group,
                              Measure& result) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = std::is_same_v<Stored, double>;
  const auto clip = convert<T>(of_group);
  const auto* const grads = static_cast<const Stored*>(tensor.grad) + begin;
  constexpr int kWide = kFloat64 && kNorm == Norm::two ? kLanes : 1;  // lanes of the sums that only float64 needs
  double small[kWide] = {}, medium[kLanes] = {}, big[kWide] = {};
  const auto add = [&](const Stored* from) __attribute__((always_inline)) {
    T x[kLanes];
    constexpr bool kHalves = std::is_same_v<Stored, Float16>;
    if constexpr (kHalves) Set::Halves::read(from, kLanes, x);
    for (int lane = 0; lane < kLanes; ++lane) {
      if constexpr (!kHalves) x[lane] = load(from[lane]);
      if constexpr (kSeen != Seen::raw) x[lane] = clip.measured(x[lane], kSeen == Seen::clipped_or_nonfinite);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], double{x[lane]});
    }
  };
  int64_t i = 0;
  if (size == kChunk) {
    constexpr int64_t kStream = kChunk / kStreams;
    for (; i < kStream; i += kLanes) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const Stored* const from = grads + stream * kStream + i;
        prefetch(from, kLanes, kChunk * sizeof(Stored));  // the same place of the next chunk
        add(from);
      }
    }
    i = kChunk;
  }
  for (; i + kLanes <= size; i += kLanes) add(grads + i);
  for (int lane = 0; i < size; ++i, ++lane) {
    const T x = clip.measured(load(grads[i]), kSeen == Seen::clipped_or_nonfinite);
    measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], double{x});
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      medium[lane] = kNorm == Norm::inf ? larger(medium[lane], medium[lane + half]) : medium[lane] + medium[lane + half];
      if constexpr (kWide > 1) {
        small[lane] += small[lane + half];
        big[lane] += big[lane + half];
      }
    }
  }
  result = {small[0], medium[0], big[0]};
}

// ---- the three instruction sets ----------------------------------------------------------------

using UpdateLoop = int64_t (*)(const TensorEntry&, int64_t begin, int64_t size, const Constants&);
using ClipLoop = void (*)(const TensorEntry&, int64_t begin, int64_t size, const Clip<double>&);
using MeasureLoop = void (*)(const TensorEntry&, int64_t begin, int64_t size, const Clip<double>&, Measure&);

// How the arrays of a tensor are stored.
enum class Storage { float32, float64, staged };
constexpr int kNumStorages = 3;
inline Storage storage_of(const TensorEntry& tensor) {
  if (!tensor.uniform) return Storage::staged;
  return tensor.dtype == DType::float32 ? Storage::float32 : tensor.dtype == DType::float64 ? Storage::float64 : Storage::staged;
}

struct LoopTable {
  UpdateLoop sgd[kNumStorages][3][2][2];  // momentum, nesterov, weight decay
  UpdateLoop adam[kNumStorages][2][2];    // amsgrad, weight decay
  ClipLoop clip[kNumDTypes];
  MeasureLoop measure[kNumDTypes][2][3];  // inf norm, seen

  UpdateLoop update(Rule rule, const TensorEntry& tensor, const Terms& terms) const {
    const int storage = static_cast<int>(storage_of(tensor));
    if (rule == Rule::adam) return adam[storage][terms.amsgrad][terms.weight_decay];
    return sgd[storage][static_cast<int>(terms.momentum)][terms.nesterov][terms.weight_decay];
  }
};

// The loops above are inlined into the members of each set, and so compiled for its target.
#define FASTCLIP_INSTRUCTION_SET(NAME, HALVES, TARGET)                                                                 \
  struct NAME {                                                                                                        \
    using Halves = HALVES;                                                                                             \
    template <class Stored>                                                                                            \
    TARGET static void read_as(const void* from, int64_t at, int64_t size, float* to) {                                \
      size == kBlock ? read_block<Stored>(from, at, kBlock, to) : read_block<Stored>(from, at, size, to);              \
    }                                                                                                                  \
    template <class Stored>                                                                                            \
    TARGET static void write_as(void* to, int64_t at, int64_t size, const float* from) {                               \
      size == kBlock ? write_block<Stored>(to, at, kBlock, from) : write_block<Stored>(to, at, size, from);            \
    }                                                                                                                  \
    template <class Stored>                                                                                            \
    TARGET static void round_as(void* to, int64_t at, int64_t size, const float* from, uint32_t key) {                 \
      size == kBlock ? round_block<Stored>(to, at, kBlock, from, key) : round_block<Stored>(to, at, size, from, key);  \
    }                                                                                                                  \
    template <Storage kStorage, template <class> class Rule, class WhichTerms>                                         \
    TARGET static int64_t update(const TensorEntry& t, int64_t begin, int64_t size, const Constants& c) {              \
      if constexpr (kStorage == Storage::staged) return update_staged<NAME, Rule, WhichTerms>(t, begin, size, c);      \
      using T = std::conditional_t<kStorage == Storage::float64, double, float>;                                       \
      return update_uniform<T, Rule, WhichTerms>(t, begin, size, c);                                                   \
    }                                                                                                                  \
    template <class Stored>                                                                                            \
    TARGET static void clip(const TensorEntry& t, int64_t begin, int64_t size, const Clip<double>& c) {                \
      clip_loop<NAME, Stored>(t, begin, size, c);                                                                      \
    }                                                                                                                  \
    template <class Stored, Norm kNorm, Seen kSeen>                                                                    \
    TARGET static void measure(const TensorEntry& t, int64_t begin, int64_t size, const Clip<double>& c, Measure& m) { \
      measure_loop<NAME, Stored, kNorm, kSeen>(t, begin, size, c, m);                                                  \
    }                                                                                                                  \
  };

FASTCLIP_INSTRUCTION_SET(Baseline, PortableHalves, )
#if defined(__x86_64__)
FASTCLIP_INSTRUCTION_SET(Avx2, F16c, __attribute__((target("avx2,fma,f16c"))))
FASTCLIP_INSTRUCTION_SET(Avx512, Avx512Halves, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512"))))
#endif

template <class Set, Storage kStorage, Momentum kMomentum>
constexpr void fill_sgd(UpdateLoop (&loops)[2][2]) {
  // Without momentum nesterov means nothing.
  constexpr bool kNesterov = kMomentum != Momentum::none;
  loops[0][0] = Set::template update<kStorage, SGD, StaticTerms<kMomentum, false, false, false>>;
  loops[0][1] = Set::template update<kStorage, SGD, StaticTerms<kMomentum, false, true, false>>;
  loops[1][0] = Set::template update<kStorage, SGD, StaticTerms<kMomentum, kNesterov, false, false>>;
  loops[1][1] = Set::template update<kStorage, SGD, StaticTerms<kMomentum, kNesterov, true, false>>;
}

template <class Set, Storage kStorage>
constexpr void fill_updates(LoopTable& table) {
  auto& sgd = table.sgd[static_cast<int>(kStorage)];
  fill_sgd<Set, kStorage, Momentum::none>(sgd[0]);
  fill_sgd<Set, kStorage, Momentum::first>(sgd[1]);
  fill_sgd<Set, kStorage, Momentum::running>(sgd[2]);
  auto& adam = table.adam[static_cast<int>(kStorage)];
  adam[0][0] = Set::template update<kStorage, Adam, StaticTerms<Momentum::none, false, false, false>>;
  adam[0][1] = Set::template update<kStorage, Adam, StaticTerms<Momentum::none, false, true, false>>;
  adam[1][0] = Set::template update<kStorage, Adam, StaticTerms<Momentum::none, false, false, true>>;
  adam[1][1] = Set::template update<kStorage, Adam, StaticTerms<Momentum::none, false, true, true>>;
}

template <class Set, class Stored, Norm kNorm>
constexpr void fill_measures(MeasureLoop (&loops)[3]) {
  loops[0] = Set::template measure<Stored, kNorm, Seen::raw>;
  loops[1] = Set::template measure<Stored, kNorm, Seen::clipped>;
  loops[2] = Set::template measure<Stored, kNorm, Seen::clipped_or_nonfinite>;
}

template <class Set, class Stored>
constexpr void fill_dtype(LoopTable& table, DType dtype) {
  const int d = static_cast<int>(dtype);
  table.clip[d] = Set::template clip<Stored>;
  fill_measures<Set, Stored, Norm::two>(table.measure[d][0]);
  fill_measures<Set, Stored, Norm::inf>(table.measure[d][1]);
}

template <class Set>
constexpr LoopTable make_loops() {
  LoopTable table{};
  fill_updates<Set, Storage::float32>(table);
  fill_updates<Set, Storage::float64>(table);
  fill_updates<Set, Storage::staged>(table);
  fill_dtype<Set, float>(table, DType::float32);
  fill_dtype<Set, double>(table, DType::float64);
  fill_dtype<Set, BFloat16>(table, DType::bfloat16);
  fill_dtype<Set, Float16>(table, DType::float16);
  return table;
}

struct InstructionSet {
  const char* name;
  bool supported;
  LoopTable loops;
};

// The best that the machine has, or the one named by FASTCLIP_CPU_CAPABILITY if the machine has it.
const InstructionSet& instruction_set() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"AVX512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && F16c::supported(),
       make_loops<Avx512>()},
      {"AVX2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && F16c::supported(),
       make_loops<Avx2>()},
#endif
      {"baseline", true, make_loops<Baseline>()},
  };
  static const InstructionSet& chosen = [&]() -> const InstructionSet& {
    const char* wanted = std::getenv("FASTCLIP_CPU_CAPABILITY");
    const InstructionSet* best = nullptr;
    for (const auto& set : sets) {
      if (!set.supported) continue;
      if (wanted && std::strcmp(wanted, set.name) == 0) return set;
      if (!best) best = &set;
    }
    return *best;
  }();
  return chosen;
}

}  // namespace
}  // namespace fastclip::cpu
