// Tests the stand-in itself with toy kernels. Without arguments: all tests. With the name of a case: only that, which
// ends badly under a sanitizer; the tests run those as processes of their own.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

extern __shared__ uint4 dynamic_shared_memory[];

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

constexpr unsigned kThreads = 512;
constexpr unsigned kWarps = kThreads / 32;

// ---- kernels -------------------------------------------------------------------------------------------------------

struct Sum {
  const float* values;  // of all threads
  double* of_block;
};

template <bool kSynchronize>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Sum sum) {
  auto* const of_warp = reinterpret_cast<double*>(dynamic_shared_memory);
  double value = __ldcs(sum.values + blockIdx.x * blockDim.x + threadIdx.x);
  for (unsigned delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(kAllLanes, value, delta);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if (kSynchronize) __syncthreads();
  if (threadIdx.x > 0) return;
  for (unsigned i = 1; i < kWarps; ++i) value += of_warp[i];
  __stcg(sum.of_block + blockIdx.x, value);
}

struct Rounds {
  unsigned* ticket;
  unsigned* values;  // one of each block
  unsigned rounds;
  unsigned* wrong;
};

__device__ __forceinline__ void grid_barrier(unsigned* ticket, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(ticket, 1u);
    while (*static_cast<volatile unsigned*>(ticket) < (round + 1) * gridDim.x) __nanosleep(100);
    __threadfence();
  }
  __syncthreads();
}

// In each round every block writes, and reads what all have written. Shared memory stays the block's own.
template <bool kBarrier>
__global__ void rounds_kernel(const __grid_constant__ Rounds rounds) {
  auto* const shared = reinterpret_cast<unsigned*>(dynamic_shared_memory);
  shared[threadIdx.x] = blockIdx.x * 1000 + threadIdx.x;
  for (unsigned round = 0; round < rounds.rounds; ++round) {
    if (threadIdx.x == 0) rounds.values[blockIdx.x] = round + 1;
    if (kBarrier) grid_barrier(rounds.ticket, 2 * round);
    if (threadIdx.x < gridDim.x && rounds.values[threadIdx.x] != round + 1) atomicAdd(rounds.wrong, 1u);
    const unsigned neighbour = (threadIdx.x + 1) % blockDim.x;
    if (shared[neighbour] != blockIdx.x * 1000 + neighbour) atomicAdd(rounds.wrong, 1u);
    if (kBarrier) grid_barrier(rounds.ticket, 2 * round + 1);
  }
}

struct Output {
  unsigned* values;
};

__global__ void warp_kernel(const Output output) {
  const unsigned i = threadIdx.x;
  unsigned wrong = 0;
  const unsigned odd = 0xaaaaaaaau, half = i < 16 ? 0x0000ffffu : 0xffff0000u;
  wrong += __ballot_sync(kAllLanes, i % 2) != odd;
  wrong += __any_sync(kAllLanes, i == 7) != 1;
  wrong += __any_sync(half, i == 7) != (i < 16);
  wrong += __all_sync(half, i < 16) != (i < 16);
  wrong += __shfl_xor_sync(kAllLanes, i, 1) != (i ^ 1);
  wrong += __shfl_sync(kAllLanes, -2.5 * i, 3) != -7.5;
  wrong += __shfl_down_sync(kAllLanes, 1.5f * i, 4, 8) != 1.5f * (i % 8 < 4 ? i + 4 : i);
  if (i % 2) {
    __syncwarp(odd);
    const auto source = static_cast<int>(i - 1);  // not in the mask
    wrong += __shfl_sync(odd, 77ull + i, source) == 77ull + i - 1;
  }
  wrong += __popc(odd) != 16 || __ffs(8) != 4 || __clz(1) != 31;
  __syncwarp();
  atomicAdd(output.values, wrong);
}

__global__ void copy_kernel(const Output output) {  // 16 bytes and 4
  auto* const wide = reinterpret_cast<uint4*>(output.values);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  __stcs(wide + 1 + i, __ldcg(wide));
  __stcg(output.values + 1000 + i, __ldg(output.values));
}

