// A step on a GPU: the table of its tensors, the shape of its grid, and the launch.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "kernels_cuda.cuh"

namespace fastclip::cuda {
namespace {

// ---- the table -----------------------------------------------------------------------------------

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

// Elements before all arrays of a tensor are aligned; 0 where they are, or can't be together.
int64_t unaligned_head(const TensorEntry& tensor) {
  const auto behind = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes; };
  const uintptr_t grad = behind(tensor.grad);
  if (grad == 0 || grad % item_size(tensor.dtype) != 0) return 0;
  if (tensor.param && behind(tensor.param) != grad) return 0;
  if (tensor.momentum_buffer && behind(tensor.momentum_buffer) != grad) return 0;
  const auto head = static_cast<int64_t>(kPackBytes - grad) / item_size(tensor.dtype);
  return head < tensor.numel ? head : 0;
}

// Calls body(tensor, first element, number of elements) for what becomes an entry: a tensor, or the head
// and the aligned rest of one, as of a view into a flat buffer.
template <class Body>
void for_each_entry(const Step& step, const Body& body) {
  for (const TensorEntry& tensor : step.tensors) {
    const int64_t head = unaligned_head(tensor);
    if (head > 0) body(tensor, 0, head);
    body(tensor, head, tensor.numel - head);
  }
}

// Field by field in place: a whole entry, copied right after its bytes were written, waits for them.
void write_entry(const TensorEntry& tensor, int64_t begin, int64_t numel, uint32_t first_tile, Entry& entry) {
  const int64_t offset = begin * item_size(tensor.dtype);
  const auto at = [offset](void* base) -> void* { return base ? static_cast<char*>(base) + offset : nullptr; };
  entry.param = at(tensor.param);
  entry.grad = at(tensor.grad);
  entry.momentum_buffer = at(tensor.momentum_buffer);
  entry.numel = numel;
  entry.first_tile = first_tile;
  entry.hyper = static_cast<uint16_t>(tensor.hyper);
  entry.dtype = tensor.dtype;
  entry.momentum = tensor.momentum;
  entry.aligned = is_aligned(entry.param) && is_aligned(entry.grad) && is_aligned(entry.momentum_buffer);
  entry.unused = 0;
}

struct Layout {
  int64_t entries = 0;
  int64_t tiles = 0;
  int tile_bits = 10;      // a tile has 2^tile_bits elements: divisions would be half of the host's work here
  int32_t item_bytes = 0;  // of the widest dtype
  int64_t table_bytes = 0;

  int32_t tile() const { return 1 << tile_bits; }
  int64_t tiles_of(int64_t numel) const { return (numel + tile() - 1) >> tile_bits; }
};

// Small tiles keep all of a GPU busy with a small model; the last block adds up one sum per tile, so a large
// model gets larger ones. Depends on the model alone, and with it the order of the sums.
Layout layout_of(const Step& step) {
  constexpr int64_t kManyTiles = 1 << 15;
  constexpr int kLargestTileBits = 14;
  Layout layout;
  while (layout.tile_bits < kLargestTileBits && step.elements >> layout.tile_bits > kManyTiles) ++layout.tile_bits;
  for_each_entry(step, [&](const TensorEntry& tensor, int64_t, int64_t numel) {
    ++layout.entries;
    layout.tiles += layout.tiles_of(numel);
    layout.item_bytes = std::max(layout.item_bytes, item_size(tensor.dtype));
  });
  layout.table_bytes = static_cast<int64_t>(step.hypers.size() * sizeof(Hyper) + layout.entries * sizeof(Entry));
  return layout;
}

void write_table(const Step& step, const Layout& layout, unsigned char* bytes) {
  auto* hypers = reinterpret_cast<Hyper*>(bytes);
  std::copy(step.hypers.begin(), step.hypers.end(), hypers);
  auto* entry = reinterpret_cast<Entry*>(hypers + step.hypers.size());
  uint32_t tiles = 0;
  for_each_entry(step, [&](const TensorEntry& tensor, int64_t begin, int64_t numel) {
    write_entry(tensor, begin, numel, tiles, *entry++);
    tiles += static_cast<uint32_t>(layout.tiles_of(numel));
  });
}

// ---- the launch ----------------------------------------------------------------------------------

// How many blocks of a kernel a device runs at once, and what each of them can have of its shared memory.
struct Room {
  int blocks = 0;
  int shared_bytes = 0;
  bool cooperative = false;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

template <auto kKernel>
Room ask_for_room(int device) {
  Room room;
  int per_multiprocessor = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kKernel, kThreads, sizeof(Shared));
  per_multiprocessor = std::max(1, per_multiprocessor);
  const int share = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / per_multiprocessor -
                    attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
  constexpr int kGranularity = 1024;
  room.shared_bytes = std::min(share, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) & -kGranularity;
  cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.shared_bytes);
  int with_shared = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&with_shared, kKernel, kThreads, room.shared_bytes);
  if (with_shared < per_multiprocessor) room.shared_bytes = sizeof(Shared);  // not as thought: nothing is kept
  room.blocks = per_multiprocessor * std::max(1, attribute(cudaDevAttrMultiProcessorCount, device));
  room.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  return room;
}

