// Updates one tile of a tensor whose states are in 8 bits, by one warp of a GPU.
#pragma once

#include "mixed.cuh"

namespace fastclip::cuda {
namespace {

// Elements of a block that a lane takes: in whole aligned blocks, words of kElements beside those of the other lanes;
// in others, single elements.
constexpr int kOfLane = kStateBlock / kWarp;

// The states with a sign, as bits.
template <class R>
constexpr uint32_t kIsSigned = [] {
  uint32_t bits = 0;
  for (size_t s = 0; s < R::kStates.size(); ++s) bits |= uint32_t{R::kStates[s].is_momentum} << s;
  return bits;
}();

// Returns the largest magnitude of all lanes, as bits: those of a NaN are larger than those of any number.
__device__ __forceinline__ uint32_t largest_in_warp(uint32_t bits) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, bits, offset);
    bits = other > bits ? other : bits;
  }
  return bits;
}

template <class K, class OneEntry>
__device__ __noinline__ UpdatedBy<K, float> update_codes_tile(const Header& header, const Hyper& hyper,
                                                              const OneEntry& entry, int64_t begin, int size,
                                                              FactorsOf<K> factors, const uint4* slot) {
  using R = typename K::Rule;
  constexpr int kStates = K::kStates, kRoom = K::kRoom;
  const Clip<float> clip = clip_of<float>(hyper, header.asked, factors);
  const auto constants = constants_of<K, float>(hyper, entry, factors);
  const Terms terms = possible_terms<K>(hyper, entry);
  const uint32_t reads = R::reads(terms), writes = R::writes(terms);
  uint32_t key = 0;
  if (hyper.stochastic_rounding) {
    const auto count = static_cast<uint32_t>(static_cast<int64_t>(progress_of(entry).step));
    key = noise_key(hyper.rounding_seed, count, entry.index, 0, begin);
  }
  const int per_pack = entry.grad_dtype == DType::float32 ? 4 : 8;  // elements in 16 bytes, as the measure keeps them
  const int kept = slot && entry.aligned ? size / per_pack * per_pack : 0;
  char* const params = address_of(entry.param, entry.dtype, begin);
  const char* const grads = address_of(entry.grad, entry.grad_dtype, begin);
  const int lane = threadIdx.x % kWarp;
  UpdatedBy<K, float> updated;

  const auto update = [&](auto size_of_word, int from, int count) {
    constexpr int kSize = decltype(size_of_word)::value, kWords = kOfLane / kSize;
    // The first element of a lane's word, in the tile; the lanes' words lie beside each other.
    const auto at = [&](int word) { return from + (word * kWarp + lane) * kSize; };
    const auto is_inside = [&](int word) { return kSize > 1 || at(word) < from + count; };
    uint4 p[kWords]{}, g[kWords]{};
    uint32_t codes[kRoom][kWords]{};
    float scales[kRoom]{};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (is_inside(w)) p[w] = read<kSize>(params, entry.dtype, at(w));
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (!has(reads, s)) continue;
      scales[s] = __ldcs(entry.scales[s] + (begin + from) / kStateBlock);
      const auto* const of_state = static_cast<const uint8_t*>(entry.states[s]) + begin;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (!is_inside(w)) continue;
        if constexpr (kSize == 1) {
          codes[s][w] = __ldcs(of_state + at(w));
        } else {
          codes[s][w] = __ldcs(reinterpret_cast<const uint32_t*>(of_state + at(w)));
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (!is_inside(w)) continue;
      g[w] = at(w) < kept ? read<kSize, From::shared>(slot, entry.grad_dtype, at(w))
                          : read<kSize>(grads, entry.grad_dtype, at(w));
    }
    float states[kRoom][kOfLane];
    uint32_t largest[kRoom]{};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float param[kElements], grad[kElements];
      unpack(p[w], entry.dtype, param);
      unpack(g[w], entry.grad_dtype, grad);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        float state[kMaxStates]{};
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          const auto code = static_cast<uint8_t>(codes[s][w] >> 8 * j);
          const float number = kIsSigned<R> >> s & 1 ? decoded<true>(code) : decoded<false>(code);
          if (has(reads, s)) state[s] = number * scales[s];
        }
        updated.clamped += is_inside(w) && clip.clamps(grad[j]);
        R::update(terms, constants, param[j], clip(grad[j]), state);
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          states[s][w * kSize + j] = state[s];
          const uint32_t magnitude = is_inside(w) ? bits_from_float(state[s]) & 0x7fffffffu : 0;
          largest[s] = magnitude > largest[s] ? magnitude : largest[s];
        }
      }
      if (!is_inside(w)) continue;
      const auto nearest = [](auto& to, float value, int) { store(to, value); };
      const auto at_random = [&](auto& narrow, float value, int j) {
        store(narrow, value, noise(key, begin + at(w) + j));
      };
      const uint4 word =
          hyper.stochastic_rounding ? pack(param, entry.dtype, at_random) : pack(param, entry.dtype, nearest);
      write<kSize>(params, entry.dtype, at(w), word);
      if (entry.rounded) {
        write<kSize>(address_of(entry.rounded, entry.rounded_dtype, begin), entry.rounded_dtype, at(w),
                     pack(param, entry.rounded_dtype, nearest));
      }
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (!has(writes, s)) continue;  // the same in all lanes
      const auto write_state = [&](auto is_signed) {
        constexpr bool kSigned = decltype(is_signed)::value;
        const BlockScale scale = scale_of(float_from_bits(largest_in_warp(largest[s])));
        if (lane == 0) __stcs(entry.scales[s] + (begin + from) / kStateBlock, scale.scale);
        auto* const of_state = static_cast<uint8_t*>(entry.states[s]) + begin;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          uint32_t word = 0;
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const float number = states[s][w * kSize + j];
            const uint32_t code =
                scale.inverse == 0 ? DynamicMap<kSigned>::kZero : encoded<kSigned>(number * scale.inverse);
            word |= code << 8 * j;
          }
          if (!is_inside(w)) continue;
          if constexpr (kSize == 1) {
            __stcs(of_state + at(w), static_cast<uint8_t>(word));
          } else {
            __stcs(reinterpret_cast<uint32_t*>(of_state + at(w)), word);
          }
        }
      };
      kIsSigned<R> >> s & 1 ? write_state(std::true_type{}) : write_state(std::false_type{});
    }
  };
#pragma unroll 1
  for (int from = 0; from < size; from += kStateBlock) {
    const int count = size - from < kStateBlock ? size - from : int{kStateBlock};
    if (entry.aligned && count == kStateBlock) {
      update(std::integral_constant<int, kElements>{}, from, count);
    } else {
      update(std::integral_constant<int, 1>{}, from, count);
    }
  }
  return updated;
}

}  // namespace
}  // namespace fastclip::cuda
