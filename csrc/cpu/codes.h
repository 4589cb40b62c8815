// Brings states in 8 bits to float32 and back, with the CPU's instructions for that. All give the bits of
// rules/quantized.h.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../rules/quantized.h"
#include "narrow.h"
#include "vectorise.h"

namespace fastclip::cpu {
namespace {

// Elements that are brought at a time.
constexpr int kCodes = 64;

struct PortableCodes {
  template <bool kSigned>
  FASTCLIP_HD void read(const uint8_t* codes, float scale, float* to) const {
    FASTCLIP_IVDEP
    for (int i = 0; i < kCodes; ++i) to[i] = decoded<kSigned>(codes[i]) * scale;
  }
  // Writes the codes of the numbers, each times `inverse`.
  template <bool kSigned>
  FASTCLIP_HD void write(uint8_t* codes, float inverse, const float* from) const {
    FASTCLIP_IVDEP
    for (int i = 0; i < kCodes; ++i) codes[i] = encoded<kSigned>(from[i] * inverse);
  }
};

#if defined(__x86_64__)
// The lines of each level, from a number to the place of its cell and back. Without a sign, places count half cells.
template <bool kSigned>
struct Lines {
  using Map = DynamicMap<kSigned>;
  static constexpr int kLevels = Map::kLevels;
  float smallest[kLevels], slope[kLevels], begin[kLevels], end[kLevels], step[kLevels], origin[kLevels];

  constexpr Lines() : smallest(), slope(), begin(), end(), step(), origin() {
    constexpr float kCells = kSigned ? 1 : 2;  // of a place
    for (int level = 0; level < kLevels; ++level) {
      smallest[level] = level == 0 ? 0 : Map::smallest(level);
      slope[level] = Map::slope(level) * kCells;
      begin[level] = Map::begin(level) * kCells;
      end[level] = Map::end(level) * kCells;
      step[level] = level == 0 ? 0 : Map::step(level) / kCells;
      origin[level] = level == 0 ? 0 : Map::origin(level);
    }
  }
};

// Lines back, by the last bits of the exponent of the middle of a cell.
template <bool kSigned, int kSize>
struct LinesBack {
  static constexpr int kFirst = kSigned ? kSize - 1 : 0;  // of the first level
  float step[kSize], origin[kSize];

  constexpr LinesBack() : step(), origin() {
    constexpr Lines<kSigned> kLines;
    for (int level = 1; level < 8; ++level) {
      step[(kFirst + level - 1) % kSize] = kLines.step[level];
      origin[(kFirst + level - 1) % kSize] = kLines.origin[level];
    }
    origin[(kFirst + 7) % kSize] = 1;  // the code of 1
  }
};

// Lines from numbers, by minus the level.
template <bool kSigned>
struct LinesByMinus {
  float slope[8], begin[8], end[8];

  constexpr LinesByMinus() : slope(), begin(), end() {
    constexpr Lines<kSigned> kLines;
    for (int level = 0; level < 8; ++level) {
      slope[(8 - level) % 8] = kLines.slope[level];
      begin[(8 - level) % 8] = kLines.begin[level];
      end[(8 - level) % 8] = kLines.end[level];
    }
  }
};

struct Avx2Codes {
  template <bool kSigned>
  FASTCLIP_AVX2 void read(const uint8_t* codes, float scale, float* to) const {
    static constexpr LinesBack<kSigned, 8> kBack;
    const __m256 steps = _mm256_loadu_ps(kBack.step), origins = _mm256_loadu_ps(kBack.origin),
                 scales = _mm256_set1_ps(scale);
    const __m256 half = _mm256_set1_ps(kSigned ? 0.5f : 1.5f);
    for (int i = 0; i < kCodes; i += 8) {
      __m256i cell = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      if constexpr (kSigned) cell = _mm256_sub_epi32(cell, _mm256_set1_epi32(127));
      const __m256 middle = _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_abs_epi32(cell)), half);
      const __m256i level = _mm256_srli_epi32(_mm256_castps_si256(middle), 23);
      const __m256 at = _mm256_permutevar8x32_ps(steps, level), from = _mm256_permutevar8x32_ps(origins, level);
      __m256 value = _mm256_fmadd_ps(at, middle, from);
      const __m256i zero = _mm256_cmpeq_epi32(cell, _mm256_setzero_si256());  // whose exponent has the last bits of 1's
      value = _mm256_andnot_ps(_mm256_castsi256_ps(zero), value);
      if constexpr (kSigned) {
        const __m256i sign = _mm256_and_si256(cell, _mm256_set1_epi32(kSign));
        value = _mm256_xor_ps(value, _mm256_castsi256_ps(sign));
      }
      _mm256_storeu_ps(to + i, _mm256_mul_ps(value, scales));
    }
  }

