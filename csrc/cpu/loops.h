// The CPU's loops that update a run of elements: one per rule, set of terms and dtype.
#pragma once

#include <cstring>
#include <type_traits>

#include "loop_table.h"
#include "machine.h"
#include "narrow.h"
#include "quantized_loops.h"
#include "vectorise.h"

namespace fastclip::cpu {
namespace {

template <class R, class T>
FASTCLIP_HD typename R::template Constants<T> constants_as(const Constants& constants) {
  typename R::template Constants<double> rule_constants;
  memcpy(&rule_constants, constants.rule, sizeof(rule_constants));
  return converted<typename R::template Constants<T>>(rule_constants);
}

constexpr int64_t kCacheLine = 64;

// Prefetches `count` elements, `bytes_ahead` ahead of `from`.
template <class Stored>
FASTCLIP_HD void prefetch(const Stored* from, int64_t count, int64_t bytes_ahead) {
  const char* ahead = reinterpret_cast<const char*>(from) + bytes_ahead;
  for (int64_t byte = 0; byte < count * int64_t{sizeof(Stored)}; byte += kCacheLine) __builtin_prefetch(ahead + byte);
}

// Many sums, added up in a fixed order: the number of lanes is the same on every instruction set, and so are the bits.
template <Norm kNorm, class T, int kLanes, bool kFma = false>
struct LaneSums {
  static constexpr bool kFloat64 = std::is_same_v<T, double>;
  static constexpr int kWide = kFloat64 && kNorm == Norm::two ? kLanes : 1;  // lanes of the two sums of float64 alone
  using Sum = std::conditional_t<kNorm == Norm::inf, T, double>;
  double small[kWide] = {}, big[kWide] = {};
  Sum medium[kLanes] = {};

  FASTCLIP_HD void add(int lane, T x) {
    measure<kNorm, kFloat64, kFma>(small[lane % kWide], medium[lane], big[lane % kWide], Sum{x});
  }

  FASTCLIP_HD Measure total() {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        medium[lane] =
            kNorm == Norm::inf ? larger(medium[lane], medium[lane + half]) : medium[lane] + medium[lane + half];
        if constexpr (kWide > 1) {
          small[lane] += small[lane + half];
          big[lane] += big[lane + half];
        }
      }
    }
    return {small[0], medium[0], big[0]};
  }
};

// Elements per inner block. Clamped elements are counted per block, in a register as wide as the data; compilers would
// keep a running total in memory.
constexpr int64_t kBlock = 128;

// Updates `size` elements of arrays in the compute type. count(i) is where an element is counted that the value clip
// changes.
template <class T, class R, Terms kTerms, class Counts>
FASTCLIP_HD void update_elements(T* params, const T* grads, T* const* states, int64_t size, const Clip<T>& clip,
                                 const typename R::template Constants<T>& constants, const Counts& count) {
  constexpr uint32_t kReads = R::reads(kTerms), kWrites = R::writes(kTerms);
  T* const s0 = states[0];
  T* const s1 = states[1];
  T* const s2 = states[2];
  static_assert(kMaxStates == 3);
  FASTCLIP_IVDEP
  for (int64_t i = 0; i < size; ++i) {
    T param{};
    if constexpr (!R::kClipsInPlace) param = params[i];
    T state[kMaxStates]{};
    if constexpr (has(kReads, 0)) state[0] = s0[i];
    if constexpr (has(kReads, 1)) state[1] = s1[i];
    if constexpr (has(kReads, 2)) state[2] = s2[i];
    count(i) += clip.clamps(grads[i]);
    R::update(kTerms, constants, param, clip(grads[i]), state);
    params[i] = param;
    if constexpr (has(kWrites, 0)) s0[i] = state[0];
    if constexpr (has(kWrites, 1)) s1[i] = state[1];
    if constexpr (has(kWrites, 2)) s2[i] = state[2];
  }
}

