// The scheduler of fibers, the launches and the fake device behind cuda_runtime.h.
//
// A fiber runs until its thread waits for something; then it leaves its request and goes back to the scheduler, on the
// stack of the launch, which does all the bookkeeping. So only `running`, a few counters and a fiber's own request are
// touched from fibers, in functions that ThreadSanitizer doesn't see.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <vector>

// What the sanitizers want to know; nothing without them.
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

namespace {
constexpr size_t kSharedCapacity = 228 << 10;
constexpr size_t kCanaryBytes = 1 << 10;  // behind the shared memory of a block, where its mistakes most likely write
}  // namespace

__attribute__((visibility("default"))) uint4 dynamic_shared_memory[(kSharedCapacity + kCanaryBytes) / sizeof(uint4)];

namespace cuda_on_cpu {

Place place;
Counters counters;

namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlocks = 32;  // on a multiprocessor
constexpr size_t kMaxArgument = 32764;
constexpr size_t kSharedWithoutOptIn = 48 << 10;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // as large as any page
constexpr size_t kMaxTsanThreads = 4096;  // libtsan has 8,128 at the most
constexpr unsigned char kGarbage = 0xA5;  // what shared memory starts with
constexpr uint64_t kNoValue = 0x7f7f7f7f7f7f7f7f;  // of a lane out of the mask; large for float and double, too
constexpr uint64_t kMaxIdleWaits = 1'000'000;  // in __nanosleep, while no other thread gets anywhere
constexpr uint64_t kMaxWaits = 50'000'000;  // in __nanosleep, in one launch

Device device;
int schedule = kInOrder;
uint64_t random_state = 0;
bool capturing = false;
int current_device = 0;
cudaError_t last_error = cudaSuccess, fault = cudaSuccess;
std::map<const void*, int> allowed_shared;

// What ends a launch: thrown on the scheduler's stack only.
struct Failure {
  cudaError_t error;
};

__attribute__((format(printf, 2, 3))) [[noreturn]] void fail(cudaError_t error, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_on_cpu: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  throw Failure{error};
}

// splitmix64
uint64_t random_below(uint32_t bound) {
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return ((z ^ (z >> 31)) >> 32) * bound >> 32;
}

// ---- fibers --------------------------------------------------------------------------------------------------------

#define UNSEEN __attribute__((no_sanitize("address", "thread", "undefined")))

struct Request {
  Op op;
  unsigned mask;
  uint64_t value;
  int source_lane;
  const void* misaligned;
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

// ---- blocks --------------------------------------------------------------------------------------------------------

class ThreadSet {
 public:
  bool empty() const {
    uint64_t all = 0;
    for (const uint64_t word : words_) all |= word;
    return all == 0;
  }
  void add(unsigned thread) { words_[thread / 64] |= uint64_t{1} << thread % 64; }
  void remove(unsigned thread) { words_[thread / 64] &= ~(uint64_t{1} << thread % 64); }
  void add_all_of(ThreadSet& others) {
    for (int i = 0; i < kWords; ++i) words_[i] |= others.words_[i];
    others = {};
  }
  int lowest() const {
    int i = 0;
    while (words_[i] == 0) ++i;
    return i * 64 + __builtin_ctzll(words_[i]);
  }
  int highest() const {
    int i = kWords - 1;
    while (words_[i] == 0) --i;
    return i * 64 + 63 - __builtin_clzll(words_[i]);
  }
  int any_of_the(unsigned threads) const {  // the first from a random one on
    const unsigned from = static_cast<unsigned>(random_below(threads));
    const uint64_t first = words_[from / 64] >> from % 64;
    if (first) return from + __builtin_ctzll(first);
    for (unsigned i = from / 64 + 1; i < kWords; ++i) {
      if (words_[i]) return i * 64 + __builtin_ctzll(words_[i]);
    }
    return lowest();
  }

