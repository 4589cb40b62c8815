// A step on a GPU: the table of its tensors, the shape of its grid, and the launch.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.cuh"

namespace fastclip::cuda {
namespace {

// ---- the table -----------------------------------------------------------------------------------

bool has_several_dtypes(const TensorEntry& tensor) {
  bool one = tensor.grad_dtype == tensor.dtype && !tensor.rounded;
  for (int s = 0; s < kMaxStates; ++s) one &= !tensor.states[s] || tensor.state_dtypes[s] == tensor.dtype;
  return !one;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

// Returns the number of elements before all arrays of a tensor are aligned. 0 if they are, or cannot be at the same
// element.
int64_t unaligned_head(const TensorEntry& tensor) {
  if (tensor.scales || has_several_dtypes(tensor)) return 0;
  const auto behind = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes; };
  const uintptr_t grad = behind(tensor.grad ? tensor.grad : tensor.param);
  if (grad == 0 || grad % item_size(tensor.dtype) != 0) return 0;
  if (behind(tensor.param) != grad) return 0;
  for (const void* state : tensor.states) {
    if (state && behind(state) != grad) return 0;
  }
  const auto head = static_cast<int64_t>(kPackBytes - grad) / item_size(tensor.dtype);
  return head < tensor.numel ? head : 0;
}

// Calls body(tensor, first element, number of elements) for each entry. A tensor is one entry, or two: a view into a
// flat buffer may have an unaligned head, and an aligned rest.
template <class Body>
void for_each_entry(const Step& step, const Body& body) {
  for (const TensorEntry& tensor : step.tensors) {
    const int64_t head = unaligned_head(tensor);
    if (head > 0) body(tensor, 0, head);
    body(tensor, head, tensor.numel - head);
  }
}

// Returns whether all arrays have one dtype, and none is rounded at random.
bool is_simple(const TensorEntry& tensor) { return tensor.uniform && !tensor.rounds_at_random; }

// Writes an entry field by field, in place: a copy of a whole entry would wait for the bytes just written.
template <class K, DTypes kDTypes>
void write_entry(const TensorEntry& tensor, int64_t begin, int64_t numel, uint32_t first_tile,
                 Entry<K, kDTypes>& entry) {
  const auto at = [begin](void* base, DType dtype) -> void* {
    return base ? static_cast<char*>(base) + begin * item_size(dtype) : nullptr;
  };
  entry.param = at(tensor.param, tensor.dtype);
  entry.grad = at(tensor.grad, tensor.grad_dtype);
  entry.numel = numel;
  entry.first_tile = first_tile;
  entry.hyper = static_cast<uint16_t>(tensor.hyper);
  entry.dtype = tensor.dtype;
  entry.aligned = is_aligned(entry.param) && is_aligned(entry.grad);
  entry.first_of_tensor = begin == 0;
  entry.is_first = tensor.is_first;
  entry.step_is_float64 = tensor.step_is_float64;
  entry.scalar_is_float64 = tensor.scalar_is_float64;
  entry.param_is_measured = tensor.param_is_measured;
  entry.unused = 0;
  for (int s = 0; s < K::kStates; ++s) {
    entry.states[s] = at(tensor.states[s], tensor.state_dtypes[s]);
    entry.aligned = entry.aligned && is_aligned(entry.states[s]);
  }
  if constexpr (kTakesCodes<K, kDTypes>) {
    for (int s = 0; s < K::kStates; ++s) entry.scales[s] = tensor.scales ? tensor.scales->of[s] : nullptr;
  }
  if constexpr (kCounts<K, kDTypes>) entry.step = tensor.step;
  if constexpr (K::Rule::kScalar.name != nullptr) entry.scalar = tensor.scalar;
  if constexpr (kMixed<K, kDTypes>) {
    entry.rounded = at(tensor.rounded, tensor.rounded_dtype);
    entry.aligned = entry.aligned && is_aligned(entry.rounded);
    entry.index = tensor.index;
    entry.head = static_cast<uint8_t>(begin);
    entry.grad_dtype = tensor.grad_dtype;
    for (int s = 0; s < K::kStates; ++s) entry.state_dtypes[s] = tensor.state_dtypes[s];
    entry.rounded_dtype = tensor.rounded_dtype;
  }
}

// Returns the largest number of state arrays among the tensors of a step.
int states_of(const Step& step) {
  int states = 0;
  for (const TensorEntry& tensor : step.tensors) {
    for (int s = states; s < kMaxStates; ++s) {
      if (tensor.states[s]) states = s + 1;
    }
  }
  return states;
}

// Returns what a kernel has to know for a step.
DTypes dtypes_of(const Step& step) {
  const DType first = step.tensors.empty() ? DType::float32 : step.tensors.front().dtype;
  bool one = true, uniform = true, float64 = false;
  for (const TensorEntry& tensor : step.tensors) {
    one &= tensor.dtype == first;
    uniform &= is_simple(tensor);
    float64 |= tensor.dtype == DType::float64;
  }
  if (uniform && one && first == DType::float32) return DTypes::float32;
  if (uniform && one && first == DType::bfloat16) return DTypes::bfloat16;
  return float64 ? DTypes::any : DTypes::mixed;
}

template <DTypes kDTypes>
using DTypesTag = std::integral_constant<DTypes, kDTypes>;

// Calls body(kernel, dtypes), with both as types: the kernel that knows these dtypes, and the fewest others.
template <class K, class Body>
auto with_dtypes(DTypes dtypes, const Body& body) {
  if constexpr (kHasUniform<K>) {
    if (dtypes == DTypes::float32) return body(K{}, DTypesTag<DTypes::float32>{});
    if (dtypes == DTypes::bfloat16) return body(K{}, DTypesTag<DTypes::bfloat16>{});
  }
  if constexpr (!kHasFloat64<K>) {
    return body(K{}, DTypesTag<DTypes::mixed>{});
  } else {
    if constexpr (kMixed<K, DTypes::mixed>) {
      if (dtypes != DTypes::any) return body(K{}, DTypesTag<DTypes::mixed>{});
    }
    return body(K{}, DTypesTag<DTypes::any>{});
  }
}

// What a step's kernel is chosen by.
struct Choice {
  Rules::Id rule;
  int states = 0;  // the largest number of state arrays of a tensor
  DTypes dtypes = DTypes::any;
  Beside beside = Beside::nothing;
};

Beside beside_of(const Step& step) {
  if (needs_products(step.rule)) return Beside::products;
  if (step.measures_deltas) return Beside::deltas;
  return step.limits.measures_change || !step.segment_changes.empty() ? Beside::change : Beside::nothing;
}

// A rule's largest kernel measures the most, and is the one for float64. A common rule has it without that, too.
template <class R, size_t kKernel, class Body>
auto with_kernel_from(const Choice& choice, const Body& body) {
  constexpr int kStates = R::kKernels[kKernel];
  constexpr bool kIsLargest = kKernel + 1 == std::size(R::kKernels);
  if constexpr (!kIsLargest || (R::kIsCommon && kMost<R> != Beside::nothing)) {
    if (choice.states <= kStates && choice.beside == Beside::nothing && choice.dtypes != DTypes::any) {
      return with_dtypes<Kernel<R, kStates, Beside::nothing>>(choice.dtypes, body);
    }
  }
  if constexpr (kIsLargest) {
    return with_dtypes<Kernel<R, kStates, kMost<R>>>(choice.dtypes, body);
  } else {
    return with_kernel_from<R, kKernel + 1>(choice, body);
  }
}

template <class Body>
auto with_kernel(const Choice& choice, const Body& body) {
  return Rules::visit(choice.rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    static_assert(R::kKernels[std::size(R::kKernels) - 1] == R::kStates.size(), "some tensors would have no kernel");
    return with_kernel_from<R, 0>(choice, body);
  });
}

struct Layout {
  Choice choice;
  int64_t entries = 0;
  int64_t tiles = 0;
  int tile_bits = 10;  // a tile has 2^tile_bits elements: divisions would take half of the host's time here
  int32_t item_bytes = 0;  // bytes per element of the widest gradient
  int64_t table_bytes = 0;
  uint64_t places = 0;  // a hash of where each entry's tiles are
  std::vector<SegmentRow> segments{};  // and one more
  std::vector<uint32_t> segments_by_block{};
  bool segments_are_tensors = false;
  std::vector<TensorRow> tensors{};  // the same
  std::vector<GroupRow> groups{};
  std::vector<uint32_t> tensors_by_block{};
  int64_t tensors_at = 0;  // in the table