// Does the same, and returns how many elements the value clip changed.
template <class T, class R, Terms kTerms>
FASTCLIP_HD int64_t update_block(T* params, const T* grads, T* const* states, int64_t size, const Clip<T>& clip,
                                 const typename R::template Constants<T>& constants) {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Count clamped = 0;
  update_elements<T, R, kTerms>(params, grads, states, size, clip, constants,
                                [&](int64_t) __attribute__((always_inline)) -> Count& { return clamped; });
  return clamped;
}

// The measure of a chunk of parameters, block by block: an update adds each block while it is in the innermost cache,
// and a pass over the parameters alone does the same, with the same bits. float32 is summed in float32, as each lane
// gets no more than 128 squares: the norm is right in the seventh digit. Elements beyond 1e17 make it infinite.
template <class T>
class ParamSums {
 public:
  FASTCLIP_HD explicit ParamSums(Norm norm) : norm_(norm) {
    if (norm == Norm::none) return;
    for (T& sum : sums_) sum = 0;
  }

  FASTCLIP_HD void add(const T* params, int64_t size) {
    if (norm_ == Norm::inf) {
      for (int64_t i = 0; i < size; ++i) sums_[i % kLanes] = larger(sums_[i % kLanes], T(fabs(params[i])));
    } else if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < size; ++i) wide_.add(i % kWideLanes, params[i]);
    } else if (size == kBlock) {  // a loop of fixed length
      add_squares(params, kBlock);
    } else {
      add_squares(params, size);
    }
  }

  FASTCLIP_HD Measure total() {
    if (norm_ == Norm::two && std::is_same_v<T, double>) return wide_.total();
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        sums_[lane] = norm_ == Norm::inf ? larger(sums_[lane], sums_[lane + half]) : sums_[lane] + sums_[lane + half];
      }
    }
    return {0, sums_[0], 0};
  }

 private:
  static constexpr int kLanes = 32, kWideLanes = 16;

  FASTCLIP_HD void add_squares(const T* params, int64_t size) {
    const int rest = int(size % kLanes);
    for (int64_t i = 0; i < size - rest; i += kLanes) {
      FASTCLIP_IVDEP
      for (int lane = 0; lane < kLanes; ++lane) sums_[lane] += params[i + lane] * params[i + lane];
    }
    params += size - rest;
    for (int lane = 0; lane < rest; ++lane) sums_[lane] += params[lane] * params[lane];
  }

  const Norm norm_;
  T sums_[kLanes];
  LaneSums<Norm::two, T, kWideLanes> wide_;
};

// Updates elements [begin, begin + size) of a tensor whose arrays all have the compute type. Where parameters are
// measured, these are one chunk.
template <class T, class R, Terms kTerms>
FASTCLIP_HD Updated update_uniform(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all) {
  constexpr uint32_t kWrites = R::writes(kTerms);
  const int64_t bytes_ahead = kMachine.bytes_ahead;
  const auto clip = converted<Clip<T>>(all.clip);
  const auto constants = constants_as<R, T>(all);
  auto* const params = static_cast<T*>(tensor.param) + begin;
  const auto* const grads = static_cast<const T*>(tensor.grad) + begin;
  T* states[kMaxStates];
  for (int s = 0; s < kMaxStates; ++s) states[s] = static_cast<T*>(tensor.states[s]) + (has(kWrites, s) ? begin : 0);
  const auto at = [&](int64_t i, T*(&moved)[kMaxStates]) __attribute__((always_inline)) {
    for (int s = 0; s < kMaxStates; ++s) moved[s] = states[s] + (has(kWrites, s) ? i : 0);
  };
  Updated updated;
  ParamSums<T> sums(all.params_norm);
  const auto update = [&](int64_t i, T* const* moved, int64_t count) __attribute__((always_inline)) {
    updated.clamped += update_block<T, R, kTerms>(params + i, grads + i, moved, count, clip, constants);
    if constexpr (R::kLimitsChange) {
      if (all.params_norm != Norm::none && count > 0) sums.add(params + i, count);
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= size; i += kBlock) {
    T* moved[kMaxStates];
    at(i, moved);
    if constexpr (!R::kClipsInPlace) prefetch(params + i, kBlock, bytes_ahead);
    prefetch(grads + i, kBlock, bytes_ahead);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kWrites, s)) prefetch(moved[s], kBlock, bytes_ahead);
    }
    update(i, moved, kBlock);
  }
  T* moved[kMaxStates];
  at(i, moved);
  update(i, moved, size - i);
  if constexpr (R::kLimitsChange) {
    if (all.params_norm != Norm::none) updated.params = sums.total();
  }
  return updated;
}

