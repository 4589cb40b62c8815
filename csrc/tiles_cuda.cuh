// One tile of one tensor, for one warp of a GPU: measured, or updated.
#pragma once

#include "table_cuda.cuh"

namespace fastclip::cuda {
namespace {

template <class Stored>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / sizeof(Stored);
  Stored values[kSize];
};

// Loads and stores say how the caches should treat them. Everything is used once and given back (`cs`), so
// that it drives nothing out; only a gradient that is to be read again soon stays in L2 (`cg`).
template <class Word, class Stored>
__device__ __forceinline__ Stored load_as(const Stored* from, bool again) {
  const auto* words = reinterpret_cast<const Word*>(from);
  const Word word = again ? __ldcg(words) : __ldcs(words);
  Stored value;
  memcpy(&value, &word, sizeof(value));
  return value;
}
template <class Word, class Stored>
__device__ __forceinline__ void store_as(Stored* to, const Stored& value) {
  Word word;
  memcpy(&word, &value, sizeof(word));
  __stcs(reinterpret_cast<Word*>(to), word);
}

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

template <class Stored>
__device__ __forceinline__ Stored load_one(const Stored* from, bool again = false) {
  return load_as<typename WordOf<sizeof(Stored)>::type>(from, again);
}
template <class Stored>
__device__ __forceinline__ void store_one(Stored* to, const Stored& value) {
  store_as<typename WordOf<sizeof(Stored)>::type>(to, value);
}

template <class Stored>
__device__ __forceinline__ Pack<Stored> load_pack(const Pack<Stored>* from, bool again = false) {
  return load_as<uint4>(from, again);
}
template <class Stored>
__device__ __forceinline__ void store_pack(Pack<Stored>* to, const Pack<Stored>& pack) {
  store_as<uint4>(to, pack);
}

// Packs of each of so many arrays that a lane loads before it needs the first: with 16 warps on a
// multiprocessor 48 KiB are under way, twice what the memory's latency asks for.
template <int kArrays>
constexpr int kInFlight = kArrays > 2 ? 2 : 4;

// Calls packs(i, whole) for i = lane, lane + kAtOnce warps, ..., to handle the packs i, i + 32, ... below
// `whole`; then one(i) for each element that is left over or lies in unaligned memory.
template <class Stored, int kAtOnce, class Packs, class One>
__device__ __forceinline__ void for_tile(bool aligned, int size, const Packs& packs, const One& one) {
  const int lane = threadIdx.x % kWarp;
  const int whole = aligned ? size / Pack<Stored>::kSize : 0;
#pragma unroll 1
  for (int first = lane; first < whole; first += kAtOnce * kWarp) packs(first, whole);
#pragma unroll 1
  for (int i = whole * Pack<Stored>::kSize + lane; i < size; i += kWarp) one(i);
}

template <class T>
__device__ __forceinline__ Clip<T> clip_of(const Header& header, const Hyper& hyper, double coefficient) {
  const float unscale = header.grad_scale ? static_cast<float>(1.0 / *header.grad_scale) : 1.0f;
  return {T(unscale), T(hyper.clip_low), T(hyper.clip_high), T(hyper.maximize ? -coefficient : coefficient)};
}

__device__ __forceinline__ double lr_of(const Hyper& hyper) {
  if (!hyper.lr_on_device) return hyper.lr;
  return hyper.lr_is_float64 ? *static_cast<const double*>(hyper.lr_on_device)
                             : *static_cast<const float*>(hyper.lr_on_device);
}

// This lane's share of a tile's sum. Gradients are kept in `slot`, if there is one: each lane comes back
// for its own, so nobody has to wait for anybody. Functions of a tile are not inlined: one copy serves all
// kernels, and a call is nothing against a tile's memory traffic.
template <Norm kNorm, class Stored>
__device__ __noinline__ Measure measure_tile(const Header& header, const Hyper& hyper, const Entry& entry,
                                             int64_t begin, int size, uint4* slot) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = sizeof(Stored) == sizeof(double);
  const Clip<T> clip = clip_of<T>(header, hyper, 1.0);
  constexpr int kAtOnce = kInFlight<1>;
  const bool see_nonfinite = header.skip_nonfinite;
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  Measure sum{};
  const auto add = [&](const Stored& grad) {
    const T x = clip.measured(load(grad), see_nonfinite);
    measure<kNorm, kFloat64>(sum.small, sum.medium, sum.big, static_cast<double>(x));
  };
  for_tile<Stored, kAtOnce>(
      entry.aligned, size,
      [&](int first, int whole) {
        Pack<Stored> g[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kWarp;
          if (i < whole) g[k] = load_pack(reinterpret_cast<const Pack<Stored>*>(grads) + i, /*again=*/!slot);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kWarp;
          if (i >= whole) break;
          if (slot) reinterpret_cast<Pack<Stored>*>(slot)[i] = g[k];
#pragma unroll
          for (int j = 0; j < Pack<Stored>::kSize; ++j) add(g[k].values[j]);
        }
      },
      [&](int i) { add(load_one(grads + i, /*again=*/true)); });
  return sum;
}

