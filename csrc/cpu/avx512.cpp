// The loops for x86 CPUs with AVX-512.
#include "instruction_set.h"

#if defined(__x86_64__)
namespace fastclip::cpu {
namespace {

FASTCLIP_INSTRUCTION_SET(Avx512, Avx512Narrow, Avx512Codes, FASTCLIP_AVX512)

}  // namespace

const LoopTable& avx512_loops() {
  static constexpr LoopTable kLoops = make_loops<Avx512>();
  return kLoops;
}

}  // namespace fastclip::cpu
#endif