  int32_t tile() const { return 1 << tile_bits; }
  int64_t tiles_of(int64_t numel) const { return (numel + tile() - 1) >> tile_bits; }
};

// Lists those rows whose tiles no warp sums.
template <class Row>
std::vector<uint32_t> by_block(const std::vector<Row>& rows) {
  std::vector<uint32_t> found;
  for (uint32_t i = 0; i + 1 < rows.size(); ++i) {
    const uint32_t tiles = rows[i + 1].first_tile - rows[i].first_tile;
    if (tiles == 0 || tiles > kTilesOfWarp) found.push_back(i);
  }
  return found;
}

// Makes room in the table, in whole words.
void add_bytes(Layout& layout, size_t bytes) {
  layout.table_bytes += static_cast<int64_t>((bytes + sizeof(uint64_t) - 1) & -sizeof(uint64_t));
}

// Returns the first tile of each tensor, and their entries; and one more.
std::vector<TensorRow> rows_of_tensors(const Step& step, const Layout& layout) {
  std::vector<TensorRow> rows;
  uint32_t tile = 0, entry = 0, segment = 0;
  for_each_entry(step, [&](const TensorEntry&, int64_t begin, int64_t numel) {
    if (begin == 0) {
      const size_t tensor = rows.size();
      while (segment + 1 < step.segments.size() && step.segments[segment + 1].first_tensor <= tensor) ++segment;
      rows.push_back({tile, entry, segment, 0});
    }
    tile += static_cast<uint32_t>(layout.tiles_of(numel));
    ++entry;
  });
  rows.push_back({tile, entry, 0, 0});
  return rows;
}

// Finds the tiles of each segment.
void add_segments(const Step& step, const std::vector<TensorRow>& tensors, Layout& layout) {
  layout.segments_are_tensors = true;
  const auto count = static_cast<uint32_t>(step.tensors.size());
  for (size_t i = 0; i < step.segments.size(); ++i) {
    const Segment& segment = step.segments[i];
    const uint32_t first = segment.first_tensor;
    layout.segments_are_tensors &= end_of_segment(step, i) - first < 2;
    layout.segments.push_back({segment.history, smallest_norm_of(step, i), tensors[first].first_tile, first,
                               segment.group, segment.number,
                               first < count ? static_cast<uint32_t>(step.tensors[first].hyper) : 0, 0});
  }
  layout.segments.push_back({nullptr, 0, tensors.back().first_tile, count, 0, 0, 0, 0});
  layout.segments_by_block = by_block(layout.segments);
  add_bytes(layout, layout.segments.size() * sizeof(SegmentRow) + step.segment_limits.size() * sizeof(NormLimit) +
                        step.segment_changes.size() * sizeof(ChangeLimits) +
                        layout.segments_by_block.size() * sizeof(uint32_t));
}

void add_tensors(const Step& step, std::vector<TensorRow> tensors, Layout& layout) {
  layout.tensors = std::move(tensors);
  layout.tensors_by_block = by_block(layout.tensors);
  for (ModelNorms* norms : step.model_norms) layout.groups.push_back({norms, 0, 0});
  for (uint32_t i = 0; i + 1 < layout.tensors.size() && !layout.groups.empty(); ++i) {
    GroupRow& group = layout.groups[step.segments[layout.tensors[i].segment].group];
    if (group.end_tensor == 0) group.first_tensor = i;
    group.end_tensor = i + 1;
  }
  layout.tensors_at = layout.table_bytes;
  add_bytes(layout, layout.tensors.size() * sizeof(TensorRow) + layout.groups.size() * sizeof(GroupRow) +
                        layout.tensors_by_block.size() * sizeof(uint32_t));
}

// Chooses the tile's size. Small tiles keep a whole GPU busy with a small model. The last block adds up one sum per
// tile, so a large model gets larger tiles. The size depends on the model alone, and so does the order of the sums.
Layout layout_of(const Step& step) {
  constexpr int64_t kManyTiles = 1 << 15;
  constexpr int kLargestTileBits = 14;
  Layout layout{{step.rule, states_of(step), dtypes_of(step), beside_of(step)}};
  // Those that the kernel knows, which may be more.
  layout.choice.dtypes = with_kernel(layout.choice, [](auto, auto dtypes) { return decltype(dtypes)::value; });
  const bool narrow = std::all_of(step.tensors.begin(), step.tensors.end(),
                                  [](const TensorEntry& tensor) { return item_size(tensor.grad_dtype) == 2; });
  if (narrow) ++layout.tile_bits;  // as many bytes
  while (layout.tile_bits < kLargestTileBits && step.elements >> layout.tile_bits > kManyTiles) ++layout.tile_bits;
  layout.places = static_cast<uint64_t>(layout.tile_bits);
  for_each_entry(step, [&](const TensorEntry& tensor, int64_t, int64_t numel) {
    ++layout.entries;
    layout.places = (layout.places ^ static_cast<uint64_t>(numel)) * 0x9e3779b97f4a7c15u;
    layout.tiles += layout.tiles_of(numel);
    layout.item_bytes = std::max(layout.item_bytes, item_size(tensor.grad_dtype));
  });
  const size_t entry_bytes = with_kernel(
      layout.choice, [](auto kernel, auto dtypes) { return sizeof(Entry<decltype(kernel), decltype(dtypes)::value>); });
  layout.table_bytes = static_cast<int64_t>(step.hypers.size() * sizeof(Hyper) + layout.entries * entry_bytes);
  const bool measures_tensors = layout.choice.beside == Beside::deltas || layout.choice.beside == Beside::products;
  if (step.segments.empty() && !measures_tensors) return layout;
  std::vector<TensorRow> tensors = rows_of_tensors(step, layout);
  if (!step.segments.empty()) add_segments(step, tensors, layout);
  if (measures_tensors) add_tensors(step, std::move(tensors), layout);
  return layout;
}

void write_table(const Step& step, const Layout& layout, unsigned char* bytes) {
  auto* hypers = reinterpret_cast<Hyper*>(bytes);
  std::copy(step.hypers.begin(), step.hypers.end(), hypers);
  with_kernel(layout.choice, [&](auto kernel, auto dtypes) {
    auto* entry = reinterpret_cast<Entry<decltype(kernel), decltype(dtypes)::value>*>(hypers + step.hypers.size());
    uint32_t tiles = 0;
    for_each_entry(step, [&](const TensorEntry& tensor, int64_t begin, int64_t numel) {
      write_entry(tensor, begin, numel, tiles, *entry++);
      tiles += static_cast<uint32_t>(layout.tiles_of(numel));
    });
    auto* behind = reinterpret_cast<unsigned char*>(entry);
    const auto write = [&](const auto& rows) {
      if (!rows.empty()) std::memcpy(behind, rows.data(), rows.size() * sizeof(rows[0]));
      behind += rows.size() * sizeof(rows[0]);
    };
    if (!layout.segments.empty()) {
      write(layout.segments);
      write(step.segment_limits);
      write(step.segment_changes);
      write(layout.segments_by_block);
    }
    if (layout.tensors.empty()) return;
    behind = bytes + layout.tensors_at;
    write(layout.tensors);
    write(layout.groups);
    write(layout.tensors_by_block);
  });
}

// ---- the launch ----------------------------------------------------------------------------------

// The number of blocks of a kernel that a device runs at once, and the shared memory that each block can have.
struct Room {
  int blocks = 0;
  int shared_bytes = 0;
  int cooperative = 0;
};

template <auto kKernel>
cudaError_t ask_for_room(int device, Room& room) {
  int per_multiprocessor = 0, multiprocessors = 0, shared = 0, reserved = 0, per_block = 0;
  for (const cudaError_t error : {
           cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kKernel, kThreads, sizeof(Shared)),
           cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
           cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
           cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device),
           cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
           cudaDeviceGetAttribute(&room.cooperative, cudaDevAttrCooperativeLaunch, device),
       }) {
    if (error != cudaSuccess) return error;
  }
  if (per_multiprocessor == 0) return cudaErrorLaunchOutOfResources;
  constexpr int kGranularity = 1024;
  room.shared_bytes = std::min(shared / per_multiprocessor - reserved, per_block) & -kGranularity;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.shared_bytes);
  if (error != cudaSuccess) return error;
  room.blocks = per_multiprocessor * multiprocessors;
  return cudaSuccess;
}

