// The CUDA kernels: measure and update, over every chunk of every tensor in a table.
#pragma once

#include <cuda_runtime.h>

#include "step.h"

namespace fastclip::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kPackBytes = 16;  // the widest load

// ---- the table a kernel reads ------------------------------------------------------------------

struct Entry {
  void* param;
  void* grad;
  void* momentum_buffer;
  int64_t numel;
  uint32_t first_chunk;
  uint16_t hyper;
  DType dtype;
  Momentum momentum : 4;
  bool aligned : 1;  // all arrays start on 16 bytes, and with them every chunk
};
static_assert(sizeof(Entry) == 40, "more tensors fit into the kernel arguments while it is small");

struct Header {
  int64_t chunks;
  uint32_t tensors;
  uint32_t hypers;
  double max_norm;
  const float* grad_scale;
  const float* found_inf;
  Outcome* outcome;
  Measure* measures;
  const unsigned char* table;  // in device memory, or nullptr: it follows the header
  bool normed;
};

// Rows of Hyper, then the entries. As a kernel argument the table needs no copy and no lifetime, and a
// CUDA graph captures it by value; arguments may have 32,764 bytes since CUDA 12.1.
constexpr int kSmallTable = 3072;
#if CUDART_VERSION >= 12010
constexpr int kLargeTable = 32000;
#else
constexpr int kLargeTable = kSmallTable;
#endif

template <int kTableBytes>
struct Arguments {
  Header header;
  alignas(16) unsigned char table[kTableBytes];
};

struct Table {
  const Hyper* hypers;
  const Entry* entries;
};

template <int kTableBytes>
__device__ __forceinline__ Table table_of(const Arguments<kTableBytes>& arguments) {
  const unsigned char* bytes = arguments.header.table ? arguments.header.table : arguments.table;
  const auto* hypers = reinterpret_cast<const Hyper*>(bytes);
  return {hypers, reinterpret_cast<const Entry*>(hypers + arguments.header.hypers)};
}

// The last entry that starts at or before a chunk. The same for all threads of a block.
__device__ __forceinline__ const Entry& entry_of(const Entry* entries, uint32_t count, int64_t chunk) {
  uint32_t low = 0, high = count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return entries[low];
}

// ---- one chunk ---------------------------------------------------------------------------------

template <class Stored>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / sizeof(Stored);
  static constexpr int kOfChunk = kChunk / (kThreads * kSize);  // of one thread
  static constexpr int kInFlight = kOfChunk < 4 ? kOfChunk : 4;
  Stored values[kSize];
};

__device__ __forceinline__ double lr_of(const Hyper& hyper) {
  if (!hyper.lr_on_device) return hyper.lr;
  return hyper.lr_is_float64 ? *static_cast<const double*>(hyper.lr_on_device)
                             : *static_cast<const float*>(hyper.lr_on_device);
}

template <class T>
__device__ __forceinline__ Clip<T> clip_of(const Header& header, const Hyper& hyper, double coefficient) {
  const float unscale = header.grad_scale ? static_cast<float>(1.0 / *header.grad_scale) : 1.0f;
  return {T(unscale), T(hyper.clip_low), T(hyper.clip_high), T(hyper.maximize ? -coefficient : coefficient)};
}

// Calls body(i, n) for packs [i, i + kThreads, ...) of which n are in range, then one(i) for each
// element that is left over or lies in unaligned memory.
template <class Stored, class Packs, class One>
__device__ __forceinline__ void for_chunk(bool aligned, int size, const Packs& packs, const One& one) {
  constexpr int kPack = Pack<Stored>::kSize;
  const int whole = aligned ? size / kPack : 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < whole; first += kThreads * Pack<Stored>::kInFlight) packs(first, whole);
#pragma unroll 1
  for (int i = whole * kPack + threadIdx.x; i < size; i += kThreads) one(i);
}

enum class Kernel { sgd, sgd_momentum, clip_grad };

