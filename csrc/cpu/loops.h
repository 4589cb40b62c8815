// The CPU's loops over a run of elements: one per rule, set of terms and dtype.
#pragma once

#include <cstring>
#include <type_traits>

#include "halves.h"
#include "loop_table.h"

// Makes it an error if the compiler ignores a target or a pragma: the loops would be correct, but slow.
#pragma GCC diagnostic error "-Wattributes"
#pragma GCC diagnostic error "-Wunknown-pragmas"

// Tells the compiler that the arrays of a tensor do not overlap, and to use the widest registers, which clang does
// unasked.
#if defined(__clang__)
#define FASTCLIP_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#define FASTCLIP_WIDEST
#else
#define FASTCLIP_IVDEP _Pragma("GCC ivdep")
#define FASTCLIP_WIDEST ",prefer-vector-width=512"
#endif

namespace fastclip::cpu {
namespace {

template <class R, class T>
FASTCLIP_HD typename R::template Constants<T> constants_as(const Constants& constants) {
  typename R::template Constants<double> rule_constants;
  memcpy(&rule_constants, constants.rule, sizeof(rule_constants));
  return converted<typename R::template Constants<T>>(rule_constants);
}

// The distance at which memory is prefetched. The hardware prefetcher stops at each page and does not look far enough
// ahead: one core then reads one stream at about 60 % of its bandwidth. Prefetching this far ahead brings the rest.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kCacheLine = 64;

// Prefetches `count` elements, `bytes_ahead` ahead of `from`.
template <class Stored>
FASTCLIP_HD void prefetch(const Stored* from, int64_t count, int64_t bytes_ahead = kPrefetchBytes) {
  const char* ahead = reinterpret_cast<const char*>(from) + bytes_ahead;
  for (int64_t byte = 0; byte < count * int64_t{sizeof(Stored)}; byte += kCacheLine) __builtin_prefetch(ahead + byte);
}

// Many sums, added up in a fixed order: the number of lanes is the same on every instruction set, and so are the bits.
template <Norm kNorm, bool kFloat64, int kLanes>
struct LaneSums {
  static constexpr int kWide = kFloat64 && kNorm == Norm::two ? kLanes : 1;  // lanes of the two sums of float64 alone
  double small[kWide] = {}, medium[kLanes] = {}, big[kWide] = {};

