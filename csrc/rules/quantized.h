// States in 8 bits: blocks of 256 elements, each with a scale, its largest magnitude (Dettmers et al., 2022,
// https://arxiv.org/abs/2110.02861). A code stands for a number from -1 to 1, or from 0 to 1, times the scale: the
// dynamic map of bitsandbytes. Its seven decades, from 10^-7 to 1, are cut into cells of equal width, of which each
// decade has twice as many as the one below; a code means the middle of its cell. Two codes are left: 0, and 1.
//
// Cells are counted through all decades: the place of a number, of which the cell is the whole part, grows in each
// decade by a line of its own. So neither way needs a table of 256, and loops over both vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "dtypes.h"

namespace fastclip {

constexpr int64_t kStateBlock = 256;       // elements with a scale of their own
constexpr int64_t kLeastQuantized = 4096;  // elements of a tensor: below, little is saved
FASTCLIP_HD constexpr int64_t blocks_of(int64_t numel) { return (numel + kStateBlock - 1) / kStateBlock; }

// The map of numbers with a sign, which has 127 cells on either side of 0; or without, which has 254 that are half as
// wide. Levels are 0, and then the decades.
template <bool kSigned>
struct DynamicMap {
  static constexpr int kLevels = 8;
  static constexpr uint8_t kZero = kSigned ? 127 : 0;  // its code

  // The lower end of a level's decade.
  FASTCLIP_HD static constexpr double bottom(int level) {
    double bottom = 0.1;
    for (int i = level; i < kLevels - 1; ++i) bottom /= 10;
    return bottom;
  }
  // The width of a place; cells without a sign have half a place.
  FASTCLIP_HD static constexpr double width(int level) { return 9 * bottom(level) / (1 << (level - 1)); }
  FASTCLIP_HD static constexpr double first_place(int level) { return 1 << (level - 1); }

  // The smallest number of a level: it is nearer to this level's first cell than to the last one below. Without a sign,
  // what is not 0 does not become 0: an update is divided by its root.
  FASTCLIP_HD static constexpr float smallest(int level) {
    if (level == 1) return static_cast<float>(kSigned ? (bottom(1) + width(1) / 2) / 2 : 0x1p-126);
    return static_cast<float>(bottom(level) + width(level - 1) / (kSigned ? 1 : 2));
  }
  // The line from numbers to places, and its end.
  FASTCLIP_HD static constexpr float slope(int level) {
    if (level == 0) return 0;
    if (level == 1 && !kSigned) return static_cast<float>(0.5 / (bottom(1) + width(1) / 2));  // from 0 on
    return static_cast<float>(1 / width(level));
  }
  FASTCLIP_HD static constexpr float begin(int level) {
    if (level == 0) return 0.5f;
    if (level == 1 && !kSigned) return 1;
    return static_cast<float>(first_place(level) - bottom(level) / width(level));
  }
  FASTCLIP_HD static constexpr float end(int level) { return static_cast<float>(1 << level) * (1 - 0x1p-24f); }
  // The smallest number that is nearer to 1 than to the last cell.
  static constexpr float kNearerToOne = static_cast<float>(1 - width(kLevels - 1) / (kSigned ? 4 : 8));

  // The line from the middle of a cell, as a place, back to its number.
  FASTCLIP_HD static constexpr float step(int level) { return static_cast<float>(width(level)); }
  FASTCLIP_HD static constexpr float origin(int level) {
    return static_cast<float>(bottom(level) - first_place(level) * width(level));
  }
};

namespace quantized {

// One step of `place_of`: the line of a level holds for all numbers that it has.
template <class Map, int kLevel>
FASTCLIP_HD void take_line(float magnitude, float& slope, float& begin, float& end) {
  constexpr float kSmallest = Map::smallest(kLevel), kSlope = Map::slope(kLevel), kBegin = Map::begin(kLevel),
                  kEnd = Map::end(kLevel);
  const bool reached = magnitude >= kSmallest;
  slope = reached ? kSlope : slope;
  begin = reached ? kBegin : begin;
  end = reached ? kEnd : end;
}
template <class Map, int... kLevelsBelow>
FASTCLIP_HD float place_of(float magnitude, std::integer_sequence<int, kLevelsBelow...>) {
  using std::fma;
  constexpr float kBegin = Map::begin(0), kEnd = Map::end(0);
  float slope = 0, begin = kBegin, end = kEnd;
  (take_line<Map, kLevelsBelow + 1>(magnitude, slope, begin, end), ...);
  const float place = fma(slope, magnitude, begin);
  return place < end ? place : end;
}

// The lines back are the steeper the higher, and meet: the highest of all is that of the cell.
template <class Map, int kLevel>
FASTCLIP_HD float on_line(float place) {
  using std::fma;
  constexpr float kStep = Map::step(kLevel), kOrigin = Map::origin(kLevel);
  return fma(kStep, place, kOrigin);
}
FASTCLIP_HD float higher(float a, float b) { return b > a ? b : a; }
template <class Map, int... kLevelsBelow>
FASTCLIP_HD float value_of(float place, std::integer_sequence<int, kLevelsBelow...>) {
  float value = 0;
  ((value = higher(value, on_line<Map, kLevelsBelow + 1>(place))), ...);
  return value < 1.0f ? value : 1.0f;
}

}  // namespace quantized

// Returns what a code stands for.
template <bool kSigned>
FASTCLIP_HD float decoded(uint8_t code) {
  using Map = DynamicMap<kSigned>;
  const int cell = kSigned ? int{code} - 127 : int{code} + 1;
  const float middle = static_cast<float>(kSigned && cell < 0 ? -cell : cell) + 0.5f;
  const float value =
      quantized::value_of<Map>(kSigned ? middle : 0.5f * middle, std::make_integer_sequence<int, Map::kLevels - 1>{});
  return kSigned && cell < 0 ? -value : value;
}

// Returns the code of the number that is nearest to y, which is in the range of the map.
template <bool kSigned>
FASTCLIP_HD uint8_t encoded(float y) {
  using Map = DynamicMap<kSigned>;
  constexpr float kNearerToOne = Map::kNearerToOne;
  const float place =
      quantized::place_of<Map>(kSigned ? fabsf(y) : y, std::make_integer_sequence<int, Map::kLevels - 1>{});
  const bool is_nearer_to_one = y >= kNearerToOne;  // there is no -1
  if constexpr (kSigned) {
    const int cell = static_cast<int>(place);
    return static_cast<uint8_t>(127 + (y < 0 ? -cell : cell) + is_nearer_to_one);
  } else {
    return static_cast<uint8_t>(static_cast<int>(2 * place) - 1 + is_nearer_to_one);
  }
}

// A block's scale, and what its elements are multiplied by. A block with an inf or NaN is one of NaN. So is one whose
// scale has no inverse: numbers above 2^126 overflow, those below 2^-126 are 0.
struct BlockScale {
  float scale;
  float inverse;
};
FASTCLIP_HD BlockScale scale_of(float largest) {
  if (!(largest <= 0x1p126f)) return {largest * HUGE_VALF, 0};
  if (largest < 0x1p-126f) return {0, 0};
  return {largest, 1 / largest};
}

}  // namespace fastclip
