// The CPU's loops over a run of elements: one per dtype and set of terms, each for three instruction sets.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "step.h"

namespace fastclip::cpu {
namespace {

// A run of elements of one tensor.
struct Span {
  void* param;
  void* grad;
  void* momentum_buffer;
  int64_t size;
};

// What a loop needs besides its span, in double; each loop converts it to its compute type, as
// torch does with the scalars of an operation.
struct Constants {
  Clip<double> clip;
  SGD<double> sgd;
};

template <class T>
FASTCLIP_HD Clip<T> convert(const Clip<double>& c) {
  return {T(c.unscale), T(c.low), T(c.high), T(c.coefficient)};
}
template <class T>
FASTCLIP_HD SGD<T> convert(const SGD<double>& c) {
  return {T(c.negative_lr), T(c.momentum), T(c.one_minus_dampening), T(c.weight_decay)};
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

// Returns how many elements the value clip moved.
template <class Stored, class WhichTerms>
FASTCLIP_HD int64_t update_loop(const Span& span, const Constants& constants) {
  using T = ComputeType<Stored>;
  const auto clip = convert<T>(constants.clip);
  const auto rule = convert<T>(constants.sgd);
  const WhichTerms terms;
  auto* const params = static_cast<Stored*>(span.param);
  const auto* const grads = static_cast<const Stored*>(span.grad);
  auto* const buffers = static_cast<Stored*>(span.momentum_buffer);
  // Counted in a register of its own per block, as wide as what is compared: one over all blocks would be kept in memory.
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const auto update = [&](int64_t i, Count& clamped) __attribute__((always_inline)) {
    T param = load(params[i]);
    const T grad = load(grads[i]);
    T buffer{};
    if constexpr (WhichTerms::momentum == Momentum::running) buffer = load(buffers[i]);
    clamped += clip.clamps(grad);
    rule(terms, param, clip(grad), buffer);
    store(params[i], param);
    if constexpr (WhichTerms::momentum != Momentum::none) store(buffers[i], buffer);
  };
  constexpr int64_t kBlock = 128;
  int64_t i = 0, all_clamped = 0;
  for (; i + kBlock <= span.size; i += kBlock) {
    prefetch(params + i, kBlock);
    prefetch(grads + i, kBlock);
    if constexpr (WhichTerms::momentum != Momentum::none) prefetch(buffers + i, kBlock);
    Count clamped = 0;
    for (int64_t j = 0; j < kBlock; ++j) update(i + j, clamped);
    all_clamped += clamped;
  }
  Count clamped = 0;
  for (; i < span.size; ++i) update(i, clamped);
  return all_clamped + clamped;
}

template <class Stored>
FASTCLIP_HD void clip_loop(const Span& span, const Constants& constants) {
  const auto clip = convert<ComputeType<Stored>>(constants.clip);
  auto* const grads = static_cast<Stored*>(span.grad);
  for (int64_t i = 0; i < span.size; ++i) store(grads[i], clip(load(grads[i])));
}

// A chunk is summed in this many lanes, on every instruction set, and so to the same bits.
constexpr int kLanes = 32;
// A whole chunk is read as four streams: one core keeps more lines in flight over several pages.
constexpr int kStreams = 4;

// What a norm is taken of: gradients as they are, after unscaling and value clip, or so but for inf and NaN.
enum class Seen { raw, clipped, clipped_or_nonfinite };

template <class Stored, Norm kNorm, Seen kSeen>
FASTCLIP_HD void measure_loop(const Span& span, const Constants& constants, Measure& result) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = std::is_same_v<Stored, double>;
  const auto clip = convert<T>(constants.clip);
  const auto* const grads = static_cast<const Stored*>(span.grad);
  constexpr int kWide = kFloat64 && kNorm == Norm::two ? kLanes : 1;  // lanes of the sums that only float64 needs
  double small[kWide] = {}, medium[kLanes] = {}, big[kWide] = {};
  const auto add = [&](const Stored* from) __attribute__((always_inline)) {
    T x[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      x[lane] = load(from[lane]);
      if constexpr (kSeen != Seen::raw) x[lane] = clip.measured(x[lane], kSeen == Seen::clipped_or_nonfinite);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], double{x[lane]});
    }
  };
  int64_t i = 0;
  if (span.size == kChunk) {
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
  for (; i + kLanes <= span.size; i += kLanes) add(grads + i);
  for (int lane = 0; i < span.size; ++i, ++lane) {
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

using UpdateLoop = int64_t (*)(const Span&, const Constants&);
using ClipLoop = void (*)(const Span&, const Constants&);
using MeasureLoop = void (*)(const Span&, const Constants&, Measure&);

struct LoopTable {
  UpdateLoop update[kNumDTypes][3][2][2];  // dtype, momentum, nesterov, weight decay
  ClipLoop clip[kNumDTypes];
  MeasureLoop measure[kNumDTypes][2][3];  // dtype, inf norm, seen
};

// The loops above are inlined into the members of each set, and so compiled for its target.
#define FASTCLIP_INSTRUCTION_SET(NAME, TARGET)                                                     \
  struct NAME {                                                                                    \
    template <class Stored, class WhichTerms>                                                      \
    TARGET static int64_t update(const Span& s, const Constants& c) {                              \
      return update_loop<Stored, WhichTerms>(s, c);                                                \
    }                                                                                              \
    template <class Stored>                                                                        \
    TARGET static void clip(const Span& s, const Constants& c) {                                   \
      clip_loop<Stored>(s, c);                                                                     \
    }                                                                                              \
    template <class Stored, Norm kNorm, Seen kSeen>                                                \
    TARGET static void measure(const Span& s, const Constants& c, Measure& m) {                    \
      measure_loop<Stored, kNorm, kSeen>(s, c, m);                                                 \
    }                                                                                              \
  };

FASTCLIP_INSTRUCTION_SET(Baseline, )
#if defined(__x86_64__)
FASTCLIP_INSTRUCTION_SET(Avx2, __attribute__((target("avx2,fma"))))
FASTCLIP_INSTRUCTION_SET(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

template <class Set, class Stored, Momentum kMomentum>
constexpr void fill_terms(UpdateLoop (&loops)[2][2]) {
  loops[0][0] = Set::template update<Stored, StaticTerms<kMomentum, false, false>>;
  loops[0][1] = Set::template update<Stored, StaticTerms<kMomentum, false, true>>;
  // Without momentum nesterov means nothing.
  constexpr bool kNesterov = kMomentum != Momentum::none;
  loops[1][0] = Set::template update<Stored, StaticTerms<kMomentum, kNesterov, false>>;
  loops[1][1] = Set::template update<Stored, StaticTerms<kMomentum, kNesterov, true>>;
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
  fill_terms<Set, Stored, Momentum::none>(table.update[d][0]);
  fill_terms<Set, Stored, Momentum::first>(table.update[d][1]);
  fill_terms<Set, Stored, Momentum::running>(table.update[d][2]);
  table.clip[d] = Set::template clip<Stored>;
  fill_measures<Set, Stored, Norm::two>(table.measure[d][0]);
  fill_measures<Set, Stored, Norm::inf>(table.measure[d][1]);
}

template <class Set>
constexpr LoopTable make_loops() {
  LoopTable table{};
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
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       make_loops<Avx512>()},
      {"AVX2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), make_loops<Avx2>()},
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