  template <bool kSigned>
  FASTCLIP_AVX2 void write(uint8_t* codes, float inverse, const float* from) const {
    constexpr Lines<kSigned> kLines;
    static constexpr LinesByMinus<kSigned> kByMinus;
    const __m256 slopes = _mm256_loadu_ps(kByMinus.slope), begins = _mm256_loadu_ps(kByMinus.begin),
                 ends = _mm256_loadu_ps(kByMinus.end);
    const auto cells = [&](int i) FASTCLIP_AVX2 {
      const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(inverse));
      const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(kSign));
      const __m256 magnitude = kSigned ? _mm256_andnot_ps(sign, y) : y;
      const auto reaches = [&](int level) FASTCLIP_AVX2 {
        return _mm256_castps_si256(_mm256_cmp_ps(magnitude, _mm256_set1_ps(kLines.smallest[level]), _CMP_GE_OQ));
      };
      const __m256i low = _mm256_add_epi32(reaches(1), _mm256_add_epi32(reaches(2), reaches(3)));
      const __m256i high =
          _mm256_add_epi32(_mm256_add_epi32(reaches(4), reaches(5)), _mm256_add_epi32(reaches(6), reaches(7)));
      const __m256i level = _mm256_add_epi32(low, high);
      __m256 place =
          _mm256_fmadd_ps(_mm256_permutevar8x32_ps(slopes, level), magnitude, _mm256_permutevar8x32_ps(begins, level));
      place = _mm256_min_ps(place, _mm256_permutevar8x32_ps(ends, level));
      if constexpr (kSigned) place = _mm256_or_ps(place, _mm256_and_ps(sign, y));
      const __m256 one = _mm256_cmp_ps(y, _mm256_set1_ps(DynamicMap<kSigned>::kNearerToOne), _CMP_GE_OQ);
      const __m256i zero = _mm256_set1_epi32(kSigned ? 127 : -1);
      return _mm256_add_epi32(_mm256_cvttps_epi32(place), _mm256_sub_epi32(zero, _mm256_castps_si256(one)));
    };
    for (int i = 0; i < kCodes; i += 32) {
      const __m256i low = _mm256_packs_epi32(cells(i), cells(i + 8));
      const __m256i high = _mm256_packs_epi32(cells(i + 16), cells(i + 24));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), packed);
    }
  }
};

// For each power of two, the level of its numbers, and the smallest number of the next level if that is below the
// next power. By the last five bits of the exponent.
template <bool kSigned>
struct Binades {
  static constexpr int kFirst = 103;  // 2^-24: below, no level begins but that of all that is not 0
  float next[32];
  int level[32];

  constexpr Binades() : next(), level() {
    constexpr Lines<kSigned> kLines;
    float begin = 0x1p-24f;
    for (int exponent = kFirst; exponent <= 127; ++exponent, begin *= 2) {
      int of_begin = 0;
      const bool is_first = exponent == kFirst;  // down to 0
      while (!is_first && of_begin + 1 < 8 && kLines.smallest[of_begin + 1] <= begin) ++of_begin;
      level[exponent % 32] = of_begin;
      const bool begins = of_begin + 1 < 8 && kLines.smallest[of_begin + 1] < 2 * begin;
      next[exponent % 32] = begins ? kLines.smallest[of_begin + 1] : HUGE_VALF;
    }
  }
};

