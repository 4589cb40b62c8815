// Converts bfloat16 and float16 to float32 and back, with the CPU's instructions for that. All give the bits of
// dtypes.h, in every mode of the CPU: with subnormal numbers, and without.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../rules/dtypes.h"
#include "machine.h"

// What the loops of a set are compiled for, and the conversions that are inlined into them. Clang takes the widest
// registers unasked.
#if defined(__clang__)
#define FASTCLIP_WIDEST
#else
#define FASTCLIP_WIDEST ",prefer-vector-width=512"
#endif
#define FASTCLIP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c" FASTCLIP_WIDEST)))
#define FASTCLIP_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace fastclip::cpu {
namespace {

// Elements that are converted at a time: a cache line of 16-bit numbers. Loops of this length stay loops until they are
// vectorised, and are in registers after that.
constexpr int kRun = 32;

// Conversions of a run. `round` rounds at random, see dtypes.h; `at` is the place of the first element, a multiple of
// kRun. kInRegisters: loops that update a run between two conversions keep it in registers; clang keeps it in memory,
// and computes one number at a time. kHasFma: fma is an instruction.
struct PortableNarrow {
  static constexpr bool kInRegisters = false, kHasFma = false;

  template <class Stored>
  FASTCLIP_HD void read(const Stored* from, float* to) const {
    for (int i = 0; i < kRun; ++i) to[i] = load(from[i]);
  }
  template <class Stored>
  FASTCLIP_HD void write(Stored* to, const float* from) const {
    for (int i = 0; i < kRun; ++i) store(to[i], from[i]);
  }
  template <class Stored>
  FASTCLIP_HD void round(Stored* to, const float* from, uint32_t key, uint32_t at) const {
    for (uint32_t i = 0; i < kRun; ++i) store(to[i], from[i], noise(key, at + i));
  }
};

// The first step of the hash of noise(): the places of a run differ in their last bits alone, so it is the same but for
// these.
FASTCLIP_HD uint32_t begun_hash(uint32_t key, uint32_t at) {
  const uint32_t x = key ^ at;
  return x ^ (x >> 16);
}

#if defined(__clang__)
constexpr bool kKeepsRuns = false;
#else
constexpr bool kKeepsRuns = true;
#endif

#if defined(__x86_64__)
constexpr int kTowardsZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
constexpr int kQuietNan = 0x7fc00000, kInfinity = 0x7f800000, kSign = int(0x80000000);

struct Avx2Narrow {
  static constexpr bool kInRegisters = kKeepsRuns, kHasFma = true;

  FASTCLIP_AVX2 void read(const Float16* from, float* to) const {
    for (int i = 0; i < kRun; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight(from + i)));
  }
  FASTCLIP_AVX2 void read(const BFloat16* from, float* to) const {
    for (int i = 0; i < kRun; i += 8) {
      const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(from + i)), 16);
      _mm256_storeu_ps(to + i, _mm256_castsi256_ps(bits));
    }
  }

  FASTCLIP_AVX2 void write(Float16* to, const float* from) const {
    for (int i = 0; i < kRun; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
    }
  }
  FASTCLIP_AVX2 void write(BFloat16* to, const float* from) const {
    const __m256 nan = _mm256_or_ps(any_nan(from, from + 8), any_nan(from + 16, from + 24));
    const bool none = _mm256_movemask_ps(nan) == 0;
    for (int i = 0; i < kRun; i += 16) {
      const __m256i low = nearest(from + i), high = nearest(from + i + 8);
      none ? pack(to + i, low, high) : pack(to + i, or_nan(from + i, low), or_nan(from + i + 8, high));
    }
  }

  FASTCLIP_AVX2 void round(Float16* to, const float* from, uint32_t key, uint32_t at) const {
    const __m256i begun = _mm256_set1_epi32(int(begun_hash(key, at))), sign = _mm256_set1_epi32(kSign);
    for (int i = 0; i < kRun; i += 8) {
      const __m256i x = _mm256_castps_si256(_mm256_loadu_ps(from + i));
      const __m256i magnitude = _mm256_andnot_si256(sign, x);
      const __m256i cut = _mm256_and_si256(noise_of(begun, i), _mm256_set1_epi32(0x1fff));
      // A sum of bits for normal halves; below, one of numbers, whose last place is 2^-24.
      const __m256i normal = _mm256_add_epi32(magnitude, cut);
      const __m256 small =
          _mm256_fmadd_ps(_mm256_cvtepi32_ps(cut), _mm256_set1_ps(0x1p-37f), _mm256_castsi256_ps(magnitude));
      __m256i sum = select(less(magnitude, 0x38800000), _mm256_castps_si256(small), normal);
      sum = select(less(sum, 0x47800000), sum, _mm256_set1_epi32(kInfinity));
      sum = select(less(magnitude, kInfinity + 1), sum, _mm256_set1_epi32(kQuietNan));
      sum = _mm256_or_si256(sum, _mm256_and_si256(sign, x));
      const __m128i halves = _mm256_cvtps_ph(_mm256_castsi256_ps(sum), kTowardsZero);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
    }
  }
  FASTCLIP_AVX2 void round(BFloat16* to, const float* from, uint32_t key, uint32_t at) const {
    const __m256i begun = _mm256_set1_epi32(int(begun_hash(key, at)));
    const auto rounded = [&](int i) FASTCLIP_AVX2 {
      const __m256i cut = _mm256_and_si256(noise_of(begun, i), _mm256_set1_epi32(0xffff));
      return or_nan(from + i, _mm256_add_epi32(_mm256_castps_si256(_mm256_loadu_ps(from + i)), cut));
    };
    for (int i = 0; i < kRun; i += 16) pack(to + i, rounded(i), rounded(i + 8));
  }

 private:
  FASTCLIP_AVX2 static __m128i eight(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  FASTCLIP_AVX2 static __m256i less(__m256i x, int bound) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), x); }
  FASTCLIP_AVX2 static __m256i select(__m256i where, __m256i yes, __m256i no) {
    return _mm256_blendv_epi8(no, yes, where);
  }
  // Writes the upper halves of 16 numbers of 32 bits.
  FASTCLIP_AVX2 static void pack(BFloat16* to, __m256i low, __m256i high) {
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  FASTCLIP_AVX2 static __m256 any_nan(const float* a, const float* b) {
    return _mm256_cmp_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), _CMP_UNORD_Q);
  }
  FASTCLIP_AVX2 static __m256i or_nan(const float* from, __m256i rounded) {
    const __m256 nan = any_nan(from, from);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(kQuietNan), _mm256_castps_si256(nan));
  }
  FASTCLIP_AVX2 static __m256i nearest(const float* from) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(from));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
  FASTCLIP_AVX2 static __m256i noise_of(__m256i begun, int i) {
    const __m256i places = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(i));
    __m256i x = _mm256_mullo_epi32(_mm256_xor_si256(begun, places), _mm256_set1_epi32(0x7feb352d));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(int(0x846ca68b)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
};

