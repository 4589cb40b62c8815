// A step on a GPU: the table of its tensors, and the launches.
#include <algorithm>
#include <cstring>

#include "kernels_cuda.cuh"

namespace fastclip::cuda {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

Entry entry_from(const TensorEntry& tensor) {
  Entry entry{};
  entry.param = tensor.param;
  entry.grad = tensor.grad;
  entry.momentum_buffer = tensor.momentum_buffer;
  entry.numel = tensor.numel;
  entry.first_chunk = static_cast<uint32_t>(tensor.first_chunk);
  entry.hyper = static_cast<uint16_t>(tensor.hyper);
  entry.dtype = tensor.dtype;
  entry.momentum = tensor.momentum;
  entry.aligned = is_aligned(tensor.param) && is_aligned(tensor.grad) && is_aligned(tensor.momentum_buffer);
  return entry;
}

void write_table(const Step& step, unsigned char* bytes) {
  auto* hypers = reinterpret_cast<Hyper*>(bytes);
  std::copy(step.hypers.begin(), step.hypers.end(), hypers);
  std::transform(step.tensors.begin(), step.tensors.end(), reinterpret_cast<Entry*>(hypers + step.hypers.size()),
                 entry_from);
}

// Blocks that fill the device, by kernel; asked for once per device.
template <auto kKernel>
int blocks_for(int device, int64_t chunks) {
  constexpr int kMaxDevices = 64;
  static int resident[kMaxDevices] = {};
  if (resident[device % kMaxDevices] == 0) {
    int multiprocessors = 1, per_multiprocessor = 1;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kKernel, kThreads, 0);
    resident[device % kMaxDevices] = std::max(1, multiprocessors * per_multiprocessor);
  }
  return static_cast<int>(std::min<int64_t>(resident[device % kMaxDevices], chunks));
}

template <auto kKernel, class Args>
void launch(const Step& step, Args& arguments, int device, cudaStream_t stream) {
  void* pointers[] = {&arguments};
  cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(blocks_for<kKernel>(device, step.chunks)), dim3(kThreads),
                   pointers, 0, stream);
}

template <DTypes kDTypes, int kTableBytes>
void launch_for(const Step& step, Arguments<kTableBytes>& arguments, int device, cudaStream_t stream) {
  if (step.norm == Norm::two) launch<measure_kernel<Norm::two, kDTypes, kTableBytes>>(step, arguments, device, stream);
  if (step.norm == Norm::inf) launch<measure_kernel<Norm::inf, kDTypes, kTableBytes>>(step, arguments, device, stream);
  const bool momentum = std::any_of(step.tensors.begin(), step.tensors.end(),
                                    [](const TensorEntry& t) { return t.momentum != Momentum::none; });
  if (step.rule == Rule::clip_grad) {
    launch<update_kernel<Kernel::clip_grad, kDTypes, kTableBytes>>(step, arguments, device, stream);
  } else if (momentum) {
    launch<update_kernel<Kernel::sgd_momentum, kDTypes, kTableBytes>>(step, arguments, device, stream);
  } else {
    launch<update_kernel<Kernel::sgd, kDTypes, kTableBytes>>(step, arguments, device, stream);
  }
}

template <int kTableBytes>
void launch_all(const Step& step, Arguments<kTableBytes>& arguments, int device, cudaStream_t stream) {
  const DType dtype = step.tensors.front().dtype;
  const bool mixed = std::any_of(step.tensors.begin(), step.tensors.end(),
                                 [dtype](const TensorEntry& t) { return t.dtype != dtype; });
  switch (mixed ? DTypes::mixed : static_cast<DTypes>(dtype)) {
    case DTypes::float32: return launch_for<DTypes::float32>(step, arguments, device, stream);
    case DTypes::float64: return launch_for<DTypes::float64>(step, arguments, device, stream);
    case DTypes::bfloat16: return launch_for<DTypes::bfloat16>(step, arguments, device, stream);
    case DTypes::float16: return launch_for<DTypes::float16>(step, arguments, device, stream);
    case DTypes::mixed: return launch_for<DTypes::mixed>(step, arguments, device, stream);
  }
}

// The device that was current, again, when this goes.
struct CurrentDevice {
  int previous = 0;
  explicit CurrentDevice(int device) {
    cudaGetDevice(&previous);
    cudaSetDevice(device);
  }
  ~CurrentDevice() { cudaSetDevice(previous); }
};

}  // namespace

int64_t table_bytes(const Step& step) {
  return static_cast<int64_t>(step.hypers.size() * sizeof(Hyper) + step.tensors.size() * sizeof(Entry));
}

bool needs_device_table(const Step& step) { return table_bytes(step) > kLargeTable; }

const char* run(const Step& step, DeviceTable& table, int device, void* on_stream) {
  if (step.hypers.size() > UINT16_MAX) return "more than 65,535 groups";
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const CurrentDevice current(device);
  cudaGetLastError();  // not ours

  const Header header{step.chunks,    static_cast<uint32_t>(step.tensors.size()),
                      static_cast<uint32_t>(step.hypers.size()),
                      step.max_norm,  step.grad_scale,
                      step.found_inf, step.outcome,
                      step.measures,  nullptr,
                      step.norm != Norm::none};
  const int64_t bytes = table_bytes(step);
  if (bytes <= kSmallTable || needs_device_table(step)) {
    Arguments<kSmallTable> arguments;
    arguments.header = header;
    if (bytes <= kSmallTable) {
      write_table(step, arguments.table);
    } else {
      std::vector<unsigned char> fresh(bytes);
      write_table(step, fresh.data());
      if (fresh != table.uploaded) {  // some address changed
        cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
        cudaStreamIsCapturing(stream, &capturing);
        if (capturing != cudaStreamCaptureStatusNone) {
          return "the table of a model of so many tensors can't be uploaded while a CUDA graph is captured: "
                 "take a step with the same gradients before";
        }
        cudaMemcpyAsync(table.memory, fresh.data(), bytes, cudaMemcpyHostToDevice, stream);
        table.uploaded.swap(fresh);
      }
      arguments.header.table = static_cast<const unsigned char*>(table.memory);
    }
    launch_all(step, arguments, device, stream);
  } else {
    Arguments<kLargeTable> arguments;
    arguments.header = header;
    write_table(step, arguments.table);
    launch_all(step, arguments, device, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastclip::cuda