// Returns a kernel's room on a device. Asks the device once.
template <auto kKernel>
cudaError_t room_of(int device, Room& room) {
  static std::mutex mutex;
  static std::vector<Room> rooms;
  const std::lock_guard<std::mutex> lock(mutex);
  if (rooms.size() <= static_cast<size_t>(device)) rooms.resize(device + 1);
  const cudaError_t error = rooms[device].blocks == 0 ? ask_for_room<kKernel>(device, rooms[device]) : cudaSuccess;
  room = rooms[device];
  return error;
}

template <auto kKernel, class Args>
cudaError_t launch(const Layout& layout, Args& arguments, int device, cudaStream_t stream) {
  Room room;
  if (const cudaError_t error = room_of<kKernel>(device, room)) return error;
  Header& header = arguments.header;
  const dim3 blocks(
      static_cast<unsigned>(std::min<int64_t>({room.blocks, std::max<int64_t>(layout.tiles, 1), kMaxBlocks})));
  void* pointers[] = {&arguments};
  if (header.measure && header.update && room.cooperative) {
    header.slot_bytes = layout.tile() * std::max(layout.item_bytes, 1);  // of no gradients
    const int64_t rounds = std::max<int64_t>(layout.tiles - 1, 0) / (int64_t{blocks.x} * kWarps) + 1;
    header.slots = static_cast<uint32_t>(
        std::min<int64_t>(rounds * kWarps, (room.shared_bytes - int{sizeof(Shared)}) / header.slot_bytes));
    const size_t shared_bytes = sizeof(Shared) + size_t{header.slots} * header.slot_bytes;
    const cudaError_t error =
        cudaLaunchCooperativeKernel(kKernel, blocks, dim3(kThreads), pointers, shared_bytes, stream);
    // Other clients of the device, or a tool, may leave less room than the device reports.
    if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) return error;
    cudaGetLastError();
    header.slots = 0;
  }
  const auto launch_only = [&](bool measure, bool deltas, bool update) {
    header.measure = measure;
    header.measures_deltas = deltas;
    header.update = update;
    return cudaLaunchKernel(kKernel, blocks, dim3(kThreads), pointers, sizeof(Shared), stream);
  };
  if (!header.measure || !header.update) return launch_only(header.measure, false, header.update);
  const bool deltas = header.measures_deltas;
  cudaError_t error = launch_only(true, false, false);
  if (error == cudaSuccess && deltas) error = launch_only(false, true, false);
  return error == cudaSuccess ? launch_only(false, false, true) : error;
}

