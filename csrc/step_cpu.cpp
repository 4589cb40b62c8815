// A step on the CPU: chunks over threads, each loop compiled for three instruction sets.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "step.h"

namespace fastclip::cpu {
namespace {

// A run of elements of one tensor.
struct Span {
  void* param;
  void* grad;
  void* momentum_buffer;
  int64_t size;
};

// ---- one loop per dtype and set of terms -------------------------------------------------------

// What a loop needs besides its span, in double; each loop converts it to its compute type, as
// torch does with the scalars of an operation.
struct Constants {
  Clip<double> clip;
  SGD<double> sgd;
};

template <class T>
FASTCLIP_HD Clip<T> convert(const Clip<double>& c) {
  return {T(c.unscale), T(c.low), T(c.high), T(c.coefficient)};
}
template <class T>
FASTCLIP_HD SGD<T> convert(const SGD<double>& c) {
  return {T(c.negative_lr), T(c.momentum), T(c.one_minus_dampening), T(c.weight_decay)};
}

// The hardware prefetcher stops at each page and looks too short a way ahead: one core reads one stream
// at about 60 % of what it can. Asking for the lines this far ahead brings the rest.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kCacheLine = 64;

// Asks for `count` elements, some way ahead of `from`.
template <class Stored>
FASTCLIP_HD void prefetch(const Stored* from, int64_t count) {
  const char* ahead = reinterpret_cast<const char*>(from) + kPrefetchBytes;
  for (int64_t byte = 0; byte < count * int64_t{sizeof(Stored)}; byte += kCacheLine) __builtin_prefetch(ahead + byte);
}

template <class Stored, class WhichTerms>
FASTCLIP_HD void update_loop(const Span& span, const Constants& constants) {
  using T = ComputeType<Stored>;
  const auto clip = convert<T>(constants.clip);
  const auto rule = convert<T>(constants.sgd);
  const WhichTerms terms;
  auto* const params = static_cast<Stored*>(span.param);
  const auto* const grads = static_cast<const Stored*>(span.grad);
  auto* const buffers = static_cast<Stored*>(span.momentum_buffer);
  const auto update = [&](int64_t i) __attribute__((always_inline)) {
    T param = load(params[i]);
    T buffer{};
    if constexpr (WhichTerms::momentum == Momentum::running) buffer = load(buffers[i]);
    rule(terms, param, clip(load(grads[i])), buffer);
    store(params[i], param);
    if constexpr (WhichTerms::momentum != Momentum::none) store(buffers[i], buffer);
  };
  constexpr int64_t kBlock = 64;
  int64_t i = 0;
  for (; i + kBlock <= span.size; i += kBlock) {
    prefetch(params + i, kBlock);
    prefetch(grads + i, kBlock);
    if constexpr (WhichTerms::momentum != Momentum::none) prefetch(buffers + i, kBlock);
    for (int64_t j = 0; j < kBlock; ++j) update(i + j);
  }
  for (; i < span.size; ++i) update(i);
}

template <class Stored>
FASTCLIP_HD void clip_loop(const Span& span, const Constants& constants) {
  const auto clip = convert<ComputeType<Stored>>(constants.clip);
  auto* const grads = static_cast<Stored*>(span.grad);
  for (int64_t i = 0; i < span.size; ++i) store(grads[i], clip(load(grads[i])));
}

// A chunk is summed in this many lanes, on every instruction set, and so to the same bits.
constexpr int kLanes = 32;

// kClip: whether there is a value clip or an unscaling before the norm.
template <class Stored, Norm kNorm, bool kClip>
FASTCLIP_HD void measure_loop(const Span& span, const Constants& constants, Measure& result) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = std::is_same_v<Stored, double>;
  const auto clip = convert<T>(constants.clip);
  const auto* const grads = static_cast<const Stored*>(span.grad);
  constexpr int kWide = kFloat64 && kNorm == Norm::two ? kLanes : 1;  // lanes of the sums that only float64 needs
  double small[kWide] = {}, medium[kLanes] = {}, big[kWide] = {};
  int64_t i = 0;
  for (; i + kLanes <= span.size; i += kLanes) {
    prefetch(grads + i, kLanes);
    T x[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      x[lane] = load(grads[i + lane]);
      if constexpr (kClip) x[lane] = clip.value(x[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], x[lane]);
    }
  }
  for (int lane = 0; i < span.size; ++i, ++lane) {
    const T x = clip.value(load(grads[i]));
    measure<kNorm, kFloat64>(small[lane % kWide], medium[lane], big[lane % kWide], x);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      medium[lane] = kNorm == Norm::inf ? larger(medium[lane], medium[lane + half]) : medium[lane] + medium[lane + half];
      if constexpr (kWide > 1) {
        small[lane] += small[lane + half];
        big[lane] += big[lane + half];
      }
    }
  }
  result = {small[0], medium[0], big[0]};
}

// ---- the three instruction sets ----------------------------------------------------------------

using Loop = void (*)(const Span&, const Constants&);
using MeasureLoop = void (*)(const Span&, const Constants&, Measure&);

