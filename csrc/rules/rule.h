// The words in which an update rule describes itself. A rule is a struct in a file of its own in this folder, and
// rules.h lists all rules; nothing else in csrc knows a rule by name. A rule that lacks a member does not compile. The
// struct has
//
//   kName                 its name in Python
//   kStates               the state arrays of each parameter, named as in torch's state; at most kMaxStates
//   kScalar               the number that it keeps for each parameter besides the count of steps, or kNoScalar
//   kCountsSteps          whether torch keeps a `step` for each parameter
//   kFilledByFirstStep    true: a tensor's first step has the switch kFirst and fills its states, whatever they hold;
//                         new states are laid out like the gradient. false: they begin as `new_value`, laid out like
//                         the parameter
//   kClipsInPlace         true: no optimizer; it updates the gradient itself
//   kLimitsChange         true: the change that a gradient makes in the end, also by momentum in later steps, is the
//                         gradient times a number. `change(settings, lr)` returns it, for max_change
//   kNeedsNorm            true: the norm of each tensor's gradient, after all clips, is taken before the update, and is
//                         Progress::norm
//   kNeedsProducts        true: as well the sums of each tensor's param * gradient and param * param. The rule then
//                         keeps a row of numbers in the place of its scalar, of which the scalar is the first:
//                         `numbers(settings)` is their count, and `next_numbers(settings, progress, store)` calls
//                         store(place, value) for those that a step changes. `clip(settings)` is its WeightedClip, and
//                         `weight(settings, numel, scalar)` that of a tensor's norm in it, see weighted_clip.h
//   kMeasuresDelta        true: what a step adds to the parameter is proportional to lr, and can be measured before
//                         anything is written; a factor of lr may follow from it, see delta.h.
//                         `delta(terms, constants, param, d, states)` returns it for one element, without a decoupled
//                         decay, and brings d and the states on; `delta_reads_param(terms)`; `relative(constants, d,
//                         states)` returns the gradient over the root of its average square, for max_update_rms;
//                         `measured(hyper, settings)` are the parts of DeltaSums that `lr_factor(hyper, settings,
//                         numel, norms)` needs
//   kKernels              numbers of state arrays, the largest last: a GPU has a kernel for each
//   kQuantizesStates      true: its states may be kept in 8 bits, see quantized.h
//   kIsCommon             true: a GPU has separate kernels for float32 and bfloat16, a CPU loops of its own for 16 bits
//                         that are rounded at random. false: one kernel, one loop for all that is staged
//   Settings              the hyperparameters of a group besides those that all rules have; double and bool
//   read(group, settings) reads them; `group` is the GroupReader of csrc/host, or has its methods
//   new_value(settings)   the value that fills a new state array
//   kSwitches             the number of its switches, the bits of its Terms
//   terms(hyper, settings)  the switches that a group turns on
//   canonical(terms)      one value for all terms with the same effect: they share a loop
//   reads(terms), writes(terms)  the state arrays that it reads and writes, as bits; a tensor has those that it writes
//   Constants<T>          the numbers that each element needs, all of type T
//   constants(hyper, settings, lr, progress)  derives them in double
//   next_scalar(settings, progress)  the scalar's value after this step, as it is stored; only with a kScalar
//   update(terms, constants, param, d, states)  updates one element; `d` is the gradient after its clips, negated to
//                         maximize. Each fma is one that torch's CPU kernels compute, too. It does torch's operations
//                         in torch's order, and so gets torch's bits
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dtypes.h"

namespace fastclip {

// The switches of a rule, as bits. A term that is off must be left out, not multiplied by 0: 0 * inf is NaN, and -0.0 +
// 0.0 loses its sign. The CPU compiles a loop for each set of switches. A GPU branches; the branch is the same for a
// whole warp, and costs nothing.
using Terms = uint32_t;
constexpr Terms kFirst = 1;  // this step fills the tensor's states; only in rules with kFilledByFirstStep

// Returns the terms of a tensor in a group of these terms. is_first: this step fills its states.
FASTCLIP_HD constexpr Terms terms_of(Terms of_group, bool is_first) { return of_group | (is_first ? kFirst : 0); }

constexpr int kMaxStates = 3;

// Returns whether a set of state arrays, as bits, has array s.
FASTCLIP_HD constexpr bool has(uint32_t states, int s) { return states >> s & 1; }

struct StateArray {
  const char* name;
  bool is_momentum;  // momentum_dtype applies to it
};

struct Scalar {
  const char* name;
  double first;  // its value before the first step
};
constexpr Scalar kNoScalar = {nullptr, 0};

// A parameter's progress: the number of this step, from 1, and the rule's scalar before this step.
struct Progress {
  double step;
  double scalar;
  bool scalar_is_float64;
  double norm = 0;  // with kNeedsNorm
  // With kNeedsProducts. The gradient is that of after all clips, negated to maximize.
  const void* numbers = nullptr;
  double numel = 0;
  double param_times_grad = 0;
  double param_squared = 0;

  bool operator==(const Progress& other) const {
    return step == other.step && scalar == other.scalar && scalar_is_float64 == other.scalar_is_float64 &&
           norm == other.norm && numbers == other.numbers;
  }
  FASTCLIP_HD double number(int i) const {
    return scalar_is_float64 ? static_cast<const double*>(numbers)[i] : static_cast<const float*>(numbers)[i];
  }
  // Returns a number as it is stored.
  FASTCLIP_HD double stored(double value) const { return scalar_is_float64 ? value : static_cast<float>(value); }
};

// The hyperparameters of a group that all rules have.
struct SharedHyper {
  double lr;
  const void* lr_on_device;  // lr as a device tensor: the kernel reads it, and no host waits for it
  bool lr_is_float64;
  bool maximize;
  bool stochastic_rounding;  // for all arrays of 16 bits
  Terms terms;
  uint32_t rounding_seed;
  double weight_decay;
  double clip_low;  // -inf without a value clip
  double clip_high;
};

// Converts constants to the compute type. They are derived in double, since 1 - 0.999f is off by 1e-5; torch does the
// same with the scalars of an operation.
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
    To to;
    for (int i = 0; i < kCount; ++i) {
      double value;
      memcpy(&value, reinterpret_cast<const char*>(&from) + i * sizeof(value), sizeof(value));
      const T rounded = static_cast<T>(value);
      memcpy(reinterpret_cast<char*>(&to) + i * sizeof(rounded), &rounded, sizeof(rounded));
    }
    return to;
  }
}

// Interpolates as torch.lerp does, from the nearer end.
template <class T>
FASTCLIP_HD T lerp(T from, T to, T weight) {
  using std::fma;
  const bool nearer = weight < T(0.5);
  return fma(nearer ? weight : weight - T(1), to - from, nearer ? from : to);
}

}  // namespace fastclip
