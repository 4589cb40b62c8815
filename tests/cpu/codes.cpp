// States in 8 bits, by every instruction set that this machine has, against rules/quantized.h, with subnormal numbers
// and without.
// Prints a line for each, and stops with 1 at the first that is wrong.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/codes.h"
#include "flush_denormal.h"

using namespace fastclip;

namespace {

// Calls of a set, compiled for it.
struct Portable {
  static constexpr const char* kName = "portable";
  template <bool kSigned>
  static void read(const uint8_t* codes, float scale, float* to) {
    cpu::PortableCodes().read<kSigned>(codes, scale, to);
  }
  template <bool kSigned>
  static void write(uint8_t* codes, float inverse, const float* from) {
    cpu::PortableCodes().write<kSigned>(codes, inverse, from);
  }
};
#if defined(__x86_64__)
struct Avx2 {
  static constexpr const char* kName = "AVX2";
  template <bool kSigned>
  FASTCLIP_AVX2 static void read(const uint8_t* codes, float scale, float* to) {
    cpu::Avx2Codes().read<kSigned>(codes, scale, to);
  }
  template <bool kSigned>
  FASTCLIP_AVX2 static void write(uint8_t* codes, float inverse, const float* from) {
    cpu::Avx2Codes().write<kSigned>(codes, inverse, from);
  }
};
struct Avx512 {
  static constexpr const char* kName = "AVX512";
  template <bool kSigned>
  FASTCLIP_AVX512 static void read(const uint8_t* codes, float scale, float* to) {
    cpu::Avx512Codes().read<kSigned>(codes, scale, to);
  }
  template <bool kSigned>
  FASTCLIP_AVX512 static void write(uint8_t* codes, float inverse, const float* from) {
    cpu::Avx512Codes().write<kSigned>(codes, inverse, from);
  }
};
#endif

// Numbers of the map: many of all magnitudes, and all beside a border between two codes.
template <bool kSigned>
std::vector<float> numbers() {
  std::vector<float> numbers;
  for (uint32_t bits = 0; bits <= 0x3f800001; bits += 4099) numbers.push_back(float_from_bits(bits));
  for (int code = 0; code < 255; ++code) {
    const float low = decoded<kSigned>(static_cast<uint8_t>(code)),
                high = decoded<kSigned>(static_cast<uint8_t>(code + 1));
    for (const float border : {low, (low + high) / 2}) {
      const uint32_t bits = bits_from_float(border);
      for (uint32_t near = 0; near <= 32; ++near)
        numbers.push_back(float_from_bits(bits + near - (bits & 0x7fffffff ? 16 : 0)));
    }
  }
  for (const float end : {0.0f, -0.0f, 1.0f, 1.0000001f, 0x1p-126f, 0x1p-127f}) numbers.push_back(end);
  const size_t count = numbers.size();
  for (size_t i = 0; kSigned && i < count; ++i) numbers.push_back(-numbers[i]);
  if (!kSigned) std::erase_if(numbers, [](float number) { return number < 0; });
  while (numbers.size() % cpu::kCodes) numbers.push_back(0);
  return numbers;
}

template <class Set, bool kSigned>
void check(bool flushing) {
  const char* const mode = flushing ? ", flushing" : "";
  for (const float scale : {1.0f, 0x1p-100f, 3e20f}) {
    uint8_t codes[256];
    float found[256];
    for (int code = 0; code < 256; ++code) codes[code] = static_cast<uint8_t>(code);
    for (int i = 0; i < 256; i += cpu::kCodes) Set::template read<kSigned>(codes + i, scale, found + i);
    for (int code = 0; code < 256; ++code) {
      const float expected = decoded<kSigned>(static_cast<uint8_t>(code)) * scale;
      if (bits_from_float(found[code]) == bits_from_float(expected)) continue;
      printf("%s read%s: code %d times %g became %.9g, not %.9g\n", Set::kName, mode, code, scale, found[code],
             expected);
      exit(1);
    }
  }
  const std::vector<float> from = numbers<kSigned>();
  for (const float inverse : {1.0f, 0.9f}) {
    for (size_t i = 0; i < from.size(); i += cpu::kCodes) {
      uint8_t found[cpu::kCodes];
      Set::template write<kSigned>(found, inverse, &from[i]);
      for (int k = 0; k < cpu::kCodes; ++k) {
        const uint8_t expected = encoded<kSigned>(from[i + k] * inverse);
        if (found[k] == expected) continue;
        printf("%s write%s: %.9g times %g became %d, not %d\n", Set::kName, mode, from[i + k], inverse, found[k],
               expected);
        exit(1);
      }
    }
  }
}

template <class Set>
void check_all() {
  for (const bool flushing : {false, true}) {
    flush_denormal(flushing);
    check<Set, true>(flushing);
    check<Set, false>(flushing);
    flush_denormal(false);
  }
  printf("%s: right\n", Set::kName);
}

}  // namespace

int main() {
  check_all<Portable>();
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) check_all<Avx2>();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) check_all<Avx512>();
#endif
}
