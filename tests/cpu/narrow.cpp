// Every conversion of float16 and bfloat16 that this machine has, against exact arithmetic, with subnormal numbers and
// without; rounding at random against the formula for one number.
// Prints a line for each, and stops with 1 at the first that is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/narrow.h"
#include "flush_denormal.h"

using namespace fastclip;

namespace {

// Bits of the float32 that a number is, put together from integers.
struct Halves {
  using Stored = Float16;
  static constexpr const char* kName = "float16";
  static constexpr uint16_t kLargest = 0x7bff;
  static constexpr uint32_t kInfiniteFrom = 0x477ff000;  // 65520
  static uint32_t exact_bits(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, digits = half & 0x3ff;
    if (exponent == 31) return sign | 0x7f800000u | digits << 13;
    if (exponent > 0) return sign | (exponent + 112) << 23 | digits << 13;
    if (digits == 0) return sign;
    int shift = 0;
    while (!(digits << shift & 0x400)) ++shift;
    return sign | uint32_t(113 - shift) << 23 | (digits << shift & 0x3ff) << 13;
  }
};
struct Brains {
  using Stored = BFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr uint16_t kLargest = 0x7f7f;
  static constexpr uint32_t kInfiniteFrom = 0x7f7f8000;
  static uint32_t exact_bits(uint16_t number) { return uint32_t{number} << 16; }
};

// The nearest number, even in a tie: found among all of one sign, which lie in order.
template <class Format>
uint16_t nearest(uint32_t bits) {
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= Format::kInfiniteFrom) return sign | (Format::kLargest + 1);
  uint16_t low = 0, high = Format::kLargest;
  while (low < high) {  // the largest one that is not above
    const uint16_t middle = (low + high + 1) / 2;
    Format::exact_bits(middle) <= magnitude ? low = middle : high = middle - 1;
  }
  if (low == Format::kLargest) return sign | low;
  const auto value = [](uint32_t b) {  // a float32 in units of 2^-149; in double, which flushes none
    const int exponent = static_cast<int>(b >> 23);
    return exponent ? std::ldexp(double((b & 0x7fffff) | 0x800000), exponent - 1) : double(b);
  };
  const double below = value(magnitude) - value(Format::exact_bits(low));
  const double above = value(Format::exact_bits(low + 1)) - value(magnitude);
  return sign | (below > above || (below == above && (low & 1)) ? low + 1 : low);
}

[[noreturn]] void fail(const char* what, const char* of, bool flush, uint32_t from, uint32_t to, uint32_t expected) {
  std::printf("%s %s%s: %08x became %08x instead of %08x\n", of, what, flush ? ", flushing" : "", from, to, expected);
  std::exit(1);
}

// Each number of 16 bits, and the middle to the next, and what lies beside both; and numbers far from them.
template <class Format>
std::vector<uint32_t> bits_to_round() {
  std::vector<uint32_t> found;
  const auto add = [&](uint32_t bits) { found.insert(found.end(), {bits, bits | 0x80000000u}); };
  for (uint32_t h = 0; h <= Format::kLargest; ++h) {
    const uint32_t here = Format::exact_bits(h);
    const uint32_t next = h == Format::kLargest ? 2 * Format::kInfiniteFrom - here : Format::exact_bits(h + 1);
    for (const uint32_t at : {here, here + (next - here) / 2}) {
      for (const uint32_t bits : {at ? at - 1 : at, at, at + 1}) add(bits);
    }
  }
  for (const uint32_t special : {0x1u, 0x7fffffu, 0x800000u, 0x7f7fffffu, 0x7f800000u}) add(special);
  return found;
}

template <class Narrow, class Format>
void check_dtype(const char* name, bool flush) {
  using Stored = typename Format::Stored;
  std::vector<Stored> numbers(65536);
  for (uint32_t h = 0; h < 65536; ++h) numbers[h].bits = static_cast<uint16_t>(h);
  std::vector<float> values(65536);
  std::vector<uint32_t> to_round = bits_to_round<Format>();
  std::vector<uint16_t> expected;
  for (const uint32_t bits : to_round) expected.push_back(nearest<Format>(bits));
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff812345u, 0x7fffffffu}) {
    Stored of_one;
    store(of_one, float_from_bits(nan));
    to_round.push_back(nan);
    expected.push_back(of_one.bits);
  }
  std::vector<float> floats(to_round.size());
  std::memcpy(floats.data(), to_round.data(), 4 * floats.size());
  const auto count = static_cast<int64_t>(floats.size());
  std::vector<Stored> written(count), rounded(count), rounded_one_by_one(count);
  constexpr uint32_t kKey = 0x12345678;

  flush_denormal(flush);
  const Narrow narrow;
  for (int64_t done = 0, size = 1; done < 65536; done += size, size = size % 77 + 1) {  // of all lengths
    read_many(narrow, numbers.data() + done, std::min<int64_t>(size, 65536 - done), values.data() + done);
  }
  for (int64_t done = 0, size = 1; done < count; done += size, size = size % 77 + 1) {
    write_many(narrow, written.data() + done, std::min<int64_t>(size, count - done), floats.data() + done);
  }
  for (int64_t done = 0, size = cpu::kRun; done < count; done += size, size = size % 160 + cpu::kRun) {
    const int64_t here = std::min<int64_t>(size, count - done);
    round_many(narrow, rounded.data() + done, here, floats.data() + done, kKey, static_cast<uint32_t>(done));
  }
  for (int64_t i = 0; i < count; ++i) store(rounded_one_by_one[i], floats[i], noise(kKey, i));
  flush_denormal(false);

  for (uint32_t h = 0; h < 65536; ++h) {
    const uint32_t bits = bits_from_float(values[h]), exact = Format::exact_bits(h);
    const bool nan = (exact & 0x7fffffff) > 0x7f800000u;
    const bool right = nan ? (bits & 0x7fffffff) > 0x7f800000u && bits >> 31 == h >> 15 : bits == exact;
    if (!right) fail("read", name, flush, h, bits, exact);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (written[i].bits != expected[i]) fail("write", name, flush, to_round[i], written[i].bits, expected[i]);
    const uint16_t random = rounded_one_by_one[i].bits;
    if (rounded[i].bits != random) fail("round", name, flush, to_round[i], rounded[i].bits, random);
  }
}

template <class Narrow>
void check(const char* name) {
  for (const bool flush : {false, true}) {
    check_dtype<Narrow, Halves>((std::string(name) + " " + Halves::kName).c_str(), flush);
    check_dtype<Narrow, Brains>((std::string(name) + " " + Brains::kName).c_str(), flush);
  }
  std::printf("%s: right\n", name);
}

}  // namespace

int main() {
  check<cpu::PortableNarrow>("portable");
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) check<cpu::Avx2Narrow>("AVX2");
  if (__builtin_cpu_supports("avx512bw")) check<cpu::Avx512Narrow>("AVX-512");
#elif defined(__aarch64__)
  check<cpu::Neon>("NEON");
#endif
}
