#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

namespace fastclip::cpu {
namespace {

#if defined(__x86_64__)
bool is_of_amd() {
  unsigned leaves, name[3];
  return __get_cpuid(0, &leaves, &name[0], &name[2], &name[1]) && memcmp(name, "AuthenticAMD", sizeof(name)) == 0;
}
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 5);
}
#else
bool is_of_amd() { return false; }
bool has_avx512_bf16() { return false; }
#endif

// The prefetchers of AMD follow many arrays, and far enough; asking far ahead disturbs them. Intel's stop at each page:
// one core then reads an array at about 60 % of its bandwidth. Asking a page ahead brings the rest of it to an update,
// and more pages at a time to a pass that only reads. FASTCLIP_CPU_MEMORY=AMD, or =other, chooses by hand.
Machine this_machine() {
  const char* wanted = std::getenv("FASTCLIP_CPU_MEMORY");
  const bool as_amd = wanted ? strcmp(wanted, "AMD") == 0 : is_of_amd();
  return {as_amd ? 64 : 4096, !as_amd, has_avx512_bf16()};
}

}  // namespace

const Machine kMachine = this_machine();

}  // namespace fastclip::cpu