enum class Kernel { sgd, sgd_momentum, clip_grad };

template <Kernel kKernel, class Stored>
__device__ __noinline__ void update_tile(const Header& header, const Hyper& hyper, const Entry& entry, int64_t begin,
                                         int size, double coefficient, const uint4* slot) {
  using T = ComputeType<Stored>;
  constexpr bool kRule = kKernel != Kernel::clip_grad;
  constexpr bool kBuffer = kKernel == Kernel::sgd_momentum;
  constexpr int kAtOnce = kInFlight<1 + kRule + kBuffer>;
  const Clip<T> clip = clip_of<T>(header, hyper, coefficient);
  const SGD<T> sgd{T(-lr_of(hyper)), T(hyper.momentum), T(1 - hyper.dampening), T(hyper.weight_decay)};
  const Terms terms{kBuffer ? entry.momentum : Momentum::none, hyper.nesterov, hyper.weight_decay != 0};

  auto* const params = static_cast<Stored*>(kRule ? entry.param : entry.grad) + begin;
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  auto* const buffers = kBuffer ? static_cast<Stored*>(entry.momentum_buffer) + begin : nullptr;
  const bool read_buffer = terms.momentum == Momentum::running;
  const bool write_buffer = terms.momentum != Momentum::none;  // not in every group

  const auto update = [&](Stored& param, const Stored& grad, Stored& stored_buffer) {
    const T g = clip(load(grad));
    if constexpr (kRule) {
      T p = load(param);
      T buffer = kBuffer && read_buffer ? load(stored_buffer) : T{};
      sgd(terms, p, g, buffer);
      store(param, p);
      if constexpr (kBuffer) store(stored_buffer, buffer);
    } else {
      store(param, g);
    }
  };

  for_tile<Stored, kAtOnce>(
      entry.aligned, size,
      [&](int first, int whole) {
        Pack<Stored> p[kAtOnce], g[kAtOnce], b[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kWarp;
          if (i >= whole) break;
          g[k] = slot ? reinterpret_cast<const Pack<Stored>*>(slot)[i]
                      : load_pack(reinterpret_cast<const Pack<Stored>*>(grads) + i);
          if constexpr (kRule) p[k] = load_pack(reinterpret_cast<const Pack<Stored>*>(params) + i);
          if constexpr (kBuffer) {
            if (read_buffer) b[k] = load_pack(reinterpret_cast<const Pack<Stored>*>(buffers) + i);
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = first + k * kWarp;
          if (i >= whole) break;
#pragma unroll
          for (int j = 0; j < Pack<Stored>::kSize; ++j) update(p[k].values[j], g[k].values[j], b[k].values[j]);
          store_pack(reinterpret_cast<Pack<Stored>*>(params) + i, p[k]);
          if constexpr (kBuffer) {
            if (write_buffer) store_pack(reinterpret_cast<Pack<Stored>*>(buffers) + i, b[k]);
          }
        }
      },
      [&](int i) {
        Stored p{}, b{};
        if constexpr (kRule) p = load_one(params + i);
        if constexpr (kBuffer) {
          if (read_buffer) b = load_one(buffers + i);
        }
        update(p, load_one(grads + i), b);
        store_one(params + i, p);
        if constexpr (kBuffer) {
          if (write_buffer) store_one(buffers + i, b);
        }
      });
}

// Kernels for tensors of the dtypes that models are trained in, and one for all others and mixtures, which
// needs more registers: there all lanes of a warp take the same branch.
enum class DTypes { float32, bfloat16, any };

template <DTypes kDTypes, class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  if constexpr (kDTypes == DTypes::float32) return body(float{});
  if constexpr (kDTypes == DTypes::bfloat16) return body(BFloat16{});
  if constexpr (kDTypes == DTypes::any) {
    switch (dtype) {
      case DType::float32: return body(float{});
      case DType::float64: return body(double{});
      case DType::bfloat16: return body(BFloat16{});
      case DType::float16: return body(Float16{});
    }
  }
}

}  // namespace
}  // namespace fastclip::cuda
