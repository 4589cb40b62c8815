// The instruction set that runs.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <strings.h>
#include <cstdlib>

#include "loop_table.h"

namespace fastclip::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  const LoopTable& loops;
};

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

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
           __builtin_cpu_supports("avx512vl") && has_f16c(),
       avx512_loops()},
      {"AVX2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(), avx2_loops()},
#endif
      {kBaseline, true, baseline_loops()},
  };
  static const InstructionSet& chosen = [&]() -> const InstructionSet& {
    const char* wanted = std::getenv("FASTCLIP_CPU_CAPABILITY");
    const InstructionSet* best = nullptr;
    for (const auto& set : sets) {
      if (!set.supported) continue;
      if (wanted && strcasecmp(wanted, set.name) == 0) return set;
      if (!best) best = &set;
    }
    return *best;
  }();
  return chosen;
}

}  // namespace
}  // namespace fastclip::cpu