  template <class T>
  FASTCLIP_HD void add(int lane, T x) {
    measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], double{x});
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

// Updates `size` elements of arrays in the compute type. Returns how many of them the value clip changed.
template <class T, class R, Terms kTerms>
FASTCLIP_HD int64_t update_block(T* params, const T* grads, T* const* states, int64_t size, const Clip<T>& clip,
                                 const typename R::template Constants<T>& constants) {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr uint32_t kReads = R::reads(kTerms), kWrites = R::writes(kTerms);
  T* const s0 = states[0];
  T* const s1 = states[1];
  T* const s2 = states[2];
  static_assert(kMaxStates == 3);
  Count clamped = 0;
  FASTCLIP_IVDEP
  for (int64_t i = 0; i < size; ++i) {
    T param{};
    if constexpr (!R::kClipsInPlace) param = params[i];
    T state[kMaxStates]{};
    if constexpr (has(kReads, 0)) state[0] = s0[i];
    if constexpr (has(kReads, 1)) state[1] = s1[i];
    if constexpr (has(kReads, 2)) state[2] = s2[i];
    clamped += clip.clamps(grads[i]);
    R::update(kTerms, constants, param, clip(grads[i]), state);
    params[i] = param;
    if constexpr (has(kWrites, 0)) s0[i] = state[0];
    if constexpr (has(kWrites, 1)) s1[i] = state[1];
    if constexpr (has(kWrites, 2)) s2[i] = state[2];
  }
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
  LaneSums<Norm::two, std::is_same_v<T, double>, kWideLanes> wide_;
};

// Updates elements [begin, begin + size) of a tensor whose arrays all have the compute type. Where parameters are
// measured, these are one chunk.
template <class T, class R, Terms kTerms>
FASTCLIP_HD Updated update_uniform(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all) {
  constexpr uint32_t kWrites = R::writes(kTerms);
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
    if constexpr (!R::kClipsInPlace) prefetch(params + i, kBlock);
    prefetch(grads + i, kBlock);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kWrites, s)) prefetch(moved[s], kBlock);
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

// Reads, writes or rounds a block of an array of float32 or a narrower dtype; the block is float32.
template <class Stored>
FASTCLIP_HD void read_block(const void* from, int64_t at, int64_t size, float* to) {
  const auto* const values = static_cast<const Stored*>(from) + at;
  for (int64_t i = 0; i < size; ++i) to[i] = load(values[i]);
}
template <class Stored>
FASTCLIP_HD void write_block(void* to, int64_t at, int64_t size, const float* from) {
  auto* const values = static_cast<Stored*>(to) + at;
  for (int64_t i = 0; i < size; ++i) store(values[i], from[i]);
}
template <class Stored>
FASTCLIP_HD void round_block(void* to, int64_t at, int64_t size, const float* from, uint32_t key) {
  auto* const values = static_cast<Stored*>(to) + at;
  const auto first = static_cast<uint32_t>(at);
  for (uint32_t i = 0; i < size; ++i) store(values[i], from[i], noise(key, first + i));
}

template <class Set>
void read_any(DType dtype, const void* from, int64_t at, int64_t size, float* to) {
  if (dtype == DType::float32) return Set::template read_as<float>(from, at, size, to);
  if (dtype == DType::bfloat16) return Set::template read_as<BFloat16>(from, at, size, to);
  Set::Halves::read(static_cast<const Float16*>(from) + at, size, to);
}
template <class Set>
void write_any(DType dtype, void* to, int64_t at, int64_t size, const float* from) {
  if (dtype == DType::float32) return Set::template write_as<float>(to, at, size, from);
  if (dtype == DType::bfloat16) return Set::template write_as<BFloat16>(to, at, size, from);
  Set::Halves::write(static_cast<Float16*>(to) + at, size, from);
}
template <class Set>
void round_any(DType dtype, void* to, int64_t at, int64_t size, const float* from, uint32_t key) {
  if (dtype == DType::float32) return Set::template write_as<float>(to, at, size, from);
  if (dtype == DType::bfloat16) return Set::template round_as<BFloat16>(to, at, size, from, key);
  Set::template round_as<Float16>(to, at, size, from, key);
}

// Does the same for a tensor with 16-bit arrays, or with a mixture of these and float32. It brings one block at a time
// to float32, in the innermost cache.
template <class Set, class R, Terms kTerms>
FASTCLIP_HD Updated update_staged(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all) {
  constexpr uint32_t kReads = R::reads(kTerms), kWrites = R::writes(kTerms);
  const auto clip = converted<Clip<float>>(all.clip);
  const auto constants = constants_as<R, float>(all);
  alignas(kCacheLine) float params[kBlock], grads[kBlock], states[kMaxStates][kBlock];
  float* const rows[kMaxStates] = {states[0], states[1], states[2]};
  Updated updated;
  ParamSums<float> sums(all.params_norm);
  for (const int64_t end = begin + size; begin < end; begin += kBlock) {
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    const auto write = [&](int array, DType dtype, void* to, const float* from) {
      if (!all.stochastic_rounding) return write_any<Set>(dtype, to, begin, count, from);
      const uint32_t key = noise_key(all.rounding_seed, all.step, tensor.index, array, begin);
      round_any<Set>(dtype, to, begin, count, from, key);
    };
    if constexpr (!R::kClipsInPlace) read_any<Set>(tensor.dtype, tensor.param, begin, count, params);
    read_any<Set>(tensor.grad_dtype, tensor.grad, begin, count, grads);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kReads, s)) read_any<Set>(tensor.state_dtypes[s], tensor.states[s], begin, count, states[s]);
    }
    updated.clamped += update_block<float, R, kTerms>(params, grads, rows, count, clip, constants);
    write(0, tensor.dtype, tensor.param, params);
    if (tensor.rounded) write_any<Set>(tensor.rounded_dtype, tensor.rounded, begin, count, params);
    for (int s = 0; s < kMaxStates; ++s) {
      if (has(kWrites, s)) write(1 + s, tensor.state_dtypes[s], tensor.states[s], states[s]);
    }
    if constexpr (R::kLimitsChange) {
      if (all.params_norm == Norm::none) continue;
      read_any<Set>(tensor.dtype, tensor.param, begin, count, params);  // as they were rounded
      sums.add(params, count);
    }
  }
  if constexpr (R::kLimitsChange) {
    if (all.params_norm != Norm::none) updated.params = sums.total();
  }
  return updated;
}

