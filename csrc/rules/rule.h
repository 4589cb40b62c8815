// The words in which an update rule describes itself. A rule is a struct in a file of its own in this folder, and
// rules.h lists them all; nothing else in csrc knows one by name. Code that asks for a member that is missing does not
// compile. The struct has
//
//   kName                 how Python calls it
//   kStates               the arrays that it keeps of each parameter, named as in torch's state; kMaxStates at most
//   kScalar               the number that it keeps of each parameter besides the count of steps, or kNoScalar
//   kCountsSteps          whether torch keeps a `step` of each parameter
//   kFilledByFirstStep    true: a tensor's first step has the switch kFirst and fills its states, whatever they hold; they
//                         are laid out like the gradient. false: they begin as `new_value`, laid out like the parameter
//   kClipsInPlace         true: no optimizer; what it updates is the gradient itself
//   kKernels              a GPU has a kernel for each of these numbers of state arrays, the largest last
//   kIsCommon             whether a GPU has kernels of its own for float32 and for bfloat16, or one for all dtypes
//   Settings              the hyperparameters of a group that not all rules have; double and bool
//   read(group, settings) reads them; `group` is the GroupReader of csrc/host, or has its methods
//   new_value(settings)   what a new state array is filled with
//   kSwitches             the number of switches: of bits in its Terms
//   terms(hyper, settings)  the switches that a group turns on
//   canonical(terms)      one value for all terms that do the same: they share a loop
//   reads(terms), writes(terms)  which state arrays it reads and writes, as bits; a tensor has those that it writes
//   Constants<T>          what an element needs, all of type T
//   constants(hyper, settings, lr, progress)  derives them in double
//   next_scalar(settings, progress)  where there is a kScalar: its value after this step, as it is stored
//   update(terms, constants, param, d, states)  the math of one element; `d` is the gradient after its clips, negated to
//                         maximize. Each fma is one that torch's CPU kernels compute, too: same operations in the same
//                         order, so the same bits
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dtypes.h"

namespace fastclip {

// What a rule does per element, as bits. A term that is off has to be left out, not multiplied by 0: 0 * inf is NaN, and
// -0.0 + 0.0 loses its sign. The CPU compiles a loop for each; a GPU decides per block, where a uniform branch costs nothing.
using Terms = uint32_t;
constexpr Terms kFirst = 1;  // this step fills the tensor's states; only of rules that have kFilledByFirstStep

constexpr int kMaxStates = 3;

struct StateArray {
  const char* name;
  bool is_momentum;  // momentum_dtype is about this one
};

struct Scalar {
  const char* name;
  double first;  // its value before the first step
};
constexpr Scalar kNoScalar = {nullptr, 0};

// How far a parameter is: the number of this step, from 1, and the rule's scalar before it.
struct Progress {
  double step;
  double scalar;
  bool scalar_is_float64;
};

// The hyperparameters of one group that all rules have.
struct SharedHyper {
  double lr;
  const void* lr_on_device;  // lr as a device tensor: read by the kernel, so that no host waits for it
  bool lr_is_float64;
  bool maximize;
  bool stochastic_rounding;  // of all that is stored in 16 bits
  Terms terms;
  uint32_t rounding_seed;
  double weight_decay;
  double clip_low;  // -inf where there is no value clip
  double clip_high;
};

// Constants are derived in double, since 1 - 0.999f is off by 1e-5, and converted to the type that is computed in, as
// torch does with the scalars of an operation.
template <class To, class From>
FASTCLIP_HD To converted(const From& from) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
  } else if constexpr (std::is_empty_v<To>) {
    return {};
  } else {
    constexpr int kCount = sizeof(From) / sizeof(double);
    using T = std::conditional_t<sizeof(To) == sizeof(From), double, float>;
    static_assert(sizeof(To) == kCount * sizeof(T), "constants are all of one type");
    double in[kCount];
    T out[kCount];
    memcpy(in, &from, sizeof(from));
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<T>(in[i]);
    To to;
    memcpy(&to, out, sizeof(to));
    return to;
  }
}

// torch.lerp, which starts at the nearer end.
template <class T>
FASTCLIP_HD T lerp(T from, T to, T weight) {
  using std::fma;
  const bool nearer = weight < T(0.5);
  return fma(nearer ? weight : weight - T(1), to - from, nearer ? from : to);
}

}  // namespace fastclip
