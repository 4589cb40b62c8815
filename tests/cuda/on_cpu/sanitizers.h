// What fibers and shared memory have to tell the sanitizers; nothing without them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
namespace asan {
constexpr bool kOn = true;
constexpr auto leave = __sanitizer_start_switch_fiber;
constexpr auto arrive = __sanitizer_finish_switch_fiber;
constexpr auto poison = __asan_poison_memory_region;
constexpr auto unpoison = __asan_unpoison_memory_region;
}  // namespace asan
#else
namespace asan {
constexpr bool kOn = false;
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
}  // namespace asan
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_java_alloc(uintptr_t, size_t);
extern "C" void __tsan_java_free(uintptr_t, size_t);
namespace tsan {
constexpr bool kOn = true;
constexpr auto current_thread = __tsan_get_current_fiber;
constexpr auto create_thread = __tsan_create_fiber;
constexpr auto destroy_thread = __tsan_destroy_fiber;
constexpr auto switch_to = __tsan_switch_to_fiber;
constexpr auto acquire = __tsan_acquire;
constexpr auto release = __tsan_release;
constexpr auto allocated = __tsan_java_alloc;  // nobody has accessed the memory yet
constexpr auto freed = __tsan_java_free;
}  // namespace tsan
// With --param tsan-distinguish-volatile=1 these are called for volatile accesses. Kernels spin on what others write
// atomically, which is no race on a GPU; the order of everything else comes from the fences.
#define VOLATILE_ACCESS(size)                                    \
  extern "C" void __tsan_volatile_read##size(void*) {}           \
  extern "C" void __tsan_volatile_write##size(void*) {}          \
  extern "C" void __tsan_unaligned_volatile_read##size(void*) {} \
  extern "C" void __tsan_unaligned_volatile_write##size(void*) {}
VOLATILE_ACCESS(1)
VOLATILE_ACCESS(2)
VOLATILE_ACCESS(4)
VOLATILE_ACCESS(8)
VOLATILE_ACCESS(16)
#undef VOLATILE_ACCESS
#else
namespace tsan {
constexpr bool kOn = false;
inline void* current_thread() { return nullptr; }
inline void* create_thread(unsigned) { return nullptr; }
inline void destroy_thread(void*) {}
inline void switch_to(void*, unsigned) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void allocated(uintptr_t, size_t) {}
inline void freed(uintptr_t, size_t) {}
}  // namespace tsan
#endif
constexpr unsigned kTsanNoSync = 1;  // switching fibers orders nothing