// Asked for once per kernel and device.
template <auto kKernel>
const Room& room_of(int device) {
  constexpr int kMaxDevices = 64;
  static Room rooms[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  std::call_once(asked[device], [device] { rooms[device] = ask_for_room<kKernel>(device); });
  return rooms[device];
}

template <auto kKernel, class Args>
void launch(const Layout& layout, Args& arguments, int device, cudaStream_t stream) {
  const Room& room = room_of<kKernel>(device);
  Header& header = arguments.header;
  const auto blocks = static_cast<int>(std::min<int64_t>(room.blocks, layout.tiles));
  const auto enqueue = [&](bool cooperative, size_t shared_bytes) {
    void* pointers[] = {&arguments};
    cooperative ? cudaLaunchCooperativeKernel(kKernel, dim3(blocks), dim3(kThreads), pointers, shared_bytes, stream)
                : cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), pointers, shared_bytes, stream);
  };
  if (!(header.measure && header.update)) return enqueue(false, sizeof(Shared));
  if (room.cooperative) {
    header.slot_bytes = layout.tile() * layout.item_bytes;
    const int64_t rounds = (layout.tiles - 1) / (int64_t{blocks} * kWarps) + 1;
    header.slots = static_cast<uint32_t>(
        std::min<int64_t>(rounds * kWarps, (room.shared_bytes - int{sizeof(Shared)}) / header.slot_bytes));
    return enqueue(true, sizeof(Shared) + size_t(header.slots) * header.slot_bytes);
  }
  header.update = false;
  enqueue(false, sizeof(Shared));
  header.update = true;
  header.measure = false;
  enqueue(false, sizeof(Shared));
}

template <DTypes kDTypes, int kTableBytes>
void launch_for(const Step& step, const Layout& layout, Arguments<kTableBytes>& arguments, int device,
                cudaStream_t stream) {
  const bool momentum = std::any_of(step.tensors.begin(), step.tensors.end(),
                                    [](const TensorEntry& t) { return t.momentum != Momentum::none; });
  if (step.rule == Rule::clip_grad) {
    launch<step_kernel<Kernel::clip_grad, kDTypes, kTableBytes>>(layout, arguments, device, stream);
  } else if (momentum) {
    launch<step_kernel<Kernel::sgd_momentum, kDTypes, kTableBytes>>(layout, arguments, device, stream);
  } else {
    launch<step_kernel<Kernel::sgd, kDTypes, kTableBytes>>(layout, arguments, device, stream);
  }
}