// Reads, writes or rounds some elements of an array of float32 or a narrower dtype.
inline void copy_floats(float* to, const float* from, int64_t size) {
  size == kBlock ? memcpy(to, from, kBlock * sizeof(float)) : memcpy(to, from, size * sizeof(float));
}
template <class Set>
void read_any(DType dtype, const void* from, int64_t at, int64_t size, float* to) {
  if (dtype == DType::float32) return copy_floats(to, static_cast<const float*>(from) + at, size);
  if (dtype == DType::bfloat16) return Set::read(static_cast<const BFloat16*>(from) + at, size, to);
  Set::read(static_cast<const Float16*>(from) + at, size, to);
}
template <class Set>
void write_any(DType dtype, void* to, int64_t at, int64_t size, const float* from) {
  if (dtype == DType::float32) return copy_floats(static_cast<float*>(to) + at, from, size);
  if (dtype == DType::bfloat16) return Set::write(static_cast<BFloat16*>(to) + at, size, from);
  Set::write(static_cast<Float16*>(to) + at, size, from);
}
template <class Set>
void round_any(DType dtype, void* to, int64_t at, int64_t size, const float* from, uint32_t key) {
  if (dtype == DType::float32) return copy_floats(static_cast<float*>(to) + at, from, size);
  const auto place = static_cast<uint32_t>(at);
  if (dtype == DType::bfloat16) return Set::round(static_cast<BFloat16*>(to) + at, size, from, key, place);
  Set::round(static_cast<Float16*>(to) + at, size, from, key, place);
}

// A tensor of one run, of which the first elements are a copy of another's last ones.
template <class Stored>
class LastRun {
 public:
  [[gnu::noinline]] LastRun(const TensorEntry& of, uint32_t states, int64_t begin, int64_t count)
      : of_(of), run_(of), states_(states), offset_(begin * sizeof(Stored)), bytes_(count * sizeof(Stored)) {
    for (Stored& grad : grads_) store(grad, NAN);  // no clip changes a NaN, or counts it
    memcpy(grads_, static_cast<const char*>(of.grad) + offset_, bytes_);
    memcpy(params_, static_cast<const char*>(of.param) + offset_, bytes_);
    run_.param = params_, run_.grad = grads_;
    for (int s = 0; s < kMaxStates; ++s) {
      if (!has(states, s)) continue;
      memcpy(rows_[s], static_cast<const char*>(of.states[s]) + offset_, bytes_);
      run_.states[s] = rows_[s];
    }
  }
  const TensorEntry& run() const { return run_; }
  [[gnu::noinline]] void give_back() const {
    memcpy(static_cast<char*>(of_.param) + offset_, params_, bytes_);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(states_, s)) memcpy(static_cast<char*>(of_.states[s]) + offset_, rows_[s], bytes_);
    }
  }

 private:
  const TensorEntry& of_;
  TensorEntry run_;
  const uint32_t states_;
  const int64_t offset_, bytes_;
  Stored params_[kRun] = {}, grads_[kRun], rows_[kMaxStates][kRun] = {};
};

