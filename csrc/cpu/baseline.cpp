// The loops for what every machine of the kind has: SSE2 on x86, and on ARM vectors with fma.
#include "instruction_set.h"

namespace fastclip::cpu {
namespace {

FASTCLIP_INSTRUCTION_SET(Baseline, BaselineNarrow, PortableCodes, )

}  // namespace

const LoopTable& baseline_loops() {
  static constexpr LoopTable kLoops = make_loops<Baseline>();
  return kLoops;
}

}  // namespace fastclip::cpu