// Returns whether a kernel exists for the small table, too. Rarer dtypes take the longest to compile.
constexpr bool has_small_table(DTypes dtypes, Beside beside) {
  return (dtypes == DTypes::float32 || dtypes == DTypes::bfloat16) && beside == Beside::nothing;
}

template <int kTableBytes>
cudaError_t launch_with(const Layout& layout, Arguments<kTableBytes>& arguments, int device, cudaStream_t stream) {
  return with_kernel(layout.choice, [&](auto kernel, auto dtypes) {
    constexpr DTypes kDTypes = decltype(dtypes)::value;
    if constexpr (kTableBytes == kSmallTable && !has_small_table(kDTypes, decltype(kernel)::kBeside)) {
      return cudaErrorInvalidValue;
    } else {
      return launch<step_kernel<decltype(kernel), kDTypes, kTableBytes>>(layout, arguments, device, stream);
    }
  });
}

Header header_of(const Step& step, const Layout& layout) {
  Header header{};
  header.hypers = static_cast<uint32_t>(step.hypers.size());
  header.tensors = static_cast<uint32_t>(layout.entries);
  header.tiles = static_cast<uint32_t>(layout.tiles);
  header.tile = layout.tile();
  header.asked = step.asked;
  header.found_inf = step.found_inf;
  header.outcome = step.outcome;
  header.clamped = step.clamped;
  header.measures = reinterpret_cast<double*>(step.measures);
  if (step.limits.measures_change) header.change_measures = header.measures + kParts * layout.tiles;
  if (step.limits.measures_params) header.param_measures = reinterpret_cast<double*>(step.param_measures);
  header.tensor_measures = header.measures + kParts * layout.tiles;
  header.tensor_outcomes = layout.tensors.empty() ? nullptr : step.tensor_outcomes;
  header.has_unmeasured_params = step.has_unmeasured_params;
  header.levels = step.outcome ? &step.outcome->levels : nullptr;  // AMP may skip a step without a norm, too
  if (step.norm != Norm::none) {
    header.measure = step.passes != Passes::update;
    header.sums = header.measure ? &step.outcome->sums : step.sums;
    header.levels = header.measure ? &step.outcome->levels : step.levels;
    header.parts = header.measure ? 1 : step.parts;
  }
  header.segments = static_cast<uint32_t>(step.segments.size());
  header.groups = static_cast<uint32_t>(step.segment_limits.size());
  header.segments_by_block = static_cast<uint32_t>(layout.segments_by_block.size());
  header.limits_segments = !step.segment_changes.empty();
  header.segments_are_tensors = layout.segments_are_tensors;
  header.tensor_rows = static_cast<uint32_t>(layout.tensors.empty() ? 0 : layout.tensors.size() - 1);
  header.tensors_by_block = static_cast<uint32_t>(layout.tensors_by_block.size());
  header.tensors_at = static_cast<uint32_t>(layout.tensors_at);
  header.deltas_at_once = measures_deltas_at_once(step);
  header.measures_deltas = step.measures_deltas && !header.deltas_at_once && header.measure;
  header.segment_outcomes = step.segment_outcomes;
  header.segment_totals = header.measure ? step.segment_outcomes : step.segment_totals;
  header.clip_history = step.clip_history;
  header.skip_history = step.skip_history;
  header.update = step.passes != Passes::measure;
  header.norm = step.norm;
  header.skip_nonfinite = step.skip_nonfinite;
  header.counts_skips = step.counts_skips;
  header.has_step_counts = step.has_step_counts;
  header.limits = step.limits;
  return header;
}