// Updates a tensor whose arrays are all of one 16-bit dtype: a run of each is brought to float32, updated and rounded
// in registers, to the nearest number or at random.
template <class Set, Storage kStorage, class R, Terms kTerms>
FASTCLIP_HD Updated update_narrow(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all) {
  constexpr bool kRounds = is_random(kStorage);
  constexpr bool kIsBFloat16 = kStorage == Storage::bfloat16 || kStorage == Storage::random_bfloat16;
  using Stored = std::conditional_t<kIsBFloat16, BFloat16, Float16>;
  constexpr uint32_t kReads = R::reads(kTerms), kWrites = R::writes(kTerms);
  const int64_t bytes_ahead = kMachine.bytes_ahead;
  const auto clip = converted<Clip<float>>(all.clip);
  const auto constants = constants_as<R, float>(all);
  const typename Set::Narrow narrow;
  [[maybe_unused]] uint32_t keys[1 + kMaxStates];
  const auto write = [&](int array, Stored* to, const float* from, int64_t at) __attribute__((always_inline)) {
    kRounds ? narrow.round(to, from, keys[array], static_cast<uint32_t>(at)) : narrow.write(to, from);
  };
  auto* const params = static_cast<Stored*>(tensor.param) + begin;
  const auto* const grads = static_cast<const Stored*>(tensor.grad) + begin;
  Stored* states[kMaxStates];
  for (int s = 0; s < kMaxStates; ++s)
    states[s] = static_cast<Stored*>(tensor.states[s]) + (has(kWrites, s) ? begin : 0);
  const bool measures = R::kLimitsChange && all.params_norm != Norm::none;
  ParamSums<float> sums(all.params_norm);
  int32_t clamped[kRun] = {};
  alignas(kCacheLine) float param[kRun], grad[kRun], state[kMaxStates][kRun];
  int64_t i = 0;
  for (; i + kRun <= size; i += kRun) {
    if constexpr (!R::kClipsInPlace) {
      prefetch(params + i, kRun, bytes_ahead);
      narrow.read(params + i, param);
    }
    prefetch(grads + i, kRun, bytes_ahead);
    narrow.read(grads + i, grad);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kWrites, s)) prefetch(states[s] + i, kRun, bytes_ahead);
      if (has(kReads, s)) narrow.read(states[s] + i, state[s]);
    }
    float* const rows[kMaxStates] = {state[0], state[1], state[2]};
    update_elements<float, R, kTerms>(param, grad, rows, kRun, clip, constants,
                                      [&](int64_t lane)
                                          __attribute__((always_inline)) -> int32_t& { return clamped[lane]; });
    if (kRounds && (i == 0 || static_cast<uint32_t>(begin + i) == 0)) {
      for (int a = 0; a <= kMaxStates; ++a) {
        keys[a] = noise_key(all.rounding_seed, all.step, tensor.index, a, begin + i);
      }
    }
    write(0, params + i, param, begin + i);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kWrites, s)) write(1 + s, states[s] + i, state[s], begin + i);
    }
    if (measures) {
      narrow.read(params + i, param);  // as they were rounded
      sums.add(param, kRun);
    }
  }
  Updated updated;
  for (const int32_t count : clamped) updated.clamped += count;
  if (i < size) {
    if constexpr (kRounds) {  // by its place in the tensor
      updated.clamped += Set::template update<Storage::staged, R, kTerms>(tensor, begin + i, size - i, all).clamped;
    } else {
      const LastRun<Stored> last(tensor, kWrites, begin + i, size - i);
      updated.clamped += Set::template update<kStorage, R, kTerms>(last.run(), 0, kRun, all).clamped;
      last.give_back();
    }
    if (measures) {
      read_many(narrow, params + i, size - i, param);
      sums.add(param, size - i);
    }
  }
  if (measures) updated.params = sums.total();
  return updated;
}

// Elements that are staged at a time: a block of states in 8 bits, which has one scale.
constexpr int64_t kStaged = kStateBlock;