template <int kTableBytes>
void launch_with(const Step& step, const Layout& layout, Arguments<kTableBytes>& arguments, int device,
                 cudaStream_t stream) {
  const DType dtype = step.tensors.front().dtype;
  const bool mixed = std::any_of(step.tensors.begin(), step.tensors.end(),
                                 [dtype](const TensorEntry& t) { return t.dtype != dtype; });
  if (!mixed && dtype == DType::float32) {
    launch_for<DTypes::float32>(step, layout, arguments, device, stream);
  } else if (!mixed && dtype == DType::bfloat16) {
    launch_for<DTypes::bfloat16>(step, layout, arguments, device, stream);
  } else {
    launch_for<DTypes::any>(step, layout, arguments, device, stream);
  }
}

Header header_of(const Step& step, const Layout& layout) {
  Header header{};
  header.hypers = static_cast<uint32_t>(step.hypers.size());
  header.tensors = static_cast<uint32_t>(layout.entries);
  header.tiles = static_cast<uint32_t>(layout.tiles);
  header.tile = layout.tile();
  header.grad_scale = step.grad_scale;
  header.found_inf = step.found_inf;
  header.outcome = step.outcome;
  header.measures = reinterpret_cast<double*>(step.measures);
  if (step.norm != Norm::none) {
    header.measure = step.passes != Passes::update;
    header.sums = header.measure ? &step.outcome->sum : step.sums;
    header.devices = header.measure ? 1 : step.devices;
  }
  header.update = step.passes != Passes::measure;
  header.norm = step.norm;
  header.skip_nonfinite = step.skip_nonfinite;
  header.counts = step.counts;
  header.max_norm = step.max_norm;
  return header;
}

void upload(const std::vector<unsigned char>& bytes, void* to, cudaStream_t stream) {
  for (size_t done = 0; done < bytes.size(); done += kLargeTable) {
    Upload piece;
    piece.to = static_cast<unsigned char*>(to) + done;
    piece.bytes = static_cast<uint32_t>(std::min<size_t>(kLargeTable, bytes.size() - done));
    std::memcpy(piece.table, bytes.data() + done, piece.bytes);
    void* pointers[] = {&piece};
    cudaLaunchKernel(upload_kernel, dim3(1), dim3(kThreads), pointers, 0, stream);
  }
}

// The device that was current, again, when this goes.
struct CurrentDevice {
  int previous = 0;
  explicit CurrentDevice(int device) {
    cudaGetDevice(&previous);
    cudaSetDevice(device);
  }
  ~CurrentDevice() { cudaSetDevice(previous); }
};

}  // namespace

Needs needs(const Step& step) {
  const Layout layout = layout_of(step);
  return {layout.tiles, layout.table_bytes > kLargeTable ? layout.table_bytes : 0};
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

const char* run(const Step& step, DeviceTable& table, int device, void* on_stream) {
  if (step.hypers.size() > UINT16_MAX) return "more than 65,535 groups";
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const CurrentDevice current(device);
  cudaGetLastError();  // not ours

  const Layout layout = layout_of(step);
  if (layout.table_bytes <= kSmallTable || layout.table_bytes > kLargeTable) {
    Arguments<kSmallTable> arguments;
    arguments.header = header_of(step, layout);
    if (layout.table_bytes <= kSmallTable) {
      write_table(step, layout, arguments.table);
    } else {
      std::vector<unsigned char> fresh(layout.table_bytes);
      write_table(step, layout, fresh.data());
      if (fresh != table.uploaded) {  // some address changed
        upload(fresh, table.memory, stream);
        table.uploaded.swap(fresh);
      }
      arguments.header.table = static_cast<const unsigned char*>(table.memory);
    }
    launch_with(step, layout, arguments, device, stream);
  } else {
    Arguments<kLargeTable> arguments;
    arguments.header = header_of(step, layout);
    write_table(step, layout, arguments.table);
    launch_with(step, layout, arguments, device, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastclip::cuda
