// Runs the fibers of a grid, block by block or all together, and decides who goes on when.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <vector>

#include "fibers.h"

namespace {
constexpr size_t kCanaryBytes = 1 << 10;  // behind the shared memory of a block, where its mistakes most likely write
}  // namespace

__attribute__((
    visibility("default"))) uint4 dynamic_shared_memory[(cuda_on_cpu::kSharedCapacity + kCanaryBytes) / sizeof(uint4)];

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxTsanThreads = 4096;  // libtsan has 8,128 at the most
constexpr unsigned char kGarbage = 0xA5;  // what shared memory starts with
constexpr uint64_t kNoValue = 0x7f7f7f7f7f7f7f7f;  // of a lane out of the mask; large for float and double, too
constexpr uint64_t kMaxIdleWaits = 1'000'000;  // in __nanosleep, while no other thread gets anywhere
constexpr uint64_t kMaxWaits = 50'000'000;  // in __nanosleep, in one launch

int schedule = kInOrder;
uint64_t random_state = 0;

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
      : index(index),
        fibers(fibers),
        threads(threads),
        alive(threads),
        at_barrier(0),
        waiting_lanes((threads + kWarp - 1) / kWarp),
        shared(shared_bytes, kGarbage) {
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
        if (is_shared(request.accessed)) {
          fail(cudaErrorInvalidAddressSpace,
               "thread %u of block %u: %p is shared memory, and no global access finds it", thread, block.index,
               request.accessed);
        }
        fail(cudaErrorMisalignedAddress, "thread %u of block %u: misaligned address %p for %d bytes", thread,
             block.index, request.accessed, static_cast<int>(request.value));
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

}  // namespace
}  // namespace cuda_on_cpu