 private:
  static constexpr int kWords = kMaxThreads / 64;
  uint64_t words_[kWords] = {};
};

struct Block {
  unsigned index;
  const std::unique_ptr<Fiber>* fibers;
  unsigned threads;
  unsigned alive;
  unsigned at_barrier;
  ThreadSet ready, asleep, waiting;  // waiting: in __syncthreads
  std::vector<unsigned> waiting_lanes;  // of each warp, in a warp operation
  std::vector<unsigned char> shared;  // while another block's is in place

  Block(unsigned index, const std::unique_ptr<Fiber>* fibers, unsigned threads, size_t shared_bytes)
      : index(index), fibers(fibers), threads(threads), alive(threads), at_barrier(0),
        waiting_lanes((threads + kWarp - 1) / kWarp), shared(shared_bytes, kGarbage) {
    for (unsigned i = 0; i < threads; ++i) ready.add(i);
  }
};

void release_barrier(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier < block.alive) return;
  if (tsan::kOn) {
    for (const Order to : {Order::release, Order::acquire}) {
      ThreadSet rest = block.waiting;
      for (unsigned i = 0; i < block.at_barrier; ++i) {
        const int thread = rest.lowest();
        rest.remove(thread);
        // The block's fibers are its own; so is their address.
        order(*block.fibers[thread], to, &block.fibers[0]->result);
      }
    }
  }
  block.ready.add_all_of(block.waiting);
  block.at_barrier = 0;
}

template <class Body>
void for_lanes(unsigned mask, const Body& body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
}

// Lets the lanes of a mask go on, if all have come.
void finish_warp_operation(Block& block, unsigned warp, const Request& request) {
  const unsigned mask = request.mask;
  if ((block.waiting_lanes[warp] & mask) != mask) return;
  const auto* const lanes = block.fibers + warp * kWarp;
  bool same_mask = true, same_op = true;
  unsigned voted = 0;
  uint64_t values[kWarp];
  for_lanes(mask, [&](int lane) {
    const Request& other = lanes[lane]->request;
    same_mask &= other.mask == mask;
    same_op &= other.op == request.op;
    values[lane] = other.value;
    if (other.value != 0) voted |= 1u << lane;
  });
  if (!same_mask) return;  // some wait for fewer first
  if (!same_op) {
    fail(cudaErrorLaunchFailure, "lanes %#x of warp %u of block %u came to different warp operations", mask, warp,
         block.index);
  }
  for_lanes(mask, [&](int lane) {
    uint64_t& result = lanes[lane]->result;
    switch (request.op) {
      case Op::shuffle: {
        const int source = lanes[lane]->request.source_lane;
        result = mask >> source & 1 ? values[source] : kNoValue;
        break;
      }
      case Op::ballot: result = voted; break;
      case Op::any: result = voted != 0; break;
      case Op::all: result = voted == mask; break;
      default: break;
    }
    block.ready.add(warp * kWarp + lane);
  });
  block.waiting_lanes[warp] &= ~mask;
  if (tsan::kOn) {
    Fiber& first = *lanes[__builtin_ctz(mask)];
    for (const Order to : {Order::release, Order::acquire}) {
      for_lanes(mask, [&](int lane) { order(*lanes[lane], to, &first.request); });
    }
  }
}

// ---- a launch ------------------------------------------------------------------------------------------------------

// Runs blocks that are alive together.
class Scheduler {
 public:
  explicit Scheduler(std::vector<Block>& blocks, size_t shared_bytes) : blocks_(blocks), shared_bytes_(shared_bytes) {}

  void run() {
    size_t ended = 0;
    while (ended < blocks_.size()) {
      const Block* const last = block_;
      if (!block_ || block_->ready.empty() || (schedule == kRandom && random_below(128) == 0)) choose_block();
      if (block_ != last) load_shared(*block_);
      ended += step(*block_);
    }
    check_canary();
  }

