// Measures or updates one tile of one tensor, by one warp of a GPU.
#pragma once

#include <type_traits>

#include "table.cuh"

namespace fastclip::cuda {
namespace {

// The type of a word. Memory moves in words of one value, or of as many values as 16 bytes hold. A word is unpacked
// only after the lane has asked for all of its words: at each unpacking, the compiler waits for that word.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = float;
};
template <>
struct WordOf<8> {
  using type = double;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <class Stored, int kSize>
struct Pack {
  using Word = typename WordOf<sizeof(Stored) * kSize>::type;
  Stored values[kSize];

  Pack() = default;
  __device__ __forceinline__ explicit Pack(const Word& word) { memcpy(values, &word, sizeof(values)); }
  __device__ __forceinline__ Word word() const {
    Word word;
    memcpy(&word, values, sizeof(values));
    return word;
  }
};

// Loads that a lane keeps in flight per array. With 16 warps on a multiprocessor these are at least 32 KiB, enough to
// hide the memory's latency.
template <int kArrays>
constexpr int kInFlight = kArrays > 3   ? 1
                          : kArrays > 2 ? 2
                                        : 4;

// Calls body(k, i) for the words i = first, first + 32, ... below `count` that a lane has under way at once.
template <int kAtOnce, class Body>
__device__ __forceinline__ void for_words(int first, int count, const Body& body) {
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const int i = first + k * kWarp;
    if (i >= count) break;
    body(k, i);
  }
}

// Calls body(values in a word, first element, first word of the lane, number of words) until all elements were handled.
// Words have 16 bytes where memory is aligned; the rest, and unaligned memory, moves in single values.
template <class Stored, int kAtOnce, int kFull = kPackBytes / int{sizeof(Stored)}, class Body>
__device__ __forceinline__ void for_tile(bool aligned, int size, const Body& body) {
  const int lane = threadIdx.x % kWarp;
  const int full = aligned ? size / kFull : 0;
#pragma unroll 1
  for (int first = lane; first < full; first += kAtOnce * kWarp) {
    body(std::integral_constant<int, kFull>{}, 0, first, full);
  }
  const int rest = size - full * kFull;
#pragma unroll 1
  for (int first = lane; first < rest; first += kAtOnce * kWarp) {
    body(std::integral_constant<int, 1>{}, full * kFull, first, rest);
  }
}

__device__ __forceinline__ double lr_of(const Hyper& hyper) {
  if (!hyper.lr_on_device) return hyper.lr;
  return hyper.lr_is_float64 ? *static_cast<const double*>(hyper.lr_on_device)
                             : *static_cast<const float*>(hyper.lr_on_device);
}

// Measures this lane's share of a tile. Not inlined, like update_tile: the registers of all dtypes of a mixture would
// add up. Keeps the gradients in `slot`, if there is one: each lane comes back for its own, so no lane waits for
// another. Loads and stores tell the caches how long to keep the data. Data that is used once is evicted first (`cs`),
// so that it drives nothing out. Only a gradient that will be read again stays in L2 (`cg`).
template <Norm kNorm, class Stored>
__device__ __noinline__ Measure measure_tile(const Header& header, const Hyper& hyper, const EntryHead& entry,
                                             int64_t begin, int size, uint4* slot) {
  using T = ComputeType<Stored>;
  using Sum = std::conditional_t<kNorm == Norm::inf, T, double>;  // a largest value needs no double
  constexpr bool kFloat64 = sizeof(Stored) == sizeof(double);
  constexpr int kAtOnce = kInFlight<1>;
  const Clip<T> clip = clip_of<T>(hyper, header.asked, {});
  const bool see_nonfinite = header.skip_nonfinite;
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  double small = 0, big = 0;
  Sum medium = 0;

  for_tile<Stored, kAtOnce>(entry.aligned, size, [&](auto values, int offset, int first, int count) {
    constexpr int kSize = decltype(values)::value;
    using Values = Pack<Stored, kSize>;
    using Word = typename Values::Word;
    const auto* const words = reinterpret_cast<const Word*>(grads + offset);
    Word g[kAtOnce];
    if (slot && kSize > 1) {
      for_words<kAtOnce>(first, count, [&](int k, int i) { g[k] = __ldcs(words + i); });
      for_words<kAtOnce>(first, count, [&](int k, int i) { reinterpret_cast<Word*>(slot)[i] = g[k]; });
    } else {
      for_words<kAtOnce>(first, count, [&](int k, int i) { g[k] = __ldcg(words + i); });
    }
    for_words<kAtOnce>(first, count, [&](int k, int) {
      const Values grad(g[k]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const T x = clip.measured(load(grad.values[j]), see_nonfinite);
        measure<kNorm, kFloat64>(small, medium, big, static_cast<Sum>(x));
      }
    });
  });
  return {small, static_cast<double>(medium), big};
}

// A measure that a lane carries through an update. float32 has one part of it: three would take registers.
template <bool kFloat64>
struct LaneSum {
  double medium = 0;
  __device__ __forceinline__ void add_square(double x) {
    double unused = 0;
    measure<Norm::two, false>(unused, medium, unused, x);
  }
  __device__ __forceinline__ operator Measure() const { return {0, medium, 0}; }
};
template <>
struct LaneSum<true> : Measure {
  __device__ __forceinline__ LaneSum() : Measure{} {}
  __device__ __forceinline__ void add_square(double x) { measure<Norm::two, true>(small, medium, big, x); }
};

// Adds a parameter to this lane's share of a tile's measure.
template <bool kFloat64, class T>
__device__ __forceinline__ void measure_param(Norm norm, LaneSum<kFloat64>& sum, T x) {
  if (norm == Norm::inf) {
    const T magnitude = fabs(x);
    sum.medium = larger(sum.medium, double{magnitude});
  } else {
    sum.add_square(double{x});
  }
}

// Measures this lane's share of the parameters of a tile, in the order in which an update goes through them, by words
// of kFull values: so the measure has the bits that the update would give it. It is seldom called, and small.
template <class Stored, int kFull>
__device__ __noinline__ Measure measure_params(const Header& header, const EntryHead& entry, int64_t begin, int size) {
  using Value = Pack<Stored, 1>;
  const auto* const params = reinterpret_cast<const typename Value::Word*>(static_cast<const Stored*>(entry.param));
  constexpr bool kFloat64 = sizeof(Stored) == sizeof(double);
  LaneSum<kFloat64> sum;
  for_tile<Stored, 1, kFull>(entry.aligned, size, [&](auto values, int offset, int first, int) {
    constexpr int kSize = decltype(values)::value;
#pragma unroll 1
    for (int j = 0; j < kSize; ++j) {
      const Value value(__ldcs(params + begin + offset + first * kSize + j));
      measure_param(header.norm, sum, load(value.values[0]));
    }
  });
  return sum;
}

// Returns a tensor's terms. The mask tells the compiler which switches are never on in this kernel.
template <class K>
__device__ __forceinline__ Terms possible_terms(const Hyper& hyper, const EntryHead& entry) {
  return terms_of(hyper.terms, entry.is_first) & K::kPossible;
}

// The factor of a tile's gradients. Where the rule wants to know more of a tensor: what was measured of it, after that.
struct Factors : Scaling {
  TensorSums sums{};
  double numel = 0;  // of the tensor
  double lr_factor = 1;
  DeltaParts measures = 0;  // if not 0, these are measured of what an update would add, and nothing is written
};
template <class K>
using FactorsOf = std::conditional_t<K::Rule::kNeedsNorm || K::kMeasuresTensors, Factors, Scaling>;

// Returns the rule's constants for a tensor, in the compute type.
template <class K, class T, class OneEntry>
__device__ __forceinline__ auto constants_of(const Hyper& hyper, const OneEntry& entry, const FactorsOf<K>& factors) {
  using R = typename K::Rule;
  TensorSums sums{};
  double lr = !K::kMeasuresDelta || entry.grad ? lr_of(hyper) : 0;  // without a gradient, it may be on another device
  if constexpr (R::kNeedsNorm) sums = factors.sums;
  if constexpr (K::kMeasuresDelta) lr *= factors.lr_factor;
  Progress progress;
  if constexpr (R::kNeedsProducts) {
    progress = progress_with_row(entry, sums, factors.numel);
  } else {
    progress = progress_of(entry, sums);
  }
  return converted<typename R::template Constants<T>>(R::constants(hyper, hyper.of<R>(), lr, progress));
}

// What an update tells of this lane's share of a tile. The parameters are measured for a limit on the change.
template <Beside kMeasured, bool kFloat64>
struct Updated {
  uint32_t clamped = 0;  // number of elements that the value clip changed
};
template <bool kFloat64>
struct Updated<Beside::change, kFloat64> {
  uint32_t clamped = 0;
  LaneSum<kFloat64> params;
};
template <bool kFloat64>
struct Updated<Beside::deltas, kFloat64> {
  uint32_t clamped = 0;
  LaneSum<kFloat64> delta, relative, param;
};
template <class K, class Stored>
using UpdatedBy = Updated<K::kBeside, sizeof(Stored) == sizeof(double)>;

// What a tile's update reads: all, or what is needed to measure what it would add.
template <class K>
struct Reads {
  uint32_t states;  // as bits
  bool param;
};
template <class K>
__device__ __forceinline__ Reads<K> reads_of(Terms terms, const FactorsOf<K>& factors) {
  using R = typename K::Rule;
  if constexpr (K::kMeasuresDelta) {
    const DeltaParts parts = factors.measures;
    if (parts) {
      const bool sees_grads = parts & (kDelta | kRelative);
      const uint32_t wanted = parts & kDelta ? ~0u : ~1u;  // relative gradients follow from the second average alone
      return {sees_grads ? R::reads(terms) & wanted : 0, parts & kParam || (sees_grads && R::delta_reads_param(terms))};
    }
  }
  return {R::reads(terms), !R::kClipsInPlace};
}

// Measures what the update of one element would add.
template <class R, bool kFloat64, class T, class Constants>
__device__ __forceinline__ void measure_delta(Updated<Beside::deltas, kFloat64>& sums, DeltaParts parts, Terms terms,
                                              const Constants& constants, T param, T d, T* states) {
  const T delta = R::delta(terms, constants, param, d, states);
  if (parts & kDelta) sums.delta.add_square(delta);
  if (parts & kRelative) sums.relative.add_square(R::relative(constants, d, states));
  if (parts & kParam) sums.param.add_square(param);
}

// Updates a tile.
template <class K, class Stored, class OneEntry>
__device__ __noinline__ UpdatedBy<K, Stored> update_tile(const Header& header, const Hyper& hyper,
                                                         const OneEntry& entry, int64_t begin, int size,
                                                         FactorsOf<K> factors, const uint4* slot) {
  using T = ComputeType<Stored>;
  using R = typename K::Rule;
  constexpr bool kReadsParam = !R::kClipsInPlace;
  constexpr int kStates = K::kStates, kRoom = K::kRoom;
  constexpr int kAtOnce = kInFlight<1 + kReadsParam + kStates>;
  const Clip<T> clip = clip_of<T>(hyper, header.asked, factors);
  const auto constants = constants_of<K, T>(hyper, entry, factors);
  const Terms terms = possible_terms<K>(hyper, entry);
  const Reads<K> reads = reads_of<K>(terms, factors);
  const uint32_t writes = R::writes(terms);  // groups differ in these

  auto* const params = static_cast<Stored*>(entry.param) + begin;
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  Stored* states_at[kRoom];  // in registers: if not, the compiler looks them up for each word
#pragma unroll
  for (int s = 0; s < kStates; ++s) states_at[s] = static_cast<Stored*>(entry.states[s]) + begin;
  UpdatedBy<K, Stored> updated;
  const Norm norm = header.norm;

  for_tile<Stored, kAtOnce>(entry.aligned, size, [&](auto values, int offset, int first, int count) {
    constexpr int kSize = decltype(values)::value;
    using Values = Pack<Stored, kSize>;
    using Word = typename Values::Word;
    const auto* const grad_words = reinterpret_cast<const Word*>(grads + offset);
    auto* const param_words = reinterpret_cast<Word*>(params + offset);
    const auto state_words = [&](int s) { return reinterpret_cast<Word*>(states_at[s] + offset); };
    Word p[kAtOnce], g[kAtOnce], state_in[kRoom][kAtOnce]{};  // zeros in the place of states that a group lacks
    if constexpr (K::kMeasuresDelta) {  // not all is read
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) p[k] = g[k] = Word{};
    }
    if (kReadsParam && (!K::kMeasuresDelta || reads.param)) {
      for_words<kAtOnce>(first, count, [&](int k, int i) { p[k] = __ldcs(param_words + i); });
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (!has(reads.states, s)) continue;
      for_words<kAtOnce>(first, count, [&](int k, int i) { state_in[s][k] = __ldcs(state_words(s) + i); });
    }
    if (K::kMeasuresDelta && !entry.grad) {
      // Its parameters alone are measured.
    } else if (slot && kSize > 1) {
      for_words<kAtOnce>(first, count, [&](int k, int i) { g[k] = reinterpret_cast<const Word*>(slot)[i]; });
    } else {
      for_words<kAtOnce>(first, count, [&](int k, int i) { g[k] = __ldcs(grad_words + i); });
    }
    for_words<kAtOnce>(first, count, [&](int k, int i) {
      const Values grad(g[k]);
      Values param, states[kRoom];
      if constexpr (kReadsParam) param = Values(p[k]);
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[s] = Values(state_in[s][k]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const T raw = load(grad.values[j]);
        const T d = clip(raw);
        T x{}, state[kMaxStates]{};
        if constexpr (kReadsParam) {
          updated.clamped += clip.clamps(raw);
          x = load(param.values[j]);
        }
#pragma unroll
        for (int s = 0; s < kStates; ++s) state[s] = load(states[s].values[j]);
        if constexpr (K::kMeasuresDelta) {
          if (factors.measures) {
            measure_delta<R>(updated, factors.measures, terms, constants, x, d, state);
            continue;
          }
        }
        R::update(terms, constants, x, d, state);
        store(param.values[j], x);
        if constexpr (K::kLimitsChange) {
          measure_param(norm, updated.params, load(param.values[j]));
        }
#pragma unroll
        for (int s = 0; s < kStates; ++s) store(states[s].values[j], state[s]);
      }
      if constexpr (K::kMeasuresDelta) {
        if (factors.measures) return;
      }
      __stcs(param_words + i, param.word());
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (has(writes, s)) __stcs(state_words(s) + i, states[s].word());
      }
    });
  });
  return updated;
}

// Calls body with a value of the type that arrays of this dtype hold.
template <DTypes kDTypes, class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  if constexpr (kDTypes == DTypes::float32) {
    body(float{});
  } else if constexpr (kDTypes == DTypes::bfloat16) {
    body(BFloat16{});
  } else {
    switch (dtype) {
      case DType::float32: return body(float{});
      case DType::bfloat16: return body(BFloat16{});
      case DType::float16: return body(Float16{});
      case DType::float64:
        if constexpr (kDTypes == DTypes::any) body(double{});
    }
  }
}

}  // namespace
}  // namespace fastclip::cuda
