// Stands in for the CUDA runtime in tests: a C++ compiler takes kernels and the code that launches them, and a launch
// executes the kernel on the CPU before it returns, each CUDA thread as a fiber, in a schedule that the test chooses.
//
// Kernels take one struct by value, have blocks and grids of one dimension, and share memory through
//   extern __shared__ uint4 dynamic_shared_memory[];
// at global scope, only. A loop that waits for another thread has to give way with __nanosleep.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // before __noinline__ is a macro: the header uses it as an attribute
#include <type_traits>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ __attribute__((weak))  // makes the compiler refuse a variable in a function: it would not be shared
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

// As in memory of a device, any bytes may be read and written as these.
struct __align__(8) __attribute__((may_alias)) uint2 {
  unsigned x, y;
};
struct __align__(16) __attribute__((may_alias)) uint4 {
  unsigned x, y, z, w;
};

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern __shared__ uint4 dynamic_shared_memory[];

// ---- what a test controls and sees: C++, and plain symbols for ctypes ---------------------------------------------

namespace cuda_on_cpu {

struct Device {
  int multiprocessors = 3;
  int threads_per_multiprocessor = 2048;
  int shared_per_multiprocessor = 228 << 10;
  int shared_per_block_optin = 227 << 10;
  int reserved_shared_per_block = 1 << 10;
  int cooperative = 1;
  int l2_bytes = 50 << 20;
};

struct Counters {
  uint64_t launches;  // of both kinds
  uint64_t cooperative_launches;
  uint64_t copies;
  uint64_t copied_bytes;
  uint64_t memsets;
  uint64_t synchronizations;
  uint64_t bytes_read;  // through __ldcs and the like, as all that follow
  uint64_t bytes_written;
  uint64_t wide_reads;  // of 16 bytes
  uint64_t narrow_reads;
  uint64_t wide_writes;
  uint64_t narrow_writes;
  uint64_t last_blocks;  // of the last launch
  uint64_t last_threads;  // in a block
  uint64_t last_shared_bytes;
};

// Which thread runs when several could. The others show what depends on luck.
enum Schedule { kInOrder, kReversed, kRandom };

#define CUDA_ON_CPU_SYMBOL(name) __asm__("cuda_on_cpu_" name) __attribute__((visibility("default")))
void set_device(const Device* device) CUDA_ON_CPU_SYMBOL("set_device");
void set_schedule(int schedule, uint64_t seed) CUDA_ON_CPU_SYMBOL("set_schedule");
void set_capturing(int capturing) CUDA_ON_CPU_SYMBOL("set_capturing");  // launches run all the same
void get_counters(Counters* counters) CUDA_ON_CPU_SYMBOL("get_counters");
void reset_counters() CUDA_ON_CPU_SYMBOL("reset_counters");
#undef CUDA_ON_CPU_SYMBOL

// ---- between kernels and the scheduler -----------------------------------------------------------------------------

// What a fiber shares with the scheduler is no data of the kernel's: ThreadSanitizer shall not see it.
#define CUDA_ON_CPU_UNSEEN __attribute__((no_sanitize("thread")))

struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Place place;  // of the thread that runs
extern Counters counters;

CUDA_ON_CPU_UNSEEN inline Place current() { return place; }

enum class Op { sleep, barrier, sync_warp, shuffle, ballot, any, all, end, fail };

// Stops the thread, and returns when the scheduler lets it go on. The value that came back from the other lanes.
uint64_t wait(Op op, unsigned mask = 0, uint64_t value = 0, int source_lane = 0);

[[noreturn]] void fail_access(const void* pointer, size_t size);

constexpr size_t kSharedCapacity = 228 << 10;

// An access by __ldcs and its like is to global memory: shared memory is in another address space.
inline bool is_shared(const volatile void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(dynamic_shared_memory) < kSharedCapacity;
}

// Before an access of a kernel to device memory that counts.
template <size_t kSize>
CUDA_ON_CPU_UNSEEN inline void count_access(const volatile void* pointer, uint64_t& bytes, uint64_t& wide,
                                            uint64_t& narrow) {
  const bool misaligned = reinterpret_cast<uintptr_t>(pointer) % kSize != 0;
  if (misaligned || is_shared(pointer)) fail_access(const_cast<const void*>(pointer), kSize);
  bytes += kSize;
  ++(kSize == 16 ? wide : narrow);
}

template <class T>
inline T read(const T* from) {
  count_access<sizeof(T)>(from, counters.bytes_read, counters.wide_reads, counters.narrow_reads);
  T value;
  memcpy(&value, __builtin_assume_aligned(from, sizeof(T)), sizeof(T));  // whatever the type of what is there
  return value;
}

template <class T>
inline void write(T* to, T value) {
  count_access<sizeof(T)>(to, counters.bytes_written, counters.wide_writes, counters.narrow_writes);
  memcpy(__builtin_assume_aligned(to, sizeof(T)), &value, sizeof(T));
}

inline int lane() { return static_cast<int>(current().thread.x % 32); }

template <class T>
inline T shuffle(unsigned mask, T value, int source_lane) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = wait(Op::shuffle, mask, bits, source_lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

struct Kernel {
  const void* function;
  const void* argument;
  size_t argument_size;
  void (*call)(const Kernel&);
};
int launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared, bool cooperative);

// A kernel takes one struct by value, or, which is faster here, by reference.
template <class Argument>
int launch(void (*function)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared, bool cooperative) {
  using Value = std::remove_reference_t<Argument>;
  static_assert(std::is_trivially_copyable_v<Value>, "a kernel takes one struct");
  const auto call = [](const Kernel& kernel) {
    reinterpret_cast<void (*)(Argument)>(kernel.function)(*static_cast<const Value*>(kernel.argument));
  };
  return launch({reinterpret_cast<const void*>(function), arguments[0], sizeof(Value), call}, grid, block, shared,
                cooperative);
}

int allow_shared(const void* function, int bytes);
int active_blocks(const void* function, int threads, size_t shared);

}  // namespace cuda_on_cpu

