// The loops, compiled for three instruction sets, and the choice among them.
#pragma once

#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "loops.h"

namespace fastclip::cpu {
namespace {

using UpdateLoop = Updated (*)(const TensorEntry&, int64_t begin, int64_t size, const Constants&);
using MeasureLoop = void (*)(const TensorEntry&, int64_t begin, int64_t size, const Clip<double>&, Measure&);
using ParamsLoop = Measure (*)(const TensorEntry&, int64_t begin, int64_t size, Norm);

// The storage of a tensor's arrays. staged: 16-bit or mixed arrays, which go through float32 block by block.
enum class Storage { float32, float64, staged };
constexpr int kNumStorages = 3;
inline Storage storage_of(const TensorEntry& tensor) {
  if (!tensor.uniform) return Storage::staged;
  return tensor.dtype == DType::float32   ? Storage::float32
         : tensor.dtype == DType::float64 ? Storage::float64
                                          : Storage::staged;
}

// Each rule has a row of loops, one for each value of its terms; rows lie one after the other.
constexpr int count_of_loops() {
  int count = 0;
  Rules::each([&](auto tag) { count += 1 << decltype(tag)::Rule::kSwitches; });
  return count;
}
constexpr auto kFirstLoop = [] {
  std::array<int, Rules::kCount> firsts{};
  int rule = 0, next = 0;
  Rules::each([&](auto tag) {
    firsts[rule++] = next;
    next += 1 << decltype(tag)::Rule::kSwitches;
  });
  return firsts;
}();

struct LoopTable {
  UpdateLoop updates[kNumStorages][count_of_loops()];
  MeasureLoop measures[kNumDTypes][2][3];  // by dtype, inf norm or not, Seen
  ParamsLoop params[2];  // float64 or not

  UpdateLoop update(Rules::Id rule, const TensorEntry& tensor, Terms terms) const {
    return updates[static_cast<int>(storage_of(tensor))][kFirstLoop[rule.index()] + terms];
  }
};

// The entry points of one instruction set. The loops of loops.h are inlined into them, and so compiled for its target.
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
    template <Storage kStorage, class R, Terms kTerms>                                                                 \
    TARGET static Updated update(const TensorEntry& t, int64_t begin, int64_t size, const Constants& c) {              \
      if constexpr (kStorage == Storage::staged) return update_staged<NAME, R, kTerms>(t, begin, size, c);             \
      using T = std::conditional_t<kStorage == Storage::float64, double, float>;                                       \
      return update_uniform<T, R, kTerms>(t, begin, size, c);                                                          \
    }                                                                                                                  \
    template <class Stored, Norm kNorm, Seen kSeen>                                                                    \
    TARGET static void measure(const TensorEntry& t, int64_t begin, int64_t size, const Clip<double>& c, Measure& m) { \
      measure_loop<NAME, Stored, kNorm, kSeen>(t, begin, size, c, m);                                                  \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    TARGET static Measure measure_params_of(const TensorEntry& t, int64_t begin, int64_t size, Norm norm) {            \
      return measure_params<NAME, T>(t, begin, size, norm);                                                            \
    }                                                                                                                  \
  };

FASTCLIP_INSTRUCTION_SET(Baseline, BaselineHalves, )
#if defined(__x86_64__)
FASTCLIP_INSTRUCTION_SET(Avx2, F16c, __attribute__((target("avx2,fma,f16c"))))
FASTCLIP_INSTRUCTION_SET(Avx512, Avx512Halves,
                         __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c" FASTCLIP_WIDEST))))
#endif

template <class Set, Storage kStorage, class R, uint32_t... kTerms>
constexpr void fill_rule(UpdateLoop* loops, std::integer_sequence<uint32_t, kTerms...>) {
  ((loops[kTerms] = Set::template update<kStorage, R, R::canonical(kTerms)>), ...);
}

template <class Set, Storage kStorage>
constexpr void fill_updates(LoopTable& table) {
  Rules::each([&](auto tag) {
    using R = typename decltype(tag)::Rule;
    UpdateLoop* const loops = table.updates[static_cast<int>(kStorage)] + kFirstLoop[Rules::id_of<R>().index()];
    fill_rule<Set, kStorage, R>(loops, std::make_integer_sequence<uint32_t, 1 << R::kSwitches>{});
  });
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
  fill_measures<Set, Stored, Norm::two>(table.measures[d][0]);
  fill_measures<Set, Stored, Norm::inf>(table.measures[d][1]);
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
  table.params[0] = Set::template measure_params_of<float>;
  table.params[1] = Set::template measure_params_of<double>;
  return table;
}

struct InstructionSet {
  const char* name;
  bool supported;
  LoopTable loops;
};

// What every machine of the kind has: SSE2 on x86, and on ARM vectors with fma.
#if defined(__aarch64__)
constexpr const char* kBaseline = "NEON";
#else
constexpr const char* kBaseline = "baseline";
#endif

// Chooses the best set that the machine has, or the one that FASTCLIP_CPU_CAPABILITY names, if the machine has it.
const InstructionSet& instruction_set() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"AVX512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && F16c::supported(),
       make_loops<Avx512>()},
      {"AVX2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && F16c::supported(),
       make_loops<Avx2>()},
#endif
      {kBaseline, true, make_loops<Baseline>()},
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