// Not inlined: one copy serves all kernels, and a call is nothing against a chunk's memory traffic.
template <Kernel kKernel, class Stored>
__device__ __noinline__ void update_chunk(const Header& header, const Hyper& hyper, const Entry& entry,
                                             int64_t begin, int size, double coefficient) {
  using T = ComputeType<Stored>;
  constexpr bool kRule = kKernel != Kernel::clip_grad;
  constexpr bool kBuffer = kKernel == Kernel::sgd_momentum;
  const Clip<T> clip = clip_of<T>(header, hyper, coefficient);
  const SGD<T> sgd{T(-lr_of(hyper)), T(hyper.momentum), T(1 - hyper.dampening), T(hyper.weight_decay)};
  const Terms terms{kBuffer ? entry.momentum : Momentum::none, hyper.nesterov, hyper.weight_decay != 0};

  auto* const params = static_cast<Stored*>(kRule ? entry.param : entry.grad) + begin;
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  auto* const buffers = kBuffer ? static_cast<Stored*>(entry.momentum_buffer) + begin : nullptr;
  const bool read_buffer = terms.momentum == Momentum::running;

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

  for_chunk<Stored>(
      entry.aligned, size,
      [&](int first, int whole) {
        constexpr int kInFlight = Pack<Stored>::kInFlight;
        Pack<Stored> p[kInFlight], g[kInFlight], b[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int i = first + k * kThreads;
          if (i >= whole) break;
          g[k] = reinterpret_cast<const Pack<Stored>*>(grads)[i];
          if constexpr (kRule) p[k] = reinterpret_cast<const Pack<Stored>*>(params)[i];
          if constexpr (kBuffer) {
            if (read_buffer) b[k] = reinterpret_cast<const Pack<Stored>*>(buffers)[i];
          }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int i = first + k * kThreads;
          if (i >= whole) break;
#pragma unroll
          for (int j = 0; j < Pack<Stored>::kSize; ++j) update(p[k].values[j], g[k].values[j], b[k].values[j]);
          reinterpret_cast<Pack<Stored>*>(params)[i] = p[k];
          if constexpr (kBuffer) reinterpret_cast<Pack<Stored>*>(buffers)[i] = b[k];
        }
      },
      [&](int i) {
        Stored unused;
        update(params[i], grads[i], kBuffer ? buffers[i] : unused);
      });
}

template <Norm kNorm, class Stored>
__device__ __noinline__ Measure measure_chunk(const Header& header, const Hyper& hyper, const Entry& entry,
                                                 int64_t begin, int size) {
  using T = ComputeType<Stored>;
  constexpr bool kFloat64 = sizeof(Stored) == sizeof(double);
  const Clip<T> clip = clip_of<T>(header, hyper, 1.0);
  const auto* const grads = static_cast<const Stored*>(entry.grad) + begin;
  Measure sum{};
  const auto add = [&](const Stored& grad) {
    measure<kNorm, kFloat64>(sum.small, sum.medium, sum.big, static_cast<double>(clip.value(load(grad))));
  };
  for_chunk<Stored>(
      entry.aligned, size,
      [&](int first, int whole) {
        constexpr int kInFlight = Pack<Stored>::kInFlight;
        Pack<Stored> g[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (first + k * kThreads >= whole) break;
          g[k] = reinterpret_cast<const Pack<Stored>*>(grads)[first + k * kThreads];
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (first + k * kThreads >= whole) break;
#pragma unroll
          for (int j = 0; j < Pack<Stored>::kSize; ++j) add(g[k].values[j]);
        }
      },
      [&](int i) { add(grads[i]); });
  return sum;
}

// The sum over a block, in an order that depends on nothing but the thread's number; for thread 0.
__device__ __forceinline__ Measure sum_over_block(Norm norm, Measure sum) {
  __shared__ Measure of_warp[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Measure other{__shfl_down_sync(0xffffffffu, sum.small, offset),
                        __shfl_down_sync(0xffffffffu, sum.medium, offset),
                        __shfl_down_sync(0xffffffffu, sum.big, offset)};
    combine(norm, sum, other);
  }
  __syncthreads();  // the last sum was read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) combine(norm, sum, of_warp[warp]);
  }
  return sum;
}

// ---- the kernels -------------------------------------------------------------------------------

