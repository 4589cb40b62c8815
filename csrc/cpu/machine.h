// What the loops have to know of this machine.
#pragma once

#include <cstdint>

namespace fastclip::cpu {

struct Machine {
  int64_t bytes_ahead;   // from what is read to what is asked for
  bool reads_streams;    // several chunks of the gradients side by side, where nothing else is read
  bool rounds_bfloat16;  // has an instruction for it
};
[[gnu::visibility("hidden")]] extern const Machine kMachine;

constexpr int kStreams = 4;

}  // namespace fastclip::cpu
