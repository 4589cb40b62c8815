// What a CUDA kernel is told: a header, the groups' hyperparameters, and one entry per tensor.
#pragma once

#include <cuda_runtime.h>

#include "step.h"

namespace fastclip::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kPackBytes = 16;  // the widest load

// Tensors are cut into tiles of `Header::tile` elements, and a warp takes one at a time: warps wait for
// nobody inside a pass over memory, and work is dealt out by elements, not by tensors.
struct EntryHead {
  void* param;
  void* grad;
  int64_t numel;
  uint32_t first_tile;
  uint16_t hyper;
  DType dtype;
  Momentum momentum : 4;
  bool aligned : 1;  // all arrays start on 16 bytes, and with them every tile
  bool counts : 1;   // of several entries of one tensor, one counts its steps
  bool step_is_float64 : 1;
  uint8_t unused : 1;
};
static_assert(sizeof(EntryHead) == 32, "more tensors fit into the kernel arguments while it is small");

// With as many state arrays as a kernel knows.
template <int kStates, bool kCounts>
struct Entry : EntryHead {
  void* states[kStates > 0 ? kStates : 1];
};
template <int kStates>
struct Entry<kStates, true> : EntryHead {
  void* states[kStates];
  void* step;
};

// What a launch does to its tensors; those that need no state array, or no third one, do without its registers.
enum class Kernel { sgd, sgd_momentum, adam, adam_amsgrad, clip_grad };

template <Kernel kKernel>
constexpr int kStatesOf = kKernel == Kernel::sgd_momentum ? 1 : kKernel == Kernel::adam ? 2 : kKernel == Kernel::adam_amsgrad ? 3 : 0;
template <Kernel kKernel>
constexpr bool kCountsSteps = kKernel == Kernel::adam || kKernel == Kernel::adam_amsgrad;
template <Kernel kKernel>
using EntryOf = Entry<kStatesOf<kKernel>, kCountsSteps<kKernel>>;

struct Header {
  const unsigned char* table;  // in device memory, or nullptr: it follows the header
  uint32_t hypers;
  uint32_t tensors;
  uint32_t tiles;
  int32_t tile;        // elements
  uint32_t slots;      // tiles that a block can keep in its shared memory between the passes,
  int32_t slot_bytes;  // and the size of each
  const float* grad_scale;
  const float* found_inf;
  Outcome* outcome;
  double* clamped;      // of every block
  double* measures;     // of every tile: all `medium`, then all `small`, then all `big`
  const Measure* sums;  // of every device; nullptr where nothing is measured
  int32_t devices;
  Norm norm;
  bool measure;  // what this launch is for
  bool update;
  bool skip_nonfinite;
  bool counts;
  double max_norm;
};

// As a kernel argument the table needs no copy and no lifetime, and a CUDA graph captures it by value;
// arguments may have 32,764 bytes since CUDA 12.1.
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

template <Kernel kKernel>
struct Table {
  const Hyper* hypers;
  const EntryOf<kKernel>* entries;
};

template <Kernel kKernel, int kTableBytes>
__device__ __forceinline__ Table<kKernel> table_of(const Arguments<kTableBytes>& arguments) {
  const unsigned char* bytes = arguments.header.table ? arguments.header.table : arguments.table;
  const auto* hypers = reinterpret_cast<const Hyper*>(bytes);
  return {hypers, reinterpret_cast<const EntryOf<kKernel>*>(hypers + arguments.header.hypers)};
}

// The last entry that starts at or before a tile, for a whole warp: its lanes look at 32 places at once.
template <class OneEntry>
__device__ __forceinline__ const OneEntry& entry_of(const OneEntry* entries, uint32_t count, uint32_t tile) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t low = 0;
  while (count > 1) {
    const uint32_t stride = (count + kWarp - 1) / kWarp;
    const bool starts_before = lane * stride < count && entries[low + lane * stride].first_tile <= tile;
    const uint32_t last = __popc(__ballot_sync(0xffffffffu, starts_before)) - 1;  // lane 0 always does
    low += last * stride;
    const uint32_t rest = count - last * stride;
    count = stride < rest ? stride : rest;
  }
  return entries[low];
}

// A piece of a table that is too large for the arguments, on its way into device memory: written by a
// kernel, since a graph can capture that by value, too.
struct Upload {
  unsigned char* to;
  uint32_t bytes;  // a multiple of 8, as are the sizes of all rows
  alignas(16) unsigned char table[kLargeTable];
};

static_assert(sizeof(Hyper) % sizeof(uint64_t) == 0);

__global__ void upload_kernel(const __grid_constant__ Upload upload) {
  const auto* from = reinterpret_cast<const uint64_t*>(upload.table);
  for (uint32_t i = threadIdx.x; i < upload.bytes / sizeof(uint64_t); i += kThreads) {
    reinterpret_cast<uint64_t*>(upload.to)[i] = from[i];
  }
}

}  // namespace
}  // namespace fastclip::cuda
