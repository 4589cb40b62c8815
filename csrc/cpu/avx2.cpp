// The loops for x86 CPUs with AVX2.
#include "instruction_set.h"

#if defined(__x86_64__)
namespace fastclip::cpu {
namespace {

FASTCLIP_INSTRUCTION_SET(Avx2, Avx2Narrow, Avx2Codes, FASTCLIP_AVX2)

}  // namespace

const LoopTable& avx2_loops() {
  static constexpr LoopTable kLoops = make_loops<Avx2>();
  return kLoops;
}

}  // namespace fastclip::cpu
#endif