 private:
  // The next block that can go on. Threads in __nanosleep wake up when their block's turn comes.
  void choose_block() {
    const size_t count = blocks_.size();
    const size_t steps = schedule == kReversed ? count - 1 : 1;
    const size_t last = schedule == kReversed ? 0 : count - 1;
    size_t i = block_ ? block_ - blocks_.data() : last;
    if (schedule == kRandom) i = random_below(static_cast<uint32_t>(count));
    for (size_t tried = 0; tried < count; ++tried) {
      i = (i + steps) % count;
      Block& block = blocks_[i];
      block.ready.add_all_of(block.asleep);
      if (block.ready.empty()) continue;
      block_ = &block;
      return;
    }
    fail_deadlocked();
  }

  // Lets one thread run until it waits. True if it was the last of the block.
  bool step(Block& block) {
    const unsigned thread = schedule == kInOrder    ? block.ready.lowest()
                            : schedule == kReversed ? block.ready.highest()
                                                    : block.ready.any_of_the(block.threads);
    block.ready.remove(thread);
    Fiber& fiber = *block.fibers[thread];
    fiber.idle = false;
    place.thread = {thread, 0, 0};
    place.block = {block.index, 0, 0};
    to_fiber(fiber);

    const Request& request = fiber.request;
    idle_waits_ = request.op == Op::sleep ? idle_waits_ + 1 : 0;
    switch (request.op) {
      case Op::sleep:
        block.asleep.add(thread);
        if (idle_waits_ > kMaxIdleWaits || ++waits_ > kMaxWaits) {
          fail(cudaErrorLaunchTimeout, "thread %u of block %u and maybe others spin in __nanosleep without progress",
               thread, block.index);
        }
        break;
      case Op::barrier:
        block.waiting.add(thread);
        ++block.at_barrier;
        release_barrier(block);
        break;
      case Op::end:
        order(fiber, Order::release, &launch_end);
        fiber.idle = true;
        --block.alive;
        release_barrier(block);
        return block.alive == 0;
      case Op::fail:
        fail(cudaErrorMisalignedAddress, "thread %u of block %u: misaligned address %p for %d bytes", thread,
             block.index, request.misaligned, static_cast<int>(request.value));
      default:
        if (!(request.mask >> thread % kWarp & 1)) {
          fail(cudaErrorLaunchFailure, "thread %u of block %u is not in the mask %#x of its own warp operation", thread,
               block.index, request.mask);
        }
        block.waiting_lanes[thread / kWarp] |= 1u << thread % kWarp;
        finish_warp_operation(block, thread / kWarp, request);
    }
    return false;
  }

  // All blocks see the same array. That neither the copies nor what another block did to the same addresses look like
  // races, ThreadSanitizer forgets all accesses to the array when another block comes in: this adds no order between
  // threads that could hide a race. It can miss one between accesses before and after a change of blocks, but in order
  // and reversed that happens only where a block waits for another.
  void load_shared(Block& block) {
    check_canary();
    forget_accesses();
    auto* const memory = reinterpret_cast<unsigned char*>(dynamic_shared_memory);
    if (in_place_) std::copy_n(memory, shared_bytes_, in_place_->shared.begin());
    std::copy(block.shared.begin(), block.shared.end(), memory);
    forget_accesses();
    in_place_ = &block;
  }

  static void forget_accesses() {
    const auto address = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    tsan::freed(address, sizeof(dynamic_shared_memory));
    tsan::allocated(address, sizeof(dynamic_shared_memory));
  }

  // AddressSanitizer finds an access there when it happens.
  UNSEEN void check_canary() const {
    if (asan::kOn) return;
    const auto* const end = reinterpret_cast<const unsigned char*>(dynamic_shared_memory) + shared_bytes_;
    for (size_t i = 0; i < kCanaryBytes; ++i) {
      if (end[i] == kGarbage) continue;
      fail(cudaErrorLaunchFailure, "a write %zu bytes behind the end of %zu bytes of shared memory, by block %u", i,
           shared_bytes_, in_place_->index);
    }
  }