// Kernels for tensors of one dtype, and one for a mixture, which needs more registers: there all
// threads of a block take the same branch.
enum class DTypes { float32, float64, bfloat16, float16, mixed };

template <DTypes kDTypes, class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  if constexpr (kDTypes == DTypes::float32) return body(float{});
  if constexpr (kDTypes == DTypes::float64) return body(double{});
  if constexpr (kDTypes == DTypes::bfloat16) return body(BFloat16{});
  if constexpr (kDTypes == DTypes::float16) return body(Float16{});
  if constexpr (kDTypes == DTypes::mixed) {
    switch (dtype) {
      case DType::float32: return body(float{});
      case DType::float64: return body(double{});
      case DType::bfloat16: return body(BFloat16{});
      case DType::float16: return body(Float16{});
    }
  }
}

// Blocks of 256 threads on a multiprocessor at the least: a cap on registers that leaves enough loads in flight.
constexpr int min_blocks(DTypes dtypes) { return dtypes == DTypes::mixed ? 1 : 2; }

// Chunks go round over the blocks. Calls body(chunk, hyper, entry, first element, number of elements).
template <int kTableBytes, class Body>
__device__ __forceinline__ void for_each_chunk(const Arguments<kTableBytes>& arguments, const Body& body) {
  const Table table = table_of(arguments);
  for (int64_t chunk = blockIdx.x; chunk < arguments.header.chunks; chunk += gridDim.x) {
    const Entry& entry = entry_of(table.entries, arguments.header.tensors, chunk);
    const int64_t begin = (chunk - entry.first_chunk) * kChunk;
    const int64_t rest = entry.numel - begin;
    body(chunk, table.hypers[entry.hyper], entry, begin, static_cast<int>(rest < kChunk ? rest : kChunk));
  }
}

__device__ __forceinline__ bool skipped(const Header& header) {
  return header.found_inf && *header.found_inf != 0;
}

template <Kernel kKernel, DTypes kDTypes, int kTableBytes>
__global__ void __launch_bounds__(kThreads, min_blocks(kDTypes)) update_kernel(const __grid_constant__ Arguments<kTableBytes> arguments) {
  const Header& header = arguments.header;
  if (skipped(header)) return;
  const double coefficient = header.normed ? header.outcome->coefficient : 1.0;
  if (kKernel == Kernel::clip_grad && header.normed && coefficient == 1.0) return;
  for_each_chunk(arguments, [&](int64_t, const Hyper& hyper, const Entry& entry, int64_t begin, int size) {
    with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
      update_chunk<kKernel, decltype(stored)>(header, hyper, entry, begin, size, coefficient);
    });
  });
}

template <Norm kNorm, DTypes kDTypes, int kTableBytes>
__global__ void __launch_bounds__(kThreads, min_blocks(kDTypes)) measure_kernel(const __grid_constant__ Arguments<kTableBytes> arguments) {
  const Header& header = arguments.header;
  if (skipped(header)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) header.outcome->total_norm = HUGE_VAL;
    return;
  }
  for_each_chunk(arguments, [&](int64_t chunk, const Hyper& hyper, const Entry& entry, int64_t begin, int size) {
    with_dtype<kDTypes>(entry.dtype, [&](auto stored) {
      const Measure sum = sum_over_block(kNorm, measure_chunk<kNorm, decltype(stored)>(header, hyper, entry, begin, size));
      if (threadIdx.x == 0) header.measures[chunk] = sum;
    });
  });

  // The last block to come here adds up what all have measured.
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&header.outcome->arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  Measure sum{};
  for (int64_t chunk = threadIdx.x; chunk < header.chunks; chunk += kThreads) {
    const volatile Measure& measured = header.measures[chunk];
    combine(kNorm, sum, Measure{measured.small, measured.medium, measured.big});
  }
  sum = sum_over_block(kNorm, sum);
  if (threadIdx.x == 0) {
    header.outcome->total_norm = total_norm(kNorm, sum);
    header.outcome->coefficient = clip_coefficient(header.outcome->total_norm, header.max_norm);
    header.outcome->arrived = 0;
  }
}

}  // namespace
}  // namespace fastclip::cuda