// Reads or writes some elements of a state, which begin a block where they are codes.
template <class Set>
void read_state(const TensorEntry& tensor, int s, int64_t at, int64_t size, float* to) {
  if (!tensor.scales) return read_any<Set>(tensor.state_dtypes[s], tensor.states[s], at, size, to);
  const auto* const codes = static_cast<const uint8_t*>(tensor.states[s]) + at;
  const float scale = tensor.scales->of[s][at / kStateBlock];
  tensor.scales->is_signed[s] ? Set::template read_codes<true>(codes, scale, size, to)
                              : Set::template read_codes<false>(codes, scale, size, to);
}
template <class Set>
void write_codes(const TensorEntry& tensor, int s, int64_t at, int64_t size, const float* from) {
  auto* const codes = static_cast<uint8_t*>(tensor.states[s]) + at;
  tensor.scales->of[s][at / kStateBlock] = tensor.scales->is_signed[s]
                                               ? Set::template write_codes<true>(codes, size, from)
                                               : Set::template write_codes<false>(codes, size, from);
}

// Does the same for a tensor with 16-bit arrays, with a mixture of these and float32, or with states in 8 bits. It
// brings one block at a time to float32, in the innermost cache.
template <class Set, class R, Terms kTerms>
FASTCLIP_HD Updated update_staged(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all) {
  constexpr uint32_t kReads = R::reads(kTerms), kWrites = R::writes(kTerms);
  const auto clip = converted<Clip<float>>(all.clip);
  const auto constants = constants_as<R, float>(all);
  const int64_t bytes_ahead = kMachine.bytes_ahead;
  alignas(kCacheLine) float param_room[kStaged], grad_room[kStaged], states[kMaxStates][kStaged];
  float* const rows[kMaxStates] = {states[0], states[1], states[2]};
  Updated updated;
  ParamSums<float> sums(all.params_norm);
  for (const int64_t end = begin + size; begin < end; begin += kStaged) {
    const int64_t count = end - begin < kStaged ? end - begin : kStaged;
    // Returns where an array's elements are in float32: in memory, or in the room that they are brought to.
    const auto staged = [&](DType dtype, void* array, float* room) -> float* {
      if (dtype == DType::float32) {
        float* const there = static_cast<float*>(array) + begin;
        prefetch(there, kStaged, bytes_ahead);
        return there;
      }
      read_any<Set>(dtype, array, begin, count, room);
      return room;
    };
    const auto write = [&](int array, DType dtype, void* to, const float* from) {
      if (!all.stochastic_rounding) return write_any<Set>(dtype, to, begin, count, from);
      const uint32_t key = noise_key(all.rounding_seed, all.step, tensor.index, array, begin);
      round_any<Set>(dtype, to, begin, count, from, key);
    };
    float* const grads = staged(tensor.grad_dtype, tensor.grad, grad_room);
    float* const params = R::kClipsInPlace ? param_room : staged(tensor.dtype, tensor.param, param_room);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kReads, s)) read_state<Set>(tensor, s, begin, count, states[s]);
    }
    updated.clamped += update_block<float, R, kTerms>(params, grads, rows, count, clip, constants);
    if (params == param_room) write(0, tensor.dtype, tensor.param, params);
    if (tensor.rounded) write_any<Set>(tensor.rounded_dtype, tensor.rounded, begin, count, params);
    for (int s = 0; s < kMaxStates; ++s) {
      if (!has(kWrites, s)) continue;
      tensor.scales ? write_codes<Set>(tensor, s, begin, count, states[s])
                    : write(1 + s, tensor.state_dtypes[s], tensor.states[s], states[s]);
    }
    if constexpr (R::kLimitsChange) {
      if (all.params_norm == Norm::none) continue;
      if (params == param_room)
        read_any<Set>(tensor.dtype, tensor.param, begin, count, params);  // as they were rounded
      for (int64_t i = 0; i < count; i += kBlock) sums.add(params + i, count - i < kBlock ? count - i : kBlock);
    }
  }
  if constexpr (R::kLimitsChange) {
    if (all.params_norm != Norm::none) updated.params = sums.total();
  }
  return updated;
}

}  // namespace
}  // namespace fastclip::cpu