struct Avx512Narrow {
  static constexpr bool kInRegisters = kKeepsRuns, kHasFma = true;

  FASTCLIP_AVX512 void read(const Float16* from, float* to) const {
    for (int i = 0; i < kRun; i += 16) _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(kAll, sixteen(from + i)));
  }
  FASTCLIP_AVX512 void read(const BFloat16* from, float* to) const {
    for (int i = 0; i < kRun; i += 16) {
      const __m512i bits = _mm512_maskz_cvtepu16_epi32(kAll, sixteen(from + i));
      _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, bits, 16)));
    }
  }

  FASTCLIP_AVX512 void write(Float16* to, const float* from) const {
    for (int i = 0; i < kRun; i += 16) halves<_MM_FROUND_TO_NEAREST_INT>(to + i, _mm512_loadu_ps(from + i));
  }
  FASTCLIP_AVX512 void write(BFloat16* to, const float* from) const {
    const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
    // The instruction takes subnormal numbers for 0, and keeps the digits of a NaN.
    constexpr int kNan = 0x81, kSubnormal = 0x20;
    const bool as_torch =
        !(_mm512_fpclass_ps_mask(low, kNan | kSubnormal) | _mm512_fpclass_ps_mask(high, kNan | kSubnormal));
    if (rounds_bfloat16_ && as_torch) {
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    } else {
      upper_halves(to, nearest(low), nearest(high));
    }
  }

  FASTCLIP_AVX512 void round(Float16* to, const float* from, uint32_t key, uint32_t at) const {
    const __m512i begun = _mm512_set1_epi32(int(begun_hash(key, at)));
    for (int i = 0; i < kRun; i += 16) {
      const __m512i x = _mm512_castps_si512(_mm512_loadu_ps(from + i)), sign = _mm512_set1_epi32(kSign);
      const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff));
      const __m512i cut = noise_of(begun, i, 0x1fff);
      // A sum of bits for normal halves; below, one of numbers, whose last place is 2^-24.
      __m512i sum = _mm512_add_epi32(magnitude, cut);
      const __m512 small = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(kAll, cut), _mm512_set1_ps(0x1p-37f),
                                           _mm512_castsi512_ps(magnitude));
      sum = _mm512_mask_mov_epi32(sum, less(magnitude, 0x38800000), _mm512_castps_si512(small));
      sum = _mm512_mask_mov_epi32(_mm512_set1_epi32(kInfinity), less(sum, 0x47800000), sum);
      sum = _mm512_mask_mov_epi32(_mm512_set1_epi32(kQuietNan), less(magnitude, kInfinity + 1), sum);
      sum = _mm512_or_si512(sum, _mm512_and_si512(sign, x));
      halves<kTowardsZero>(to + i, _mm512_castsi512_ps(sum));
    }
  }
  FASTCLIP_AVX512 void round(BFloat16* to, const float* from, uint32_t key, uint32_t at) const {
    const __m512i begun = _mm512_set1_epi32(int(begun_hash(key, at)));
    const auto rounded = [&](int i) FASTCLIP_AVX512 {
      const __m512 x = _mm512_loadu_ps(from + i);
      return or_nan(x, _mm512_add_epi32(_mm512_castps_si512(x), noise_of(begun, i, 0xffff)));
    };
    upper_halves(to, rounded(0), rounded(16));
  }

 private:
  static constexpr __mmask16 kAll = 0xffff;  // without a mask, GCC 12 warns of its own header

  // The kinds of numbers are told apart only where no mode hides subnormal ones.
  const bool rounds_bfloat16_ = kMachine.rounds_bfloat16 && !(_mm_getcsr() & _MM_DENORMALS_ZERO_MASK);

  FASTCLIP_AVX512 static __m256i sixteen(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  FASTCLIP_AVX512 static __mmask16 less(__m512i x, int bound) {
    return _mm512_cmplt_epi32_mask(x, _mm512_set1_epi32(bound));
  }
  template <int kRounding>
  FASTCLIP_AVX512 static void halves(Float16* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(kAll, x, kRounding));
  }
  // Writes the upper halves of 32 numbers of 32 bits.
  FASTCLIP_AVX512 static void upper_halves(BFloat16* to, __m512i low, __m512i high) {
    alignas(64) static constexpr uint16_t kUpper[kRun] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                          23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                          45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpper), high));
  }
  FASTCLIP_AVX512 static __m512i or_nan(__m512 x, __m512i rounded) {
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(kQuietNan));
  }
  FASTCLIP_AVX512 static __m512i nearest(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
    return or_nan(x, _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd));
  }
  FASTCLIP_AVX512 static __m512i noise_of(__m512i begun, int i, int mask) {
    const __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(sixteen, _mm512_set1_epi32(i));
    __m512i x = _mm512_mullo_epi32(_mm512_xor_si512(begun, places), _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_maskz_srli_epi32(kAll, x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(int(0x846ca68b)));
    constexpr int kXorThenAnd = 0x28;
    return _mm512_ternarylogic_epi32(x, _mm512_maskz_srli_epi32(kAll, x, 16), _mm512_set1_epi32(mask), kXorThenAnd);
  }
};
using BaselineNarrow = PortableNarrow;