  [[noreturn]] void fail_deadlocked() const {
    for (const Block& block : blocks_) {
      if (block.alive == 0) continue;
      int in_warps = 0;
      for (const unsigned lanes : block.waiting_lanes) in_warps += __popc(lanes);
      std::fprintf(stderr, "cuda_on_cpu: block %u: %u threads wait in __syncthreads, %d for other lanes, %u ended\n",
                   block.index, block.at_barrier, in_warps, block.threads - block.alive);
    }
    fail(cudaErrorLaunchTimeout, "deadlock: no thread can go on");
  }

  std::vector<Block>& blocks_;
  size_t shared_bytes_;
  Block* block_ = nullptr;
  Block* in_place_ = nullptr;
  uint64_t idle_waits_ = 0, waits_ = 0;
};

void prepare_shared(size_t bytes) {
  auto* const memory = reinterpret_cast<unsigned char*>(dynamic_shared_memory);
  asan::unpoison(memory, sizeof(dynamic_shared_memory));
  memset(memory + bytes, kGarbage, kCanaryBytes);
  asan::poison(memory + bytes, sizeof(dynamic_shared_memory) - bytes);
}

void run_blocks(unsigned blocks, size_t sets, const std::unique_ptr<Fiber>* fibers, unsigned threads, size_t shared,
                bool cooperative) {
  std::vector<unsigned> indices(blocks);
  std::iota(indices.begin(), indices.end(), 0u);
  if (schedule == kReversed) std::reverse(indices.begin(), indices.end());
  if (schedule == kRandom) {
    for (unsigned i = blocks; i > 1; --i) std::swap(indices[i - 1], indices[random_below(i)]);
  }
  if (cooperative) std::sort(indices.begin(), indices.end());  // there the scheduler chooses
  std::vector<Block> together;
  for (const unsigned i : indices) {
    together.emplace_back(i, fibers + i % sets * threads, threads, shared);
    if (cooperative && together.size() < blocks) continue;
    Scheduler(together, shared).run();
    together.clear();
  }
}

cudaError_t run_grid(unsigned blocks, unsigned threads, size_t shared, bool cooperative) {
  // Blocks one after the other can have the same fibers, but as different threads for ThreadSanitizer if it has enough.
  const size_t sets = cooperative ? blocks : tsan::kOn ? std::clamp<size_t>(kMaxTsanThreads / threads, 1, blocks) : 1;
  static auto& fibers = *new std::vector<std::unique_ptr<Fiber>>;
  while (fibers.size() < sets * threads) fibers.push_back(std::make_unique<Fiber>());
  scheduler_tsan_thread = tsan::current_thread();
  tsan::release(&launch_begin);
  for (size_t i = 0; i < sets * threads; ++i) {
    if (!fibers[i]->idle) prepare(*fibers[i]);
    order(*fibers[i], Order::acquire, &launch_begin);
  }
  prepare_shared(shared);
  place.block_size = threads;
  place.grid_size = blocks;

  try {
    run_blocks(blocks, sets, fibers.data(), threads, shared, cooperative);
  } catch (const Failure& failure) {
    for (size_t i = 0; i < sets * threads; ++i) {
      if (!fibers[i]->idle) order(*fibers[i], Order::release, &launch_end);
    }
    tsan::acquire(&launch_end);
    return failure.error;
  }
  tsan::acquire(&launch_end);
  return cudaSuccess;
}

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  ++counters.copies;
  counters.copied_bytes += bytes;
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t synchronize_all() {
  if (capturing) return returned(cudaErrorStreamCaptureUnsupported);
  ++counters.synchronizations;
  return fault;
}

}  // namespace

// ---- what kernels call ---------------------------------------------------------------------------------------------