// Uploads a table into device memory, if it has changed.
cudaError_t upload(std::vector<unsigned char> bytes, DeviceTable& table, cudaStream_t stream) {
  if (bytes == table.uploaded) return cudaSuccess;
  table.uploaded.clear();
  for (size_t done = 0; done < bytes.size(); done += kLargeTable) {
    Upload piece;
    piece.to = static_cast<unsigned char*>(table.memory) + done;
    piece.bytes = static_cast<uint32_t>(std::min<size_t>(kLargeTable, bytes.size() - done));
    std::memcpy(piece.table, bytes.data() + done, piece.bytes);
    void* pointers[] = {&piece};
    const cudaError_t error = cudaLaunchKernel(upload_kernel, dim3(1), dim3(kThreads), pointers, 0, stream);
    if (error != cudaSuccess) return error;
  }
  table.uploaded = std::move(bytes);
  return cudaSuccess;
}

template <int kTableBytes>
cudaError_t run_with(const Step& step, const Layout& layout, DeviceTable& table, int device, cudaStream_t stream) {
  Arguments<kTableBytes> arguments;
  arguments.header = header_of(step, layout);
  if (layout.table_bytes <= kTableBytes) {
    write_table(step, layout, arguments.table);
  } else {
    std::vector<unsigned char> bytes(layout.table_bytes);
    write_table(step, layout, bytes.data());
    if (const cudaError_t error = upload(std::move(bytes), table, stream)) return error;
    arguments.header.table = static_cast<const unsigned char*>(table.memory);
  }
  return launch_with(layout, arguments, device, stream);
}

