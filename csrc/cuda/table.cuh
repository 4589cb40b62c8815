// The arguments of a CUDA kernel: a header, the groups' hyperparameters, and one entry per tensor. Where segments have
// norms of their own, a row for each of them, the groups' limits, and a list of the segments that a block sums. Where
// more is measured of each tensor, the same for tensors.
#pragma once

#include <cuda_runtime.h>

#include "../step.h"

namespace fastclip::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // per block
constexpr int kThreads = kWarp * kWarps;
constexpr int kPackBytes = 16;  // the widest load

// The part of an entry that all kernels have. Tensors are cut into tiles of `Header::tile` elements, and a warp takes
// one tile at a time. So no warp waits for another inside a pass over memory, and work is dealt out by elements, not by
// tensors.
struct EntryHead {
  void* param;
  void* grad;  // nullptr: as in TensorEntry
  int64_t numel;
  uint32_t first_tile;
  uint16_t hyper;
  DType dtype;
  bool aligned : 1;  // all arrays start on 16 bytes, and with them every tile
  bool first_of_tensor : 1;  // the first entry of its tensor: this one counts the steps
  bool is_first : 1;  // as in TensorEntry
  bool step_is_float64 : 1;
  bool scalar_is_float64 : 1;
  bool param_is_measured : 1;  // as in TensorEntry
  uint8_t unused : 2;
};
static_assert(sizeof(EntryHead) == 32, "more tensors fit into the kernel arguments while it is small");

// Returns the length of an array that holds these states, given as bits.
constexpr int length_of(uint32_t states) {
  int length = 0;
  while (states >> length) ++length;
  return length;
}

// What a kernel measures besides the norm of gradients: for a limit on the change, see kLimitsChange in rule.h; what is
// added, see kMeasuresDelta; or products, see kNeedsProducts.
enum class Beside { nothing, change, deltas, products };

// A kernel of a rule. The kernels of one rule differ in the number of state arrays that they have registers for, and in
// what else they measure, which takes registers, too.
template <class R, int kStateArrays, Beside kMeasured>
struct Kernel {
  using Rule = R;
  static constexpr Beside kBeside = kMeasured;
  static constexpr bool kLimitsChange = kBeside == Beside::change;
  static constexpr bool kMeasuresDelta = kBeside == Beside::deltas;
  static constexpr bool kMeasuresProducts = kBeside == Beside::products;
  static constexpr bool kMeasuresTensors = kMeasuresDelta || kMeasuresProducts;
  static constexpr int kSums = kMeasuresDelta ? 3 : kMeasuresProducts ? 2 : 0;  // of TensorOutcome
  static constexpr bool kHasUnstepped = kLimitsChange || kMeasuresDelta;  // tensors without a gradient
  static constexpr int kStates = kStateArrays;
  static constexpr int kRoom = kStates > 0 ? kStates : 1;  // the length of an array of states

  // The switches that can be on in a tensor with no more than kStates arrays.
  static constexpr Terms kPossible = [] {
    Terms possible = 0;
    for (Terms terms = 0; terms < 1u << R::kSwitches; ++terms) {
      if (length_of(R::writes(terms)) <= kStates) possible |= terms;
    }
    return possible;
  }();
};

// The dtypes that a kernel knows. float32 and bfloat16 are the dtypes that models are trained in: the common rules have
// kernels for them. `mixed` is all that is computed in float32: float16, several dtypes, or a mixture within a tensor.
// `any` is a step with float64, which needs more registers: each rule has one such kernel. What `mixed` and `any`
// compute in float32, they take as mixtures. A rule that clips in place sees one array, which is none.
enum class DTypes { float32, bfloat16, mixed, any };
// Whether a kernel exists for float32 alone, and for bfloat16.
template <class K>
constexpr bool kHasUniform = K::Rule::kIsCommon && !K::kMeasuresTensors;
// The most that a rule measures. The kernel that does, with all states, is the one for float64.
template <class R>
constexpr Beside kMost = R::kNeedsProducts   ? Beside::products
                         : R::kMeasuresDelta ? Beside::deltas
                         : R::kLimitsChange  ? Beside::change
                                             : Beside::nothing;
template <class K>
constexpr bool kHasFloat64 = K::kStates == int{K::Rule::kStates.size()} && K::kBeside == kMost<typename K::Rule>;
template <class K, DTypes kDTypes>
constexpr bool kMixed = !K::Rule::kClipsInPlace && (kDTypes == DTypes::mixed || kDTypes == DTypes::any);
// Whether a measure has three parts: those of float32 have one.
template <DTypes kDTypes>
constexpr bool kWide = kDTypes == DTypes::any;

// Returns the number of state arrays of the one kernel of a rule that takes states in 8 bits: its smallest with states.
template <class R>
constexpr int states_in_codes() {
  for (const int states : R::kKernels) {
    if (states > 0) return states;
  }
  return 0;
}
template <class K, DTypes kDTypes>
constexpr bool kTakesCodes = K::Rule::kQuantizesStates && K::kBeside == Beside::nothing &&
                             K::kStates == states_in_codes<typename K::Rule>() && kDTypes == DTypes::mixed;
template <class K, DTypes kDTypes>
constexpr bool kCounts = K::Rule::kCountsSteps || kMixed<K, kDTypes>;