#elif defined(__aarch64__)
// Every AArch64 CPU has these instructions. None rounds towards zero to a half: `round` is the portable one.
struct Neon : PortableNarrow {
  static constexpr bool kInRegisters = kKeepsRuns, kHasFma = true;

  FASTCLIP_HD void read(const Float16* from, float* to) const {
    for (int i = 0; i < kRun; i += 4) {
      vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from[i].bits))));
    }
  }
  FASTCLIP_HD void read(const BFloat16* from, float* to) const {
    for (int i = 0; i < kRun; i += 4) {
      vst1q_f32(to + i, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from[i].bits), 16)));
    }
  }
  FASTCLIP_HD void write(Float16* to, const float* from) const {
    for (int i = 0; i < kRun; i += 4) {
      vst1_u16(&to[i].bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    }
  }
  FASTCLIP_HD void write(BFloat16* to, const float* from) const {
    for (int i = 0; i < kRun; i += 4) {
      const float32x4_t x = vld1q_f32(from + i);
      const uint32x4_t bits = vreinterpretq_u32_f32(x);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t nearest = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
      vst1_u16(&to[i].bits, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), nearest, vdupq_n_u32(0x7fc00000)), 16));
    }
  }
};
using BaselineNarrow = Neon;

#else
using BaselineNarrow = PortableNarrow;
#endif

// Converts any number of elements, by whole runs; `at` as above.
template <class Narrow, class Stored>
FASTCLIP_HD void read_many(const Narrow& narrow, const Stored* from, int64_t size, float* to) {
  for (; size >= kRun; size -= kRun, from += kRun, to += kRun) narrow.read(from, to);
  if (size == 0) return;
  Stored rest[kRun] = {};
  float values[kRun];
  for (int64_t i = 0; i < size; ++i) rest[i] = from[i];
  narrow.read(rest, values);
  for (int64_t i = 0; i < size; ++i) to[i] = values[i];
}

template <class Stored, class Convert>
FASTCLIP_HD void to_many(Stored* to, int64_t size, const float* from, const Convert& convert) {
  int64_t done = 0;
  for (; done + kRun <= size; done += kRun) convert(to + done, from + done, done);
  if (done == size) return;
  Stored rest[kRun];
  float values[kRun] = {};
  for (int64_t i = 0; done + i < size; ++i) values[i] = from[done + i];
  convert(rest, values, done);
  for (int64_t i = 0; done + i < size; ++i) to[done + i] = rest[i];
}
template <class Narrow, class Stored>
FASTCLIP_HD void write_many(const Narrow& narrow, Stored* to, int64_t size, const float* from) {
  to_many(to, size, from,
          [&](Stored* run, const float* values, int64_t) __attribute__((always_inline)) { narrow.write(run, values); });
}
template <class Narrow, class Stored>
FASTCLIP_HD void round_many(const Narrow& narrow, Stored* to, int64_t size, const float* from, uint32_t key,
                            uint32_t at) {
  to_many(to, size, from, [&](Stored* run, const float* values, int64_t done) __attribute__((always_inline)) {
    narrow.round(run, values, key, at + static_cast<uint32_t>(done));
  });
}

}  // namespace
}  // namespace fastclip::cpu
