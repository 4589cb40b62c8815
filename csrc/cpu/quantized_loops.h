// Brings blocks of states in 8 bits to float32, and back.
#pragma once

#include <cstring>

#include "codes.h"

namespace fastclip::cpu {
namespace {

template <class Codes, bool kSigned>
FASTCLIP_HD void decode(const uint8_t* codes, float scale, int64_t size, float* to) {
  const Codes brings;
  int64_t i = 0;
  for (; i + kCodes <= size; i += kCodes) brings.template read<kSigned>(codes + i, scale, to + i);
  if (i == size) return;
  uint8_t last[kCodes] = {};
  float numbers[kCodes];
  memcpy(last, codes + i, size - i);
  brings.template read<kSigned>(last, scale, numbers);
  memcpy(to + i, numbers, (size - i) * sizeof(float));
}

// Returns the scale.
template <class Codes, bool kSigned>
FASTCLIP_HD float encode(uint8_t* codes, int64_t size, const float* from) {
  const Codes brings;
  const auto largest_of = [&](int64_t size) __attribute__((always_inline)) {
    int32_t largest = 0;  // as bits: those of a NaN are larger than those of any number
    for (int64_t i = 0; i < size; ++i) {
      const auto magnitude = static_cast<int32_t>(bits_from_float(from[i]) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
    return float_from_bits(static_cast<uint32_t>(largest));
  };
  const BlockScale scale = scale_of(size == kStateBlock ? largest_of(kStateBlock) : largest_of(size));
  if (scale.inverse == 0) {
    memset(codes, DynamicMap<kSigned>::kZero, size);
    return scale.scale;
  }
  int64_t i = 0;
  for (; i + kCodes <= size; i += kCodes) brings.template write<kSigned>(codes + i, scale.inverse, from + i);
  if (i == size) return scale.scale;
  uint8_t last[kCodes];
  float numbers[kCodes] = {};
  memcpy(numbers, from + i, (size - i) * sizeof(float));
  brings.template write<kSigned>(last, scale.inverse, numbers);
  memcpy(codes + i, last, size - i);
  return scale.scale;
}

}  // namespace
}  // namespace fastclip::cpu