// The parts of an entry that not all kernels have: state arrays, a count of steps, a scalar, and dtypes that may differ
// within a tensor.
template <int kRoom>
struct StatesPart {
  void* states[kRoom];
};
template <bool kCounts>
struct CountPart {
  void* step;
};
template <>
struct CountPart<false> {
  static constexpr void* step = nullptr;
};
template <bool kHasScalar>
struct ScalarPart {
  void* scalar;
};
template <>
struct ScalarPart<false> {
  static constexpr void* scalar = nullptr;
};
template <bool kMixed, int kRoom>
struct MixedPart {
  void* rounded;
  uint32_t index;
  uint8_t head;  // number of the tensor's elements before this entry
  DType grad_dtype;
  DType state_dtypes[kRoom];
  DType rounded_dtype;
};
template <int kRoom>
struct MixedPart<false, kRoom> {};

template <bool kCodes, int kRoom>
struct ScalesPart {
  float* scales[kRoom];  // nullptr where the states are numbers
};
template <int kRoom>
struct ScalesPart<false, kRoom> {};

template <class K, DTypes kDTypes>
struct Entry : EntryHead,
               StatesPart<K::kRoom>,
               CountPart<kCounts<K, kDTypes>>,
               ScalarPart<K::Rule::kScalar.name != nullptr>,
               ScalesPart<kTakesCodes<K, kDTypes>, K::kRoom>,
               MixedPart<kMixed<K, kDTypes>, K::kRoom> {};

template <class K, DTypes kDTypes>
__device__ __forceinline__ DType grad_dtype_of(const Entry<K, kDTypes>& entry) {
  if constexpr (kMixed<K, kDTypes>) return entry.grad_dtype;
  return entry.dtype;
}

// A segment: its tiles and tensors begin here, and end where those of the next one begin. One more row stands behind
// the last.
struct SegmentRow {
  History* history;  // as in Segment
  double smallest_norm;  // of its parameters, as in Limits
  uint32_t first_tile;
  uint32_t first_tensor;
  uint32_t group;
  uint32_t number;  // as in Segment
  uint32_t hyper;  // that of its first tensor
  uint32_t unused;
};

// A tensor of which more is measured, in the same way.
struct TensorRow {
  uint32_t first_tile;
  uint32_t first_entry;
  uint32_t segment;
  uint32_t unused;
};

// The tensors of a group, and what the clip that their rule has of its own remembers; nullptr without one.
struct GroupRow {
  ModelNorms* norms;
  uint32_t first_tensor;
  uint32_t end_tensor;
};

// A warp sums the tiles of a segment, or a tensor, with up to this many: each lane loads 8 at a time, four times.
constexpr uint32_t kTilesOfWarp = 1024;

struct Header {
  const unsigned char* table;  // in device memory, or nullptr: it follows the header
  uint32_t hypers;
  uint32_t tensors;
  uint32_t tiles;
  int32_t tile;  // elements
  uint32_t slots;  // number of tiles that a block can keep in its shared memory between the passes
  int32_t slot_bytes;  // the size of a slot
  Asked asked;
  const float* found_inf;
  Outcome* outcome;
  double* clamped;  // one count per block
  double* measures;  // three per tile: all `medium`, then all `small`, then all `big`
  double* change_measures;  // the same, of the change that the gradients make; nullptr without a limit on it
  double* param_measures;  // the same, of the parameters; nullptr if their norm does not count
  double* tensor_measures;  // the same, for each of the sums in TensorOutcome
  SegmentOutcome* segment_outcomes;
  const SegmentOutcome* segment_totals;  // those outcomes, or as in Step
  TensorOutcome* tensor_outcomes;  // nullptr where no more is measured of tensors
  uint32_t segments;  // 0 without norms of segments
  uint32_t groups;  // number of limits
  uint32_t segments_by_block;  // the number of those that a block sums
  uint32_t tensor_rows;
  uint32_t tensors_by_block;
  uint32_t tensors_at;  // where their rows are in the table, in bytes
  const Sums* sums;  // one per part of the step; nullptr without a norm
  const Levels* levels;  // of the rules among the limits
  History* clip_history;  // as in Step
  History* skip_history;
  int32_t parts;
  Norm norm;
  bool measure;  // whether this launch measures
  bool measures_deltas;  // whether it measures what is added, in a pass of its own
  bool update;  // whether it updates
  bool deltas_at_once;  // what is added is measured beside the gradients
  bool limits_segments;  // segments have limits on their change
  bool segments_are_tensors;  // none has several
  bool skip_nonfinite;
  bool counts_skips;
  bool has_step_counts;
  bool has_unmeasured_params;
  Limits limits;
};

// Sizes of a table that is a kernel argument. There it needs no copy and no lifetime, and a CUDA graph captures it by
// value. Arguments may have 32,764 bytes since CUDA 12.1.
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

template <class K, DTypes kDTypes>
struct Table {
  const Hyper* hypers;
  const Entry<K, kDTypes>* entries;
};

template <class K, DTypes kDTypes, int kTableBytes>
__device__ __forceinline__ Table<K, kDTypes> table_of(const Arguments<kTableBytes>& arguments) {
  const unsigned char* bytes = arguments.header.table ? arguments.header.table : arguments.table;
  const auto* hypers = reinterpret_cast<const Hyper*>(bytes);
  return {hypers, reinterpret_cast<const Entry<K, kDTypes>*>(hypers + arguments.header.hypers)};
}

// Finds the last entry that starts at or before a tile. The lanes of a warp look together, at 32 places at once.
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

// A piece of a table that is too large for the arguments, on its way into device memory. A kernel writes it there: a
// graph captures the kernel's argument by value, too.
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