UNSEEN uint64_t wait(Op op, unsigned mask, uint64_t value, int source_lane) {
  Fiber& fiber = *running;
  fiber.request = {op, mask, value, source_lane, nullptr};
  to_scheduler();
  return fiber.result;
}

UNSEEN void fail_misaligned(const void* pointer, size_t size) {
  running->request = {Op::fail, 0, size, 0, pointer};
  to_scheduler();
  __builtin_unreachable();  // the launch has failed
}

// ---- control and launches ------------------------------------------------------------------------------------------

void set_device(const Device* to) { device = *to; }
void set_schedule(int to, uint64_t seed) {
  schedule = to;
  random_state = seed;
}
void set_capturing(int to) { capturing = to; }
void get_counters(Counters* to) { *to = counters; }
void reset_counters() { counters = {}; }

int allow_shared(const void* function, int bytes) {
  if (bytes < 0 || bytes > device.shared_per_block_optin) return returned(cudaErrorInvalidValue);
  allowed_shared[function] = bytes;
  return cudaSuccess;
}

namespace {
size_t max_shared(const void* function) {
  const auto allowed = allowed_shared.find(function);
  return allowed == allowed_shared.end() ? kSharedWithoutOptIn
                                         : std::max<size_t>(kSharedWithoutOptIn, allowed->second);
}
}  // namespace

int active_blocks(const void* function, int threads, size_t shared) {
  if (threads < 1 || threads > static_cast<int>(kMaxThreads) || shared > max_shared(function)) return 0;
  const int by_threads = device.threads_per_multiprocessor / ((threads + kWarp - 1) / kWarp * kWarp);
  const int needed = static_cast<int>(shared) + device.reserved_shared_per_block;
  const int by_shared = needed == 0 ? by_threads : device.shared_per_multiprocessor / needed;
  return std::min({by_threads, by_shared, static_cast<int>(kMaxBlocks)});
}

int launch(const Kernel& launched, dim3 grid, dim3 block, size_t shared, bool cooperative) {
  static std::mutex& one_at_a_time = *new std::mutex;
  const std::lock_guard lock(one_at_a_time);
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || block.x == 0 || block.x > kMaxThreads) return returned(cudaErrorInvalidConfiguration);
  if (launched.argument_size > kMaxArgument) return returned(cudaErrorInvalidValue);
  if (shared > max_shared(launched.function) || shared > kSharedCapacity) return returned(cudaErrorInvalidValue);
  if (cooperative) {
    if (!device.cooperative) return returned(cudaErrorNotSupported);
    const int resident = device.multiprocessors * active_blocks(launched.function, static_cast<int>(block.x), shared);
    if (grid.x > static_cast<unsigned>(resident)) return returned(cudaErrorCooperativeLaunchTooLarge);
  }
  ++counters.launches;
  counters.cooperative_launches += cooperative;
  counters.last_blocks = grid.x;
  counters.last_threads = block.x;
  counters.last_shared_bytes = shared;
  kernel = &launched;
  const cudaError_t error = run_grid(grid.x, block.x, shared, cooperative);
  if (error != cudaSuccess) fault = error;
  return returned(error);
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// Orders what a thread did before it ahead of what another does after its next: a little more than a GPU's, which also
// needs the flag between them, but a fence that is missing on either side is found.
UNSEEN void __threadfence() {
  tsan::acquire(&fence);
  tsan::release(&fence);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = fault = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchTimeout: return "the launch timed out and was terminated";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* to) {
  *to = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) { return to == 0 ? cudaSuccess : returned(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = device.l2_bytes; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_per_multiprocessor; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = device.cooperative; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_per_block_optin; return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = device.reserved_shared_per_block; return cudaSuccess;
  }
  return returned(cudaErrorInvalidValue);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return capturing ? returned(cudaErrorStreamCaptureUnsupported) : copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  ++counters.memsets;
  if (bytes) memset(to, byte, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return synchronize_all(); }
cudaError_t cudaDeviceSynchronize() { return synchronize_all(); }