// Measures the parameters of a chunk, in blocks as an update does.
template <class Set, class T>
FASTCLIP_HD Measure measure_params(const TensorEntry& tensor, int64_t begin, int64_t size, Norm norm) {
  ParamSums<T> sums(norm);
  for (const int64_t end = begin + size; begin < end; begin += kBlock) {
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    if constexpr (std::is_same_v<T, double>) {
      sums.add(static_cast<const double*>(tensor.param) + begin, count);
    } else {
      alignas(kCacheLine) float params[kBlock];
      read_any<Set>(tensor.dtype, tensor.param, begin, count, params);
      sums.add(params, count);
    }
  }
  return sums.total();
}

// Returns a block of an array in the compute type: where it lies, if it is of that type and whole, or a copy of it in
// `room`, with zeros behind. Asks for the memory that follows.
template <class Set, class T>
FASTCLIP_HD const T* block_of(DType dtype, const void* from, int64_t at, int64_t count, T* room) {
  const bool is_there = dtype == (std::is_same_v<T, double> ? DType::float64 : DType::float32);
  const int64_t item = item_size(dtype);
  prefetch(static_cast<const char*>(from) + at * item, kBlock * item);
  if (is_there && count == kBlock) return static_cast<const T*>(from) + at;
  if constexpr (std::is_same_v<T, double>) {
    memcpy(room, static_cast<const double*>(from) + at, count * sizeof(double));
  } else {
    read_any<Set>(dtype, from, at, count, room);
  }
  for (int64_t i = count; i < kBlock; ++i) room[i] = 0;
  return room;
}

// The lanes in which a chunk is summed, here and below.
constexpr int kLanes = 32;
static_assert(kBlock % kLanes == 0);

// What a block's update adds to the parameters, and the relative gradients; where they are wanted.
template <class T, class R, Terms kTerms>
FASTCLIP_HD void delta_block(const T* params, const T* grads, const T* const* states, T* added, T* relative,
                             const Constants& all) {
  const auto clip = converted<Clip<T>>(all.clip);
  const auto constants = constants_as<R, T>(all);
  const T* const s0 = states[0];
  const T* const s1 = states[1];
  const T* const s2 = states[2];
  static_assert(kMaxStates == 3);
  const auto compute = [&](auto wants_added, auto wants_relative) __attribute__((always_inline)) {
    FASTCLIP_IVDEP
    for (int64_t i = 0; i < kBlock; ++i) {
      T state[kMaxStates] = {s0[i], s1[i], s2[i]};
      T d = clip(grads[i]);
      const T delta = R::delta(kTerms, constants, params[i], d, state);
      if constexpr (decltype(wants_added)::value) added[i] = delta;
      if constexpr (decltype(wants_relative)::value) relative[i] = R::relative(constants, d, state);
    }
  };
  if (!relative) return compute(std::true_type{}, std::false_type{});
  added ? compute(std::true_type{}, std::true_type{}) : compute(std::false_type{}, std::true_type{});
}

