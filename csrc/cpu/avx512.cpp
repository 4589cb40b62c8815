// The loops for x86 CPUs with AVX-512.
#include "instruction_set.h"

#if defined(__x86_64__)
namespace fastclip::cpu {
namespace {

FASTCLIP_INSTRUCTION_SET(Avx512, Avx512Halves,
                         __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c" FASTCLIP_WIDEST))))

}  // namespace

const LoopTable& avx512_loops() {
  static constexpr LoopTable kLoops = make_loops<Avx512>();
  return kLoops;
}

}  // namespace fastclip::cpu
#endif
