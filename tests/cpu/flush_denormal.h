// A mode of the CPU.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Whether the CPU takes subnormal float32 for 0, as torch.set_flush_denormal(True) makes it.
inline void flush_denormal(bool flush) {
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