// Measures what an update would add to a chunk, block by block.
template <class Set, class T>
FASTCLIP_HD DeltaSums measure_deltas(const TensorEntry& tensor, int64_t begin, int64_t size, const Constants& all,
                                     DeltaParts parts, const Delta& rule) {
  constexpr bool kFloat64 = std::is_same_v<T, double>;
  const bool reads_param = (parts & kParam) || ((parts & (kDelta | kRelative)) && rule.reads_param);
  const bool reads_first = parts & kDelta;  // relative gradients follow from the second average alone
  alignas(kCacheLine) T param[kBlock] = {}, grad[kBlock], state[kMaxStates][kBlock] = {}, added[kBlock],
                        relative[kBlock];
  LaneSums<Norm::two, kFloat64, kLanes> of_deltas, of_relative, of_params;
  const auto add = [](auto& sums, const T* values) __attribute__((always_inline)) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums.add(lane, values[i + lane]);
    }
  };
  for (const int64_t end = begin + size; begin < end; begin += kBlock) {
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    const T* const params = reads_param ? block_of<Set>(tensor.dtype, tensor.param, begin, count, param) : param;
    const T* const grads = block_of<Set>(tensor.grad_dtype, tensor.grad, begin, count, grad);
    const T* states[kMaxStates];
    for (int s = 0; s < kMaxStates; ++s) {
      const bool reads = has(rule.states, s) && (s > 0 || reads_first);
      states[s] = reads ? block_of<Set>(tensor.state_dtypes[s], tensor.states[s], begin, count, state[s]) : state[s];
    }
    T* const wanted[] = {parts & kDelta ? added : nullptr, parts & kRelative ? relative : nullptr};
    if constexpr (kFloat64) {
      rule.of_float64(params, grads, states, wanted[0], wanted[1], all);
    } else {
      rule.of_float32(params, grads, states, wanted[0], wanted[1], all);
    }
    for (int64_t i = count; i < kBlock; ++i) added[i] = relative[i] = 0;
    if (parts & kDelta) add(of_deltas, added);
    if (parts & kRelative) add(of_relative, relative);
    if (parts & kParam) add(of_params, params);
  }
  return {of_deltas.total(), of_relative.total(), of_params.total()};
}

// Sums up the products of a chunk, in double: those of float32 are exact.
template <class Set, class T>
FASTCLIP_HD Products measure_products(const TensorEntry& tensor, int64_t begin, int64_t size,
                                      const Clip<double>& group_clip) {
  const auto clip = converted<Clip<T>>(group_clip);
  double with_grad[kLanes] = {}, squared[kLanes] = {};
  alignas(kCacheLine) T param_room[kBlock], grad_room[kBlock];
  for (const int64_t end = begin + size; begin < end; begin += kBlock) {
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    const T* const params = block_of<Set>(tensor.dtype, tensor.param, begin, count, param_room);
    const T* const grads = block_of<Set>(tensor.grad_dtype, tensor.grad, begin, count, grad_room);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      FASTCLIP_IVDEP
      for (int lane = 0; lane < kLanes; ++lane) {
        const double param = params[i + lane], grad = clip(grads[i + lane]);
        with_grad[lane] += param * grad;
        squared[lane] += param * param;
      }
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      with_grad[lane] += with_grad[lane + half];
      squared[lane] += squared[lane + half];
    }
  }
  return {with_grad[0], squared[0]};
}

// The number of streams in which a whole chunk is read: one core keeps more lines in flight over several pages.
constexpr int kStreams = 4;

template <class Set, class Stored, Norm kNorm, Seen kSeen>
FASTCLIP_HD void measure_loop(const TensorEntry& tensor, int64_t begin, int64_t size, const Clip<double>& group_clip,
                              Measure& result) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = std::is_same_v<Stored, double>;
  const auto clip = converted<Clip<T>>(group_clip);
  const auto* const grads = static_cast<const Stored*>(tensor.grad) + begin;
  LaneSums<kNorm, kFloat64, kLanes> sums;
  const auto add = [&](const Stored* from) __attribute__((always_inline)) {
    T x[kLanes];
    constexpr bool kHalves = std::is_same_v<Stored, Float16>;
    if constexpr (kHalves) Set::Halves::read(from, kLanes, x);
    for (int lane = 0; lane < kLanes; ++lane) {
      if constexpr (!kHalves) x[lane] = load(from[lane]);
      if constexpr (kSeen != Seen::raw) x[lane] = clip.measured(x[lane], kSeen == Seen::clipped_or_nonfinite);
    }
    for (int lane = 0; lane < kLanes; ++lane) sums.add(lane, x[lane]);
  };
  int64_t i = 0;
  if (size == kChunk) {
    constexpr int64_t kStream = kChunk / kStreams;
    for (; i < kStream; i += kLanes) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const Stored* const from = grads + stream * kStream + i;
        prefetch(from, kLanes, kChunk * sizeof(Stored));  // the same place of the next chunk
        add(from);
      }
    }
    i = kChunk;
  }
  for (; i + kLanes <= size; i += kLanes) add(grads + i);
  for (int lane = 0; i < size; ++i, ++lane) {
    const T x = clip.measured(load(grads[i]), kSeen == Seen::clipped_or_nonfinite);
    sums.add(lane, x);
  }
  result = sums.total();
}

}  // namespace
}  // namespace fastclip::cpu
