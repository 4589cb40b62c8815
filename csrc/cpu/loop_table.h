// The loops of an instruction set, as the step calls them.
#pragma once

#include <array>
#include <cstdint>

#include "../step.h"

namespace fastclip::cpu {

// The numbers that a loop needs besides its tensor, in double. Each loop converts them to its compute type, as torch
// does with the scalars of an operation.
struct Constants {
  Clip<double> clip;
  alignas(double) unsigned char rule[Rules::kConstantsBytes];
  bool stochastic_rounding;
  uint32_t rounding_seed;
  uint32_t step;  // the number of this step; 0 if steps are not counted
  Norm params_norm = Norm::none;  // none: the parameters are not measured
};

// What an update tells of a chunk.
struct Updated {
  int64_t clamped = 0;  // number of elements that the value clip changed
  Measure params{};
};

// The values that a norm is taken over: raw gradients, unscaled and clipped ones, or these with inf and NaN left
// unclipped.
enum class Seen { raw, clipped, clipped_or_nonfinite };

using UpdateLoop = Updated (*)(const TensorEntry&, int64_t begin, int64_t size, const Constants&);
using MeasureLoop = void (*)(const TensorEntry&, int64_t begin, int64_t size, const Clip<double>&, Measure* of_chunks);
using ParamsLoop = Measure (*)(const TensorEntry&, int64_t begin, int64_t size, Norm);

// What a rule with kMeasuresDelta says of a set of terms: how a block is computed, and of what. Either result may be
// nullptr: it is not wanted.
template <class T>
using DeltaBlock = void (*)(const T* params, const T* grads, const T* const* states, T* added, T* relative,
                            const Constants&);
struct Delta {
  DeltaBlock<float> of_float32;  // nullptr in other rules
  DeltaBlock<double> of_float64;
  uint32_t states;
  bool reads_param;
};
using DeltaLoop = DeltaSums (*)(const TensorEntry&, int64_t begin, int64_t size, const Constants&, DeltaParts,
                                const Delta&);
using ProductsLoop = Products (*)(const TensorEntry&, int64_t begin, int64_t size, const Clip<double>&);

// The storage of a tensor's arrays: all of one dtype, those of 16 bits perhaps rounded at random; or staged. Those of
// several dtypes go through float32 block by block.
enum class Storage { float32, float64, bfloat16, float16, random_bfloat16, random_float16, staged };
constexpr int kNumStorages = 7;
constexpr bool is_random(Storage storage) {
  return storage == Storage::random_bfloat16 || storage == Storage::random_float16;
}
constexpr bool is_narrow(Storage storage) {
  return storage == Storage::bfloat16 || storage == Storage::float16 || is_random(storage);
}
inline Storage storage_of(const TensorEntry& tensor) {
  if (!tensor.uniform) return Storage::staged;
  switch (tensor.dtype) {
    case DType::float32: return Storage::float32;
    case DType::float64: return Storage::float64;
    case DType::bfloat16: return tensor.rounds_at_random ? Storage::random_bfloat16 : Storage::bfloat16;
    case DType::float16: return tensor.rounds_at_random ? Storage::random_float16 : Storage::float16;
  }
  return Storage::staged;
}

// Each rule has a row of loops, one for each value of its terms; rows lie one after the other.
constexpr int count_of_loops() {
  int count = 0;
  Rules::each([&](auto tag) { count += 1 << decltype(tag)::Rule::kSwitches; });
  return count;
}
constexpr auto kFirstLoop = [] {
  std::array<int, Rules::kCount> firsts{};
  int rule = 0, next = 0;
  Rules::each([&](auto tag) {
    firsts[rule++] = next;
    next += 1 << decltype(tag)::Rule::kSwitches;
  });
  return firsts;
}();

struct LoopTable {
  UpdateLoop updates[kNumStorages][count_of_loops()];
  MeasureLoop measures[kNumDTypes][2][3];  // by dtype, inf norm or not, Seen
  ParamsLoop params[2];  // float64 or not
  ProductsLoop products[2];
  DeltaLoop deltas[2];
  Delta delta[count_of_loops()];

  UpdateLoop update(Rules::Id rule, const TensorEntry& tensor, Terms terms) const {
    return updates[static_cast<int>(storage_of(tensor))][kFirstLoop[rule.index()] + terms];
  }
  const Delta& delta_of(Rules::Id rule, Terms terms) const { return delta[kFirstLoop[rule.index()] + terms]; }
};

// Of each instruction set, which is compiled in a file of its own: beside each other, and one by smaller loops.
const LoopTable& avx512_loops();
const LoopTable& avx2_loops();
const LoopTable& baseline_loops();

}  // namespace fastclip::cpu