struct LoopTable {
  Loop update[kNumDTypes][3][2][2];  // dtype, momentum, nesterov, weight decay
  Loop clip[kNumDTypes];
  MeasureLoop measure[kNumDTypes][2][2];  // dtype, inf norm, clip
};

// The loops above are inlined into the members of each set, and so compiled for its target.
#define FASTCLIP_INSTRUCTION_SET(NAME, TARGET)                                                     \
  struct NAME {                                                                                    \
    template <class Stored, class WhichTerms>                                                      \
    TARGET static void update(const Span& s, const Constants& c) {                                 \
      update_loop<Stored, WhichTerms>(s, c);                                                       \
    }                                                                                              \
    template <class Stored>                                                                        \
    TARGET static void clip(const Span& s, const Constants& c) {                                   \
      clip_loop<Stored>(s, c);                                                                     \
    }                                                                                              \
    template <class Stored, Norm kNorm, bool kClip>                                                          \
    TARGET static void measure(const Span& s, const Constants& c, Measure& m) {                    \
      measure_loop<Stored, kNorm, kClip>(s, c, m);                                                 \
    }                                                                                              \
  };

FASTCLIP_INSTRUCTION_SET(Baseline, )
#if defined(__x86_64__)
FASTCLIP_INSTRUCTION_SET(Avx2, __attribute__((target("avx2,fma"))))
FASTCLIP_INSTRUCTION_SET(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

template <class Set, class Stored, Momentum kMomentum>
constexpr void fill_terms(Loop (&loops)[2][2]) {
  loops[0][0] = Set::template update<Stored, StaticTerms<kMomentum, false, false>>;
  loops[0][1] = Set::template update<Stored, StaticTerms<kMomentum, false, true>>;
  // Without momentum nesterov means nothing.
  constexpr bool kNesterov = kMomentum != Momentum::none;
  loops[1][0] = Set::template update<Stored, StaticTerms<kMomentum, kNesterov, false>>;
  loops[1][1] = Set::template update<Stored, StaticTerms<kMomentum, kNesterov, true>>;
}

template <class Set, class Stored>
constexpr void fill_dtype(LoopTable& table, DType dtype) {
  const int d = static_cast<int>(dtype);
  fill_terms<Set, Stored, Momentum::none>(table.update[d][0]);
  fill_terms<Set, Stored, Momentum::first>(table.update[d][1]);
  fill_terms<Set, Stored, Momentum::running>(table.update[d][2]);
  table.clip[d] = Set::template clip<Stored>;
  table.measure[d][0][0] = Set::template measure<Stored, Norm::two, false>;
  table.measure[d][0][1] = Set::template measure<Stored, Norm::two, true>;
  table.measure[d][1][0] = Set::template measure<Stored, Norm::inf, false>;
  table.measure[d][1][1] = Set::template measure<Stored, Norm::inf, true>;
}

template <class Set>
constexpr LoopTable make_loops() {
  LoopTable table{};
  fill_dtype<Set, float>(table, DType::float32);
  fill_dtype<Set, double>(table, DType::float64);
  fill_dtype<Set, BFloat16>(table, DType::bfloat16);
  fill_dtype<Set, Float16>(table, DType::float16);
  return table;
}

struct InstructionSet {
  const char* name;
  bool supported;
  LoopTable loops;
};

// The best that the machine has, or the one named by FASTCLIP_CPU_CAPABILITY if the machine has it.
const InstructionSet& instruction_set() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"AVX512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       make_loops<Avx512>()},
      {"AVX2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), make_loops<Avx2>()},
#endif
      {"baseline", true, make_loops<Baseline>()},
  };
  static const InstructionSet& chosen = [&]() -> const InstructionSet& {
    const char* wanted = std::getenv("FASTCLIP_CPU_CAPABILITY");
    const InstructionSet* best = nullptr;
    for (const auto& set : sets) {
      if (!set.supported) continue;
      if (wanted && std::strcmp(wanted, set.name) == 0) return set;
      if (!best) best = &set;
    }
    return *best;
  }();
  return chosen;
}

// ---- chunks over threads -----------------------------------------------------------------------

// Below this a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 32768;
// Threads fetch this many chunks at a time: whoever is held up by other work on its core takes fewer.
constexpr int64_t kChunksPerFetch = 16;

int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

Span span_of(const TensorEntry& tensor, int64_t begin, int64_t size) {
  const int64_t offset = begin * size_of(tensor.dtype);
  const auto at = [offset](void* base) {
    return base ? static_cast<char*>(base) + offset : nullptr;
  };
  return {at(tensor.param), at(tensor.grad), at(tensor.momentum_buffer), size};
}

// Calls body(tensor, first element, number of elements) for each tensor's share of a range of chunks.
template <class Body>
void for_each_run(const Step& step, int64_t first_chunk, int64_t last_chunk, const Body& body) {
  auto tensor = std::upper_bound(
      step.tensors.begin(), step.tensors.end(), first_chunk,
      [](int64_t chunk, const TensorEntry& entry) { return chunk < entry.first_chunk; });
  --tensor;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++tensor) {
    const int64_t begin = (chunk - tensor->first_chunk) * kChunk;
    const int64_t end =
        std::min(tensor->numel, (last_chunk - tensor->first_chunk) * kChunk);
    if (begin < end) body(*tensor, begin, end - begin);
    chunk += (end - begin + kChunk - 1) / kChunk;
  }
}