struct Avx512Codes {
  template <bool kSigned>
  FASTCLIP_AVX512 void read(const uint8_t* codes, float scale, float* to) const {
    static constexpr LinesBack<kSigned, 16> kBack;
    const __m512 steps = _mm512_loadu_ps(kBack.step), origins = _mm512_loadu_ps(kBack.origin),
                 scales = _mm512_set1_ps(scale);
    const __m512 half = _mm512_set1_ps(kSigned ? 0.5f : 1.5f);
    __m512i cells = _mm512_loadu_si512(codes);
    uint64_t negative = 0;
    if constexpr (kSigned) {
      const __m512i zero = _mm512_set1_epi8(127);
      negative = _mm512_cmplt_epu8_mask(cells, zero);
      cells = _mm512_maskz_abs_epi8(~uint64_t{0}, _mm512_sub_epi8(cells, zero));
    }
    alignas(64) uint8_t room[kCodes];
    _mm512_store_si512(room, cells);
    for (int i = 0; i < kCodes; i += 16) {
      const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(room + i));
      const __m512i cell = _mm512_maskz_cvtepu8_epi32(kAll, sixteen);
      const __m512 middle = _mm512_add_ps(_mm512_maskz_cvtepi32_ps(kAll, cell), half);
      const __m512i level = _mm512_maskz_srli_epi32(kAll, _mm512_castps_si512(middle), 23);
      const __m512 at = _mm512_maskz_permutexvar_ps(kAll, level, steps);
      const __m512 from = _mm512_maskz_permutexvar_ps(kAll, level, origins);
      __m512 value = _mm512_fmadd_ps(at, middle, from);
      if constexpr (kSigned) {
        const auto mask = static_cast<__mmask16>(negative >> i);
        value = _mm512_mask_sub_ps(value, mask, _mm512_setzero_ps(), value);
      }
      _mm512_storeu_ps(to + i, _mm512_mul_ps(value, scales));
    }
  }

  template <bool kSigned>
  FASTCLIP_AVX512 void write(uint8_t* codes, float inverse, const float* from) const {
    static constexpr Lines<kSigned> kLines;
    static constexpr Binades<kSigned> kBinades;
    const __m512 slopes = eight(kLines.slope), begins = eight(kLines.begin), ends = eight(kLines.end);
    const __m512 next[] = {_mm512_loadu_ps(kBinades.next), _mm512_loadu_ps(kBinades.next + 16)};
    const __m512i levels[] = {_mm512_loadu_si512(kBinades.level), _mm512_loadu_si512(kBinades.level + 16)};
    const __m512i sign = _mm512_set1_epi32(kSign);
    const auto cells = [&](int i) FASTCLIP_AVX512 {
      const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(inverse));
      const __m512i bits =
          kSigned ? _mm512_maskz_andnot_epi32(kAll, sign, _mm512_castps_si512(y)) : _mm512_castps_si512(y);
      const __m512 magnitude = _mm512_castsi512_ps(bits);
      const __m512i clamped = _mm512_maskz_max_epi32(kAll, bits, _mm512_set1_epi32(Binades<kSigned>::kFirst << 23));
      const __m512i binade = _mm512_maskz_srli_epi32(kAll, clamped, 23);
      const __mmask16 reached =
          _mm512_cmp_ps_mask(magnitude, _mm512_permutex2var_ps(next[0], binade, next[1]), _CMP_GE_OQ);
      __m512i level = _mm512_permutex2var_epi32(levels[0], binade, levels[1]);
      level = _mm512_mask_add_epi32(level, reached, level, _mm512_set1_epi32(1));
      __m512 place = _mm512_fmadd_ps(_mm512_maskz_permutexvar_ps(kAll, level, slopes), magnitude,
                                     _mm512_maskz_permutexvar_ps(kAll, level, begins));
      place = _mm512_maskz_min_ps(kAll, place, _mm512_maskz_permutexvar_ps(kAll, level, ends));
      if constexpr (kSigned) {  // with the sign of y
        const __m512i with_sign =
            _mm512_ternarylogic_epi32(_mm512_castps_si512(place), sign, _mm512_castps_si512(y), 0xf8);
        place = _mm512_castsi512_ps(with_sign);
      }
      const __mmask16 one = _mm512_cmp_ps_mask(y, _mm512_set1_ps(DynamicMap<kSigned>::kNearerToOne), _CMP_GE_OQ);
      const __m512i zero =
          _mm512_mask_mov_epi32(_mm512_set1_epi32(kSigned ? 127 : -1), one, _mm512_set1_epi32(kSigned ? 128 : 0));
      return _mm512_add_epi32(_mm512_maskz_cvttps_epi32(kAll, place), zero);
    };
    const __m512i low = _mm512_packs_epi32(cells(0), cells(16)), high = _mm512_packs_epi32(cells(32), cells(48));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_maskz_permutexvar_epi32(kAll, order, _mm512_packus_epi16(low, high)));
  }

 private:
  static constexpr __mmask16 kAll = 0xffff;  // GCC warns of what instructions without a mask leave undefined
  FASTCLIP_AVX512 static __m512 eight(const float (&numbers)[8]) {
    return _mm512_castps256_ps512(_mm256_loadu_ps(numbers));
  }
};
#endif

}  // namespace
}  // namespace fastclip::cpu