cudaError_t run_on_current_device(const Step& step, DeviceTable& table, int device, cudaStream_t stream) {
  const Layout layout = layout_of(step);
  const bool fits_large = layout.table_bytes > kSmallTable && layout.table_bytes <= kLargeTable;
  const bool has_small = has_small_table(layout.choice.dtypes, layout.choice.beside);
  return fits_large || !has_small ? run_with<kLargeTable>(step, layout, table, device, stream)
                                  : run_with<kSmallTable>(step, layout, table, device, stream);
}

}  // namespace

Needs needs(const Step& step) {
  const Layout layout = layout_of(step);
  const int sums = with_kernel(layout.choice, [](auto kernel, auto) {
    return std::max<int>(decltype(kernel)::kSums, decltype(kernel)::kLimitsChange);
  });
  return {(1 + sums) * layout.tiles, static_cast<int64_t>(step.tensors.size()), layout.tiles,
          layout.places | uint64_t{1} << 63, layout.table_bytes > kLargeTable ? layout.table_bytes : 0};
}

std::vector<Measure> measures_by_tensor(const Step& step, const double* measures) {
  const Layout layout = layout_of(step);
  const double* const medium = measures;
  const double* const small = medium + layout.tiles;
  const double* const big = small + layout.tiles;
  const bool wide = layout.choice.dtypes == DTypes::any;  // only its kernels write all parts
  std::vector<Measure> sums;
  int64_t tile = 0;
  for_each_entry(step, [&](const TensorEntry&, int64_t begin, int64_t numel) {
    Measure& sum = begin == 0 ? sums.emplace_back() : sums.back();
    for (const int64_t end = tile + layout.tiles_of(numel); tile < end; ++tile) {
      combine(step.norm, sum, {wide ? small[tile] : 0, medium[tile], wide ? big[tile] : 0});
    }
  });
  return sums;
}

bool takes_codes(const Step& step, bool measures_more) {
  const auto is_float64 = [](const TensorEntry& tensor) { return tensor.dtype == DType::float64; };
  if (measures_more || std::any_of(step.tensors.begin(), step.tensors.end(), is_float64)) return false;
  return Rules::visit(step.rule,
                      [&](auto tag) { return states_of(step) <= states_in_codes<typename decltype(tag)::Rule>(); });
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

const char* run(const Step& step, DeviceTable& table, int device, void* stream) {
  if (step.hypers.size() > UINT16_MAX) return "more than 65,535 groups";
  const cudaError_t error = run_on_current_device(step, table, device, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, which is reported here: no later call finds it
  return cudaGetErrorString(error);
}

}  // namespace fastclip::cuda