__global__ void deadlock_kernel(const Output) {
  if (threadIdx.x % 32 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void left_alone_kernel(const Output) {
  if (threadIdx.x == 5) return;
  __syncwarp();
}

__global__ void wrong_operation_kernel(const Output output) {
  output.values[threadIdx.x] =
      threadIdx.x == 3 ? __ballot_sync(kAllLanes, 1) : __shfl_xor_sync(kAllLanes, threadIdx.x, 1);
}

__global__ void endless_kernel(const Output output) {
  while (*static_cast<volatile unsigned*>(output.values) == 0) __nanosleep(20);
}

__global__ void overrun_kernel(const Output) {
  reinterpret_cast<unsigned char*>(dynamic_shared_memory)[100 + threadIdx.x] = 1;  // of 100 bytes
}

__global__ void address_space_kernel(const Output) {
  __stcs(reinterpret_cast<unsigned*>(dynamic_shared_memory) + threadIdx.x, 1u);
}

// Block 1 reads what block 0 wrote in the same launch, with nothing between.
__global__ void blocks_race_kernel(const Output output) {
  if (threadIdx.x == 0) output.values[0] += blockIdx.x;
}

struct alignas(16) LargeArgument {
  unsigned* values;
  unsigned char rest[32736];
};
struct TooLargeArgument {
  unsigned char bytes[32768];
};
__global__ void large_kernel(const __grid_constant__ LargeArgument argument) {
  argument.values[threadIdx.x] = argument.rest[sizeof(argument.rest) - 1];
}
__global__ void too_large_kernel(const __grid_constant__ TooLargeArgument) {}

__global__ void shuffles_kernel(const Output output) {
  unsigned value = threadIdx.x;
  for (int i = 0; i < 40; ++i) value += __shfl_xor_sync(kAllLanes, value, 1 << i % 5);
  output.values[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// ---- running them --------------------------------------------------------------------------------------------------

int failures = 0;

#define EXPECT(condition)                                           \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("line %d: not true: %s\n", __LINE__, #condition); \
      ++failures;                                                   \
    }                                                               \
  } while (false)

template <class Argument>
cudaError_t launch(void (*kernel)(Argument), Argument argument, unsigned blocks, unsigned threads, size_t shared = 0,
                   bool cooperative = false) {
  void* arguments[] = {&argument};
  return cooperative ? cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, shared, nullptr)
                     : cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, shared, nullptr);
}

void for_schedules(const std::function<void()>& body) {
  for (int i = 0; i < 8; ++i) {
    cuda_on_cpu::set_schedule(i < 2 ? i : cuda_on_cpu::kRandom, i);
    body();
  }
  cuda_on_cpu::set_schedule(cuda_on_cpu::kInOrder, 0);
}

template <bool kSynchronize>
bool sum_is_right(unsigned blocks = 3) {
  std::vector<float> values(blocks * kThreads);
  std::vector<double> sums(blocks), expected(blocks);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i % 1001) / 8;
    expected[i / kThreads] += values[i];
  }
  const auto error =
      launch(sum_kernel<kSynchronize>, Sum{values.data(), sums.data()}, blocks, kThreads, kWarps * sizeof(double));
  return error == cudaSuccess && sums == expected;
}

template <bool kBarrier>
unsigned rounds_wrong(unsigned blocks, unsigned threads) {
  std::vector<unsigned> values(blocks);
  unsigned ticket = 0, wrong = 0;
  const auto error = launch(rounds_kernel<kBarrier>, Rounds{&ticket, values.data(), 5, &wrong}, blocks, threads,
                            threads * sizeof(unsigned), true);
  return error == cudaSuccess ? wrong : 1'000'000 + error;
}

unsigned memory[4096] __attribute__((aligned(16)));

