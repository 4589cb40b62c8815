// Every conversion of float16 that this machine has, against exact arithmetic, with subnormal numbers and without.
// Prints a line for each, and stops with 1 at the first that is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/halves.h"

using namespace fastclip;

namespace {

// Whether the CPU takes subnormal float32 for 0, as torch.set_flush_denormal(True) makes it.
void flush_denormal(bool flush) {
#if defined(__x86_64__)
  constexpr unsigned kFlushAndZero = 0x8040;
  _mm_setcsr(flush ? _mm_getcsr() | kFlushAndZero : _mm_getcsr() & ~kFlushAndZero);
#elif defined(__aarch64__)
  unsigned long mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  constexpr unsigned long kFlush = 1ul << 24;
  mode = flush ? mode | kFlush : mode & ~kFlush;
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

// Bits of the float32 that a half is, put together from integers.
uint32_t exact_bits(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, digits = half & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000u | digits << 13;
  if (exponent > 0) return sign | (exponent + 112) << 23 | digits << 13;
  if (digits == 0) return sign;
  int shift = 0;
  while (!(digits << shift & 0x400)) ++shift;
  return sign | uint32_t(113 - shift) << 23 | (digits << shift & 0x3ff) << 13;
}

// The nearest half, even in a tie: found among all of one sign, which lie in order.
uint16_t nearest(uint32_t bits) {
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  uint16_t low = 0, high = 0x7bff;
  while (low < high) {  // the largest half that is not above
    const uint16_t middle = (low + high + 1) / 2;
    exact_bits(middle) <= magnitude ? low = middle : high = middle - 1;
  }
  if (low == 0x7bff) return sign | low;
  const auto value = [](uint32_t b) {  // a float32 in units of 2^-149, below 2^64; in double, which flushes none
    const int exponent = static_cast<int>(b >> 23);
    return exponent ? std::ldexp(double((b & 0x7fffff) | 0x800000), exponent - 1) : double(b);
  };
  const double below = value(magnitude) - value(exact_bits(low)), above = value(exact_bits(low + 1)) - value(magnitude);
  return sign | (below > above || (below == above && (low & 1)) ? low + 1 : low);
}

[[noreturn]] void fail(const char* what, const char* of, bool flush, uint32_t from, uint32_t to, uint32_t expected) {
  std::printf("%s %s%s: %08x became %08x instead of %08x\n", of, what, flush ? ", flushing" : "", from, to, expected);
  std::exit(1);
}

template <class Halves>
void check(const char* name) {
  for (const bool flush : {false, true}) {
    std::vector<Float16> halves(65536), written;
    for (uint32_t h = 0; h < 65536; ++h) halves[h].bits = static_cast<uint16_t>(h);
    std::vector<float> values(65536);
    std::vector<uint32_t> to_round;
    for (uint32_t h = 0; h < 0x7c00; ++h) {  // each half, and the middle to the next, and what lies beside both
      const uint32_t here = exact_bits(h), next = h == 0x7bff ? 0x47800000u : exact_bits(h + 1);
      for (const uint32_t at : {here, here + (next - here) / 2}) {
        for (const uint32_t bits : {at ? at - 1 : at, at, at + 1}) {
          to_round.push_back(bits);
          to_round.push_back(bits | 0x80000000u);
        }
      }
    }
    for (const uint32_t special : {0x1u, 0x7fffffu, 0x800000u, 0x7f7fffffu, 0x7f800000u}) {
      to_round.push_back(special);
      to_round.push_back(special | 0x80000000u);
    }
    std::vector<uint16_t> expected;
    for (const uint32_t bits : to_round) expected.push_back(nearest(bits));
    std::vector<float> floats(to_round.size());
    std::memcpy(floats.data(), to_round.data(), 4 * floats.size());
    written.resize(floats.size());

    flush_denormal(flush);
    for (int64_t done = 0, size = 1; done < 65536; done += size, size = size % 37 + 1) {  // runs of all lengths
      Halves::read(halves.data() + done, std::min<int64_t>(size, 65536 - done), values.data() + done);
    }
    const auto count = static_cast<int64_t>(floats.size());
    for (int64_t done = 0, size = 1; done < count; done += size, size = size % 37 + 1) {
      Halves::write(written.data() + done, std::min<int64_t>(size, count - done), floats.data() + done);
    }
    flush_denormal(false);

    for (uint32_t h = 0; h < 65536; ++h) {
      uint32_t bits;
      std::memcpy(&bits, &values[h], 4);
      const bool nan = (h & 0x7fff) > 0x7c00;
      const bool right = nan ? (bits & 0x7fffffff) > 0x7f800000u && bits >> 31 == h >> 15 : bits == exact_bits(h);
      if (!right) fail("read", name, flush, h, bits, exact_bits(h));
    }
    for (size_t i = 0; i < to_round.size(); ++i) {
      if (written[i].bits != expected[i]) fail("write", name, flush, to_round[i], written[i].bits, expected[i]);
    }
  }
  std::printf("%s: right\n", name);
}

}  // namespace

int main() {
  check<cpu::PortableHalves>("portable");
#if defined(__x86_64__)
  if (cpu::F16c::supported()) check<cpu::F16c>("F16C");
  if (__builtin_cpu_supports("avx512f")) check<cpu::Avx512Halves>("AVX-512");
#elif defined(__aarch64__)
  check<cpu::Neon>("NEON");
#endif
}
