// Threads of a kernel, as fibers. One runs until its thread waits for something; then it leaves its request and goes
// back to the scheduler, on the stack of the launch, which does all the bookkeeping. So only `running`, a few counters
// and a fiber's own request are touched from fibers, in functions that ThreadSanitizer doesn't see.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"
#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // as large as any page

#define UNSEEN __attribute__((no_sanitize("address", "thread", "undefined")))

struct Request {
  Op op;
  unsigned mask;
  uint64_t value;
  int source_lane;
  const void* accessed;  // of a failure
};

struct Fiber {
  void* context[5];  // of __builtin_setjmp
  unsigned char* stack = nullptr;
  bool idle = false;  // ready to call the next kernel
  void* asan_stack = nullptr;
  void* tsan_thread = nullptr;
  Request request;
  uint64_t result;  // of the request
};

Fiber* running = nullptr;
const Kernel* kernel = nullptr;  // that is launched
void* scheduler_context[5];
ucontext_t start_context;
void* scheduler_tsan_thread = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
char launch_begin, launch_end, fence;  // have addresses, for ThreadSanitizer's happens-before

// No caller may know which registers these leave alone: when they return, others have run.
#define SWITCH __attribute__((noipa))

// Not swapcontext: it makes a system call. A function of its own, as the builtin must not jump within one.
UNSEEN SWITCH void jump(void** to) { __builtin_longjmp(to, 1); }
UNSEEN SWITCH void switch_context(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}
UNSEEN SWITCH void start_fiber(void** from) {
  if (__builtin_setjmp(from) == 0) setcontext(&start_context);
}

UNSEEN inline void to_scheduler() {
  Fiber& fiber = *running;
  asan::leave(&fiber.asan_stack, scheduler_stack, scheduler_stack_size);
  tsan::switch_to(scheduler_tsan_thread, kTsanNoSync);
  switch_context(fiber.context, scheduler_context);
  asan::arrive(fiber.asan_stack, &scheduler_stack, &scheduler_stack_size);
}

UNSEEN void fiber_main() {
  asan::arrive(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    to_scheduler();
    kernel->call(*kernel);
    running->request.op = Op::end;
  }
}

UNSEEN void to_fiber(Fiber& fiber, bool start = false) {
  running = &fiber;
  void* asan_stack = nullptr;
  asan::leave(&asan_stack, fiber.stack, kStackBytes);
  tsan::switch_to(fiber.tsan_thread, kTsanNoSync);
  start ? start_fiber(scheduler_context) : switch_context(scheduler_context, fiber.context);
  asan::arrive(asan_stack, nullptr, nullptr);
}

// ThreadSanitizer's happens-before, as if the thread of a fiber asked for it.
enum class Order { release, acquire };
UNSEEN void order(const Fiber& fiber, Order order, void* with) {
  tsan::switch_to(fiber.tsan_thread, kTsanNoSync);
  order == Order::release ? tsan::release(with) : tsan::acquire(with);
  tsan::switch_to(scheduler_tsan_thread, kTsanNoSync);
}

// Makes a fiber wait for its first kernel, or again for its next after a launch that failed in its midst.
void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("cuda_on_cpu: no memory for a stack");
      std::abort();
    }
    fiber.stack = static_cast<unsigned char*>(memory) + kGuardBytes;
  }
  asan::unpoison(fiber.stack, kStackBytes);
  if (fiber.tsan_thread) tsan::destroy_thread(fiber.tsan_thread);
  fiber.tsan_thread = tsan::create_thread(0);
  getcontext(&start_context);
  // Stacks that start at different offsets in their pages don't fight for the same lines of the cache.
  const size_t offset = reinterpret_cast<uintptr_t>(fiber.stack) / (kStackBytes + kGuardBytes) % 32 * 192;
  start_context.uc_stack.ss_sp = fiber.stack;
  start_context.uc_stack.ss_size = kStackBytes - (asan::kOn ? 0 : offset);
  start_context.uc_link = nullptr;
  makecontext(&start_context, fiber_main, 0);
  to_fiber(fiber, true);
  fiber.idle = true;
}

}  // namespace
}  // namespace cuda_on_cpu
