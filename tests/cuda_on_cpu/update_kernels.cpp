// Runs the CUDA update kernels thread by thread and compares every byte with the CPU's step. Prints the number of tensors
// compared and of those that differ.
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels_cuda.cuh"

using namespace fastclip;
using namespace fastclip::cuda;

namespace {

constexpr int64_t kSizes[] = {1, 2, 3, 7, 8, 255, 256, 257, 1023, 1025, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 1, 3};

void one_thread(int count, void (*work)(void*), void* context) {
  for (int i = 0; i < count; ++i) work(context);
}

// The arrays of a step: all sizes, one after the other, from `misaligned` elements behind an aligned address.
template <class Stored>
struct Arrays {
  std::vector<Stored> memory;

  Arrays(std::mt19937& random, int misaligned) {
    std::normal_distribution<float> normal;
    for (const int64_t size : kSizes) memory.resize(memory.size() + (size + 63) / 64 * 64);
    memory.resize(memory.size() + misaligned);
    for (auto& value : memory) store(value, static_cast<ComputeType<Stored>>(normal(random)));
  }
};

template <class Stored>
Step make_step(Arrays<Stored>& params, Arrays<Stored>& grads, Arrays<Stored>& buffers, int misaligned, DType dtype,
               Momentum momentum, const Hyper& hyper) {
  Step step;
  step.hypers = {hyper};
  int64_t at = misaligned;
  for (const int64_t size : kSizes) {
    step.tensors.push_back({&params.memory[at], &grads.memory[at],
                            momentum == Momentum::none ? nullptr : &buffers.memory[at], size, step.chunks, 0, dtype, momentum});
    step.chunks += (size + kChunk - 1) / kChunk;
    step.elements += size;
    at += (size + 63) / 64 * 64;
  }
  return step;
}

template <Kernel kKernel, DTypes kDTypes>
void run_kernel(const Step& step, unsigned blocks) {
  static Arguments<kSmallTable> arguments;
  arguments.header = {};
  arguments.header.chunks = step.chunks;
  arguments.header.tensors = static_cast<uint32_t>(step.tensors.size());
  arguments.header.hypers = 1;
  memcpy(arguments.table, step.hypers.data(), sizeof(Hyper));
  auto* entry = reinterpret_cast<Entry*>(arguments.table + sizeof(Hyper));
  for (const auto& tensor : step.tensors) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; };
    *entry = {};
    entry->param = tensor.param;
    entry->grad = tensor.grad;
    entry->momentum_buffer = tensor.momentum_buffer;
    entry->numel = tensor.numel;
    entry->first_chunk = static_cast<uint32_t>(tensor.first_chunk);
    entry->dtype = tensor.dtype;
    entry->momentum = tensor.momentum;
    entry->aligned = aligned(tensor.param) && aligned(tensor.grad) && aligned(tensor.momentum_buffer);
    ++entry;
  }
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) update_kernel<kKernel, kDTypes>(arguments);
  }
}

int compared = 0, different = 0;

template <class Stored, DTypes kDTypes>
void compare(DType dtype, Momentum momentum, const Hyper& hyper, int misaligned, unsigned blocks) {
  std::mt19937 random(compared);
  Arrays<Stored> params(random, misaligned), grads(random, misaligned), buffers(random, misaligned);
  auto params_there = params, buffers_there = buffers;
  cpu::run(make_step(params, grads, buffers, misaligned, dtype, momentum, hyper), cpu::ThreadPool{1, one_thread});
  const Step step = make_step(params_there, grads, buffers_there, misaligned, dtype, momentum, hyper);
  momentum == Momentum::none ? run_kernel<Kernel::sgd, kDTypes>(step, blocks)
                             : run_kernel<Kernel::sgd_momentum, kDTypes>(step, blocks);
  compared += static_cast<int>(step.tensors.size());
  // The whole memory: also what lies between the tensors.
  const size_t bytes = params.memory.size() * sizeof(Stored);
  if (memcmp(params.memory.data(), params_there.memory.data(), bytes) != 0 ||
      memcmp(buffers.memory.data(), buffers_there.memory.data(), bytes) != 0) {
    ++different;
  }
}

}  // namespace

int main() {
  for (const Momentum momentum : {Momentum::none, Momentum::first, Momentum::running}) {
    for (const int flags : {0, 1, 2, 4, 7}) {
      Hyper hyper{};
      hyper.lr = 0.1;
      hyper.momentum = momentum == Momentum::none ? 0 : 0.9;
      hyper.dampening = 0.25;
      hyper.weight_decay = flags & 1 ? 0.01 : 0;
      hyper.nesterov = flags & 2;
      hyper.maximize = flags & 4;
      hyper.clip_low = -0.5;
      hyper.clip_high = 0.4;
      for (const int misaligned : {0, 3}) {
        for (const unsigned blocks : {1u, 7u}) {
          compare<float, DTypes::float32>(DType::float32, momentum, hyper, misaligned, blocks);
          compare<double, DTypes::float64>(DType::float64, momentum, hyper, misaligned, blocks);
          compare<BFloat16, DTypes::bfloat16>(DType::bfloat16, momentum, hyper, misaligned, blocks);
          compare<Float16, DTypes::mixed>(DType::float16, momentum, hyper, misaligned, blocks);
        }
      }
    }
  }
  std::printf("%d compared, %d different\n", compared, different);
  return different != 0;
}