// One parallel region: calls body(first chunk, last chunk) until every chunk was fetched. `backwards`
// starts where the pass before it ended, on what is still in the cache.
template <class Body>
void for_each_chunk(const Step& step, const ThreadPool& pool, bool backwards, const Body& body) {
  const int threads = static_cast<int>(std::min<int64_t>(
      pool.threads, std::max<int64_t>(step.elements / kElementsPerThread, 1)));
  if (threads == 1 && !backwards) return body(0, step.chunks);

  struct Work {
    const Body& body;
    const int64_t chunks;
    const bool backwards;
    std::atomic<int64_t> fetched{0};
  } work{body, step.chunks, backwards};
  const auto fetch_and_run = [](void* context) {
    auto& work = *static_cast<Work*>(context);
    for (;;) {
      const int64_t begin = work.fetched.fetch_add(kChunksPerFetch, std::memory_order_relaxed);
      if (begin >= work.chunks) return;
      const int64_t end = std::min(begin + kChunksPerFetch, work.chunks);
      work.backwards ? work.body(work.chunks - end, work.chunks - begin) : work.body(begin, end);
    }
  };
  threads == 1 ? fetch_and_run(&work) : pool.run(threads, fetch_and_run, &work);
}

Constants constants_of(const Step& step, const Hyper& hyper, double coefficient) {
  Constants c;
  // As GradScaler.unscale_ does it: one reciprocal in double, rounded to float, then products.
  c.clip.unscale = step.grad_scale ? static_cast<float>(1.0 / *step.grad_scale) : 1.0;
  c.clip.low = hyper.clip_low;
  c.clip.high = hyper.clip_high;
  c.clip.coefficient = hyper.maximize ? -coefficient : coefficient;
  c.sgd.negative_lr = -hyper.lr;
  c.sgd.momentum = hyper.momentum;
  c.sgd.one_minus_dampening = 1 - hyper.dampening;
  c.sgd.weight_decay = hyper.weight_decay;
  return c;
}

void measure_all(const Step& step, const ThreadPool& pool, const LoopTable& loops) {
  const bool inf = step.norm == Norm::inf;
  for_each_chunk(step, pool, false, [&](int64_t first_chunk, int64_t last_chunk) {
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin,
                                                    int64_t size) {
      const Constants constants = constants_of(step, step.hypers[tensor.hyper], 1.0);
      const bool clip = constants.clip.unscale != 1 || constants.clip.low > -HUGE_VAL ||
                        constants.clip.high < HUGE_VAL;
      const MeasureLoop loop = loops.measure[static_cast<int>(tensor.dtype)][inf][clip];
      Measure* measure = step.measures + tensor.first_chunk + begin / kChunk;
      for (int64_t done = 0; done < size; done += kChunk) {
        loop(span_of(tensor, begin + done, std::min(kChunk, size - done)), constants, *measure++);
      }
    });
  });
  Measure sum = {};
  for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
    combine(step.norm, sum, step.measures[chunk]);
  }
  step.outcome->total_norm = total_norm(step.norm, sum);
  step.outcome->coefficient = clip_coefficient(step.outcome->total_norm, step.max_norm);
}

void update_all(const Step& step, const ThreadPool& pool, const LoopTable& loops) {
  const bool normed = step.norm != Norm::none;
  const double coefficient = normed ? step.outcome->coefficient : 1.0;
  for_each_chunk(step, pool, normed, [&](int64_t first_chunk, int64_t last_chunk) {
    int32_t current = -1;
    Constants constants;
    for_each_run(step, first_chunk, last_chunk, [&](const TensorEntry& tensor, int64_t begin,
                                                    int64_t size) {
      const Hyper& hyper = step.hypers[tensor.hyper];
      if (current != tensor.hyper) {
        constants = constants_of(step, hyper, coefficient);
        current = tensor.hyper;
      }
      const int dtype = static_cast<int>(tensor.dtype);
      const Loop loop = step.rule == Rule::clip_grad
                            ? loops.clip[dtype]
                            : loops.update[dtype][static_cast<int>(tensor.momentum)][hyper.nesterov]
                                          [hyper.weight_decay != 0];
      loop(span_of(tensor, begin, size), constants);
    });
  });
}

}  // namespace

void run(const Step& step, const ThreadPool& pool) {
  if (step.found_inf && *step.found_inf != 0) return;
  const LoopTable& loops = instruction_set().loops;
  if (step.norm != Norm::none) measure_all(step, pool, loops);
  const bool nothing_to_clip =
      step.rule == Rule::clip_grad && step.norm != Norm::none && step.outcome->coefficient == 1;
  if (!nothing_to_clip) update_all(step, pool, loops);
}

const char* capability() { return instruction_set().name; }

}  // namespace fastclip::cpu
