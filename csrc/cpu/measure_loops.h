// The CPU's loops that measure chunks: gradients, parameters, and what an update would add.
#pragma once

#include "loops.h"

namespace fastclip::cpu {
namespace {

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
  prefetch(static_cast<const char*>(from) + at * item, kBlock * item, kMachine.bytes_ahead);
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
static_assert(kBlock % kLanes == 0 && kRun == kLanes);

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
  LaneSums<Norm::two, T, kLanes> of_deltas, of_relative, of_params;
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
      if constexpr (!kFloat64) {
        if (reads && tensor.scales) {
          read_state<Set>(tensor, s, begin, count, state[s]);
          for (int64_t i = count; i < kBlock; ++i) state[s][i] = 0;
          states[s] = state[s];
          continue;
        }
      }
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

// Adds kLanes gradients to the sums of a chunk.
template <class Set, Seen kSeen, class Stored, class Sums, class T>
FASTCLIP_HD void add_lanes(const typename Set::Narrow& narrow, const Stored* from, const Clip<T>& clip, Sums& sums) {
  const auto seen = [&](T x) __attribute__((always_inline)) {
    return kSeen == Seen::raw ? x : clip.measured(x, kSeen == Seen::clipped_or_nonfinite);
  };
  if constexpr (sizeof(Stored) == 2) {
    T x[kLanes];
    narrow.read(from, x);
    for (int lane = 0; lane < kLanes; ++lane) sums.add(lane, seen(x[lane]));
  } else {
    for (int lane = 0; lane < kLanes; ++lane) sums.add(lane, seen(load(from[lane])));
  }
}

// Measures the gradients of each chunk. kStreams chunks are read side by side where memory likes that.
template <class Set, class Stored, Norm kNorm, Seen kSeen>
FASTCLIP_HD void measure_loop(const TensorEntry& tensor, int64_t begin, int64_t size, const Clip<double>& group_clip,
                              Measure* results) {
  using T = ComputeType<Stored>;
  using Sums = LaneSums<kNorm, T, kLanes, Set::Narrow::kHasFma>;
  const auto clip = converted<Clip<T>>(group_clip);
  const auto* grads = static_cast<const Stored*>(tensor.grad) + begin;
  const typename Set::Narrow narrow;
  const bool reads_streams = kSeen == Seen::raw && kMachine.reads_streams;
  for (; reads_streams && size >= kStreams * kChunk; size -= kStreams * kChunk) {
    Sums sums[kStreams];
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const Stored* const from = grads + stream * kChunk + i;
        prefetch(from, kLanes, kStreams * kChunk * sizeof(Stored));  // the same place of the next chunks
        add_lanes<Set, kSeen>(narrow, from, clip, sums[stream]);
      }
    }
    for (Sums& sum : sums) *results++ = sum.total();
    grads += kStreams * kChunk;
  }
  for (; size > 0; size -= kChunk) {
    Sums sums;
    const int64_t count = size < kChunk ? size : kChunk;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      prefetch(grads + i, kLanes, kMachine.bytes_ahead);
      add_lanes<Set, kSeen>(narrow, grads + i, clip, sums);
    }
    for (int lane = 0; i < count; ++i, ++lane) {
      sums.add(lane, clip.measured(load(grads[i]), kSeen == Seen::clipped_or_nonfinite));
    }
    *results++ = sums.total();
    grads += count;
  }
}

}  // namespace
}  // namespace fastclip::cpu
