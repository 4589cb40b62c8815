// The launches and the fake device behind cuda_runtime.h.
#include "cuda_runtime.h"

#include <map>
#include <mutex>

#include "scheduler.h"

namespace cuda_on_cpu {

Place place;
Counters counters;

namespace {

constexpr unsigned kMaxBlocks = 32;  // on a multiprocessor
constexpr size_t kMaxArgument = 32764;
constexpr size_t kSharedWithoutOptIn = 48 << 10;

Device device;
bool capturing = false;
int current_device = 0;
cudaError_t last_error = cudaSuccess, fault = cudaSuccess;
std::map<const void*, int> allowed_shared;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  ++counters.copies;
  counters.copied_bytes += bytes;
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t synchronize_all() {
  if (capturing) return returned(cudaErrorStreamCaptureUnsupported);
  ++counters.synchronizations;
  return fault;
}

}  // namespace

// ---- what kernels call ---------------------------------------------------------------------------------------------

UNSEEN uint64_t wait(Op op, unsigned mask, uint64_t value, int source_lane) {
  Fiber& fiber = *running;
  fiber.request = {op, mask, value, source_lane, nullptr};
  to_scheduler();
  return fiber.result;
}

UNSEEN void fail_access(const void* pointer, size_t size) {
  running->request = {Op::fail, 0, size, 0, pointer};
  to_scheduler();
  __builtin_unreachable();  // the launch has failed
}

// ---- control and launches ------------------------------------------------------------------------------------------

void set_device(const Device* to) { device = *to; }
void set_schedule(int to, uint64_t seed) {
  schedule = to;
  random_state = seed;
}
void set_capturing(int to) { capturing = to; }
void get_counters(Counters* to) { *to = counters; }
void reset_counters() { counters = {}; }

int allow_shared(const void* function, int bytes) {
  if (bytes < 0 || bytes > device.shared_per_block_optin) return returned(cudaErrorInvalidValue);
  allowed_shared[function] = bytes;
  return cudaSuccess;
}

namespace {
size_t max_shared(const void* function) {
  const auto allowed = allowed_shared.find(function);
  return allowed == allowed_shared.end() ? kSharedWithoutOptIn : std::max<size_t>(kSharedWithoutOptIn, allowed->second);
}
}  // namespace

int active_blocks(const void* function, int threads, size_t shared) {
  if (threads < 1 || threads > static_cast<int>(kMaxThreads) || shared > max_shared(function)) return 0;
  const int by_threads = device.threads_per_multiprocessor / ((threads + kWarp - 1) / kWarp * kWarp);
  const int needed = static_cast<int>(shared) + device.reserved_shared_per_block;
  const int by_shared = needed == 0 ? by_threads : device.shared_per_multiprocessor / needed;
  return std::min({by_threads, by_shared, static_cast<int>(kMaxBlocks)});
}

int launch(const Kernel& launched, dim3 grid, dim3 block, size_t shared, bool cooperative) {
  static std::mutex& one_at_a_time = *new std::mutex;
  const std::lock_guard lock(one_at_a_time);
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || block.x == 0 || block.x > kMaxThreads) return returned(cudaErrorInvalidConfiguration);
  if (launched.argument_size > kMaxArgument) return returned(cudaErrorInvalidValue);
  if (shared > max_shared(launched.function) || shared > kSharedCapacity) return returned(cudaErrorInvalidValue);
  if (cooperative) {
    if (!device.cooperative) return returned(cudaErrorNotSupported);
    const int resident = device.multiprocessors * active_blocks(launched.function, static_cast<int>(block.x), shared);
    if (grid.x > static_cast<unsigned>(resident)) return returned(cudaErrorCooperativeLaunchTooLarge);
  }
  ++counters.launches;
  counters.cooperative_launches += cooperative;
  counters.last_blocks = grid.x;
  counters.last_threads = block.x;
  counters.last_shared_bytes = shared;
  kernel = &launched;
  const cudaError_t error = run_grid(grid.x, block.x, shared, cooperative);
  if (error != cudaSuccess) fault = error;
  return returned(error);
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// Orders what a thread did before it ahead of what another does after its next: a little more than a GPU's, which also
// needs the flag between them, but a fence that is missing on either side is found.
UNSEEN void __threadfence() {
  tsan::acquire(&fence);
  tsan::release(&fence);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = fault = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchTimeout: return "the launch timed out and was terminated";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorInvalidAddressSpace: return "invalid address space";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* to) {
  *to = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) { return to == 0 ? cudaSuccess : returned(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = device.l2_bytes; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_per_multiprocessor; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = device.cooperative; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_per_block_optin; return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = device.reserved_shared_per_block; return cudaSuccess;
  }
  return returned(cudaErrorInvalidValue);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return capturing ? returned(cudaErrorStreamCaptureUnsupported) : copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  ++counters.memsets;
  if (bytes) memset(to, byte, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return synchronize_all(); }
cudaError_t cudaDeviceSynchronize() { return synchronize_all(); }