template <class Kernel>
cudaError_t fails(Kernel kernel, unsigned threads = 64, size_t shared = 0) {
  const cudaError_t error = launch(kernel, Output{memory}, 2, threads, shared);
  EXPECT(cudaPeekAtLastError() == error && cudaDeviceSynchronize() == error && cudaGetLastError() == error);
  EXPECT(cudaGetLastError() == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
  EXPECT(sum_is_right<true>());  // and goes on
  return error;
}

// What a case of its own process prints, if it ends badly.
std::string output_of(const std::string& name) {
  char path[4096] = {};
  FILE* const link = popen("readlink /proc/$PPID/exe", "r");
  if (link && std::fgets(path, sizeof(path), link)) path[strcspn(path, "\n")] = 0;
  if (link) pclose(link);
  std::string output;
  FILE* const process = popen((std::string(path) + " " + name + " 2>&1").c_str(), "r");
  char part[4096];
  while (process && std::fgets(part, sizeof(part), process)) output += part;
  return process && pclose(process) != 0 ? output : "";
}

const std::map<std::string, std::function<void()>> kCases = {
    {"overrun", [] { EXPECT(launch(overrun_kernel, Output{}, 2, 4, 100) == cudaSuccess); }},
    {"no_syncthreads",
     [] {
       cuda_on_cpu::set_schedule(cuda_on_cpu::kReversed, 0);  // gives the right answer
       sum_is_right<false>();
     }},
    {"blocks_race", [] { launch(blocks_race_kernel, Output{memory}, 2, 32); }},
    {"no_grid_barrier", [] { rounds_wrong<false>(2, 32); }},
};

bool case_finds(const std::string& name, const std::string& message) {
  return output_of(name).find(message) != std::string::npos;
}

void test_sums() {
  for_schedules([] { EXPECT(sum_is_right<true>()); });
  if (!kTsan) {
    int right = 0;
    for_schedules([&] { right += sum_is_right<false>(); });
    EXPECT(right < 8);
  }
  EXPECT(!kTsan || case_finds("no_syncthreads", "data race"));
  EXPECT(!kTsan || case_finds("blocks_race", "data race"));
  EXPECT(!kTsan || case_finds("no_grid_barrier", "data race"));
}

void test_grid_barrier() {
  for_schedules([] {
    EXPECT(rounds_wrong<true>(6, 64) == 0);
    EXPECT(kTsan || rounds_wrong<false>(6, 64) > 0);
  });
}

void test_warps() {
  for_schedules([] {
    memory[0] = 0;
    EXPECT(launch(warp_kernel, Output{memory}, 1, 32) == cudaSuccess);
    EXPECT(memory[0] == 0);
  });
}

void test_counters() {
  cuda_on_cpu::reset_counters();
  EXPECT(launch(copy_kernel, Output{memory}, 2, 10, 64, true) == cudaSuccess);
  cudaMemcpyAsync(memory, memory + 100, 40, cudaMemcpyDefault);
  cudaMemsetAsync(memory, 0, 40);
  cudaDeviceSynchronize();
  cuda_on_cpu::Counters c;
  cuda_on_cpu::get_counters(&c);
  EXPECT(c.launches == 1 && c.cooperative_launches == 1 && c.copies == 1 && c.copied_bytes == 40 && c.memsets == 1);
  EXPECT(c.synchronizations == 1 && c.last_blocks == 2 && c.last_threads == 10 && c.last_shared_bytes == 64);
  EXPECT(c.bytes_read == 400 && c.bytes_written == 400);
  EXPECT(c.wide_reads == 20 && c.narrow_reads == 20 && c.wide_writes == 20 && c.narrow_writes == 20);
}

void test_failures() {
  EXPECT(fails(deadlock_kernel) == cudaErrorLaunchTimeout);
  EXPECT(fails(left_alone_kernel) == cudaErrorLaunchTimeout);
  EXPECT(fails(wrong_operation_kernel) == cudaErrorLaunchFailure);
  memory[0] = 0;
  EXPECT(fails(endless_kernel) == cudaErrorLaunchTimeout);
  EXPECT(launch(copy_kernel, Output{memory + 1}, 1, 1) == cudaErrorMisalignedAddress);
  EXPECT(launch(address_space_kernel, Output{}, 1, 4, 100) == cudaErrorInvalidAddressSpace);
  if (kAsan) {
    EXPECT(case_finds("overrun", "AddressSanitizer: use-after-poison"));
  } else {
    EXPECT(fails(overrun_kernel, 4, 100) == cudaErrorLaunchFailure);
  }
  cudaGetLastError();
}

void test_limits() {
  EXPECT(launch(rounds_kernel<true>, Rounds{}, 13, 512, 0, true) == cudaErrorCooperativeLaunchTooLarge);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, sum_kernel<true>, 512, 0);
  EXPECT(blocks == 4);
  EXPECT(launch(left_alone_kernel, Output{}, 1, 1, 100 << 10) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(sum_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) != cudaSuccess);
  EXPECT(cudaFuncSetAttribute(sum_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10) == cudaSuccess);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, sum_kernel<true>, 512, 100 << 10);
  EXPECT(blocks == 2);
  LargeArgument large{memory, {}};
  large.rest[sizeof(large.rest) - 1] = 9;
  EXPECT(launch(large_kernel, large, 1, 64) == cudaSuccess && memory[63] == 9);
  EXPECT(launch(too_large_kernel, TooLargeArgument{}, 1, 1) == cudaErrorInvalidValue);
  EXPECT(launch(copy_kernel, Output{memory}, 1, 1025) == cudaErrorInvalidConfiguration);
  cudaGetLastError();

  cuda_on_cpu::set_capturing(1);
  cudaStreamCaptureStatus status;
  cudaStreamIsCapturing(nullptr, &status);
  EXPECT(status == cudaStreamCaptureStatusActive);
  EXPECT(cudaStreamSynchronize(nullptr) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaMemcpy(memory, memory, 0, cudaMemcpyDefault) == cudaErrorStreamCaptureUnsupported);
  cuda_on_cpu::set_capturing(0);
  cudaGetLastError();
}

void measure_time() {
  static unsigned values[6 * 512];
  for (const bool cooperative : {false, true}) {
    for (int schedule = 0; schedule < 3; ++schedule) {
      cuda_on_cpu::set_schedule(schedule, 1);
      double best = 1e9;
      for (int i = 0; i < 5; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        EXPECT(launch(shuffles_kernel, Output{values}, 6, 512, 0, cooperative) == cudaSuccess);
        const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
        best = std::min(best, time.count());
      }
      std::printf("6 blocks of 512 threads, 40 shuffles each, %s, schedule %d: %.2f ms\n",
                  cooperative ? "cooperative" : "one by one", schedule, best);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    kCases.at(arguments[1])();
    return failures != 0;
  }
  test_sums();
  test_grid_barrier();
  test_warps();
  test_counters();
  test_failures();
  test_limits();
  measure_time();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