// ---- in kernels ----------------------------------------------------------------------------------------------------

#define threadIdx (::cuda_on_cpu::current().thread)
#define blockIdx (::cuda_on_cpu::current().block)
#define blockDim (::cuda_on_cpu::current().block_size)
#define gridDim (::cuda_on_cpu::current().grid_size)
#define warpSize 32

constexpr unsigned kAllLanes = 0xffffffffu;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Op::barrier); }
inline void __syncwarp(unsigned mask = kAllLanes) { cuda_on_cpu::wait(cuda_on_cpu::Op::sync_warp, mask); }
inline void __nanosleep(unsigned) { cuda_on_cpu::wait(cuda_on_cpu::Op::sleep); }
void __threadfence();

// A lane whose source is out of its segment of `width` lanes keeps its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_on_cpu::shuffle(mask, value, (cuda_on_cpu::lane() & -width) | (source & (width - 1)));
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_cpu::lane();
  const bool inside = delta < static_cast<unsigned>(width - lane % width);
  return cuda_on_cpu::shuffle(mask, value, inside ? lane + static_cast<int>(delta) : lane);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ lane_mask;
  return cuda_on_cpu::shuffle(mask, value, source / width <= lane / width ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(cuda_on_cpu::wait(cuda_on_cpu::Op::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(cuda_on_cpu::wait(cuda_on_cpu::Op::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(cuda_on_cpu::wait(cuda_on_cpu::Op::all, mask, predicate != 0));
}

// Relaxed, as on a GPU: order needs a __threadfence.
inline unsigned atomicAdd(unsigned* to, unsigned value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* to, unsigned value) { return __atomic_exchange_n(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicMax(unsigned* to, unsigned value) {
  unsigned before = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (before < value &&
         !__atomic_compare_exchange_n(to, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

template <class T>
inline T __ldcs(const T* from) {
  return cuda_on_cpu::read(from);
}
template <class T>
inline T __ldcg(const T* from) {
  return cuda_on_cpu::read(from);
}
template <class T>
inline T __ldg(const T* from) {
  return cuda_on_cpu::read(from);
}
template <class T>
inline void __stcs(T* to, T value) {
  cuda_on_cpu::write(to, value);
}
template <class T>
inline void __stcg(T* to, T value) {
  cuda_on_cpu::write(to, value);
}

// ---- on the host ---------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
using cudaStream_t = struct CUstream_st*;

// The last error of any call; cudaGetLastError forgets it.
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);  // these two also return what went wrong in a kernel
cudaError_t cudaDeviceSynchronize();

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared = 0,
                             cudaStream_t = nullptr) {
  return static_cast<cudaError_t>(cuda_on_cpu::launch(kernel, grid, block, arguments, shared, false));
}

template <class Argument>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                                        size_t shared = 0, cudaStream_t = nullptr) {
  return static_cast<cudaError_t>(cuda_on_cpu::launch(kernel, grid, block, arguments, shared, true));
}

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), bytes));
}

template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function kernel, int threads, size_t shared) {
  *blocks = cuda_on_cpu::active_blocks(reinterpret_cast<const void*>(kernel), threads, shared);
  return cudaSuccess;
}
