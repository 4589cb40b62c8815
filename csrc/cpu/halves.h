// Converts runs of float16 to float32 and back, with the CPU's instructions for that. They convert subnormal numbers
// correctly in every mode of the CPU.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../rules/dtypes.h"

namespace fastclip::cpu {
namespace {

struct PortableHalves {
  FASTCLIP_HD static void read(const Float16* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; ++i) to[i] = load(from[i]);
  }
  FASTCLIP_HD static void write(Float16* to, int64_t size, const float* from) {
    for (int64_t i = 0; i < size; ++i) store(to[i], from[i]);
  }
};

#if defined(__x86_64__)
#define FASTCLIP_F16C __attribute__((target("avx,f16c")))
#define FASTCLIP_AVX512 __attribute__((target("avx512f,f16c")))
constexpr int kNearestEven = 0;

struct F16c {
  // Not every compiler's __builtin_cpu_supports knows F16C.
  static bool supported() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
  FASTCLIP_F16C static void read(const Float16* from, int64_t size, float* to) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
    for (; i < size; ++i) to[i] = _cvtsh_ss(from[i].bits);
  }
  FASTCLIP_F16C static void write(Float16* to, int64_t size, const float* from) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearestEven));
    }
    for (; i < size; ++i) to[i].bits = _cvtss_sh(from[i], kNearestEven);
  }
};

// As wide as the loads and stores of the loops: a load that follows two narrower stores waits until both are in the
// cache.
struct Avx512Halves {
  static constexpr __mmask16 kAll = 0xffff;  // without a mask, GCC 12 warns of its own header

  FASTCLIP_AVX512 static void read(const Float16* from, int64_t size, float* to) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(kAll, halves));
    }
    F16c::read(from + i, size - i, to + i);
  }
  FASTCLIP_AVX512 static void write(Float16* to, int64_t size, const float* from) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
      const __m256i halves = _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from + i), kNearestEven);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
    }
    F16c::write(to + i, size - i, from + i);
  }
};
#undef FASTCLIP_F16C
#undef FASTCLIP_AVX512
using BaselineHalves = PortableHalves;

#elif defined(__aarch64__)
// Every AArch64 CPU has these instructions.
struct Neon {
  static void read(const Float16* from, int64_t size, float* to) {
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from[i].bits))));
    if (i == size) return;
    uint16_t halves[4] = {};
    float values[4];
    for (int64_t k = 0; i + k < size; ++k) halves[k] = from[i + k].bits;
    vst1q_f32(values, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))));
    for (int64_t k = 0; i + k < size; ++k) to[i + k] = values[k];
  }
  static void write(Float16* to, int64_t size, const float* from) {
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) vst1_u16(&to[i].bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    if (i == size) return;
    float values[4] = {};
    uint16_t halves[4];
    for (int64_t k = 0; i + k < size; ++k) values[k] = from[i + k];
    vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(values))));
    for (int64_t k = 0; i + k < size; ++k) to[i + k].bits = halves[k];
  }
};
using BaselineHalves = Neon;

#else
using BaselineHalves = PortableHalves;
#endif

}  // namespace
}  // namespace fastclip::cpu
