// Takes random steps by the CUDA kernels on the emulated device and by the CPU, and compares every byte of memory that
// they write, and what lies around it. A small program, so that sanitizers see nothing but the kernels.
//   check_step SCHEDULE(0, 1, 2) DEVICE(0, 1, 2) STEPS [FIRST SEED]
//   check_step huge
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "cuda_runtime.h"
#include "step.h"

using namespace fastclip;

namespace {

void one_thread(int count, void (*work)(void*), void* context) {
  for (int i = 0; i < count; ++i) work(context);
}

// The arrays of all tensors, each kind in one piece of memory with gaps that nobody may write to.
enum Kind { kParams, kRounded, kGrads, kStates, kKinds = kStates + kMaxStates };
struct Memory {
  std::vector<double> of[kKinds], steps;
};

DType dtype_of(const TensorEntry& tensor, int kind) {
  if (kind == kRounded) return tensor.rounded_dtype;
  if (kind == kGrads) return tensor.grad_dtype;
  return kind == kParams ? tensor.dtype : tensor.state_dtypes[kind - kStates];
}

template <class Stored>
void fill(std::vector<double>& memory, int64_t at, int64_t numel, std::mt19937_64& random, bool squares) {
  std::normal_distribution<double> normal;
  auto* values = reinterpret_cast<Stored*>(memory.data()) + at;
  for (int64_t i = 0; i < numel; ++i) {
    const double value = normal(random);
    store(values[i], static_cast<ComputeType<Stored>>(squares ? value * value : value));
  }
}

template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::bfloat16: return body(BFloat16{});
    case DType::float16: return body(Float16{});
  }
}

struct Case {
  Memory cpu, gpu;
  Step step;  // over `cpu`
  std::vector<int64_t> at_byte;     // where a tensor starts,
  std::vector<int64_t> grad_shift;  // and how many bytes later its gradient does
  std::vector<bool> has_rounded;    // master weights
  bool exact = true;  // to the bit; else the coefficient may be off by a rounding, as sums have another order

  explicit Case(uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto draw = [&](auto... choices) {
      const std::common_type_t<decltype(choices)...> all[] = {choices...};
      return all[random() % sizeof...(choices)];
    };
    const bool mixed = random() % 4 == 0;
    const bool mixtures = random() % 3 == 0;
    const DType one = static_cast<DType>(random() % kNumDTypes);
    step.rule = draw(Rule::sgd, Rule::sgd, Rule::adam, Rule::adam, Rule::clip_grad);
    step.norm = draw(Norm::none, Norm::two, Norm::inf);
    step.max_norm = step.norm == Norm::none ? 0 : draw(0.5, 3.0, 1e9, HUGE_VAL);
    step.skip_nonfinite = step.norm != Norm::none && random() % 3 == 0;
    const auto groups = draw(1, 2, 3);
    const bool momentum = step.rule == Rule::sgd && random() % 2;
    for (int i = 0; i < groups; ++i) {
      Hyper hyper{};
      hyper.lr = 0.1;
      hyper.momentum = momentum && random() % 4 ? 0.9 : 0;
      hyper.dampening = draw(0.0, 0.25);
      hyper.nesterov = random() % 2;
      hyper.maximize = random() % 2;
      hyper.weight_decay = draw(0.0, 0.01);
      hyper.decoupled_weight_decay = step.rule == Rule::adam && random() % 2;
      hyper.amsgrad = step.rule == Rule::adam && random() % 3 == 0;
      hyper.beta1 = draw(0.9, 0.5, 0.25);
      hyper.beta2 = 0.99;
      hyper.eps = 1e-8;
      hyper.stochastic_rounding = step.rule != Rule::clip_grad && mixtures && random() % 2;
      hyper.rounding_seed = 7;
      const bool clips = random() % 2;
      hyper.clip_low = clips ? -0.5 : -HUGE_VAL;
      hyper.clip_high = clips ? 0.25 : HUGE_VAL;
      step.hypers.push_back(hyper);
    }
    const int tensors = draw(1, 3, 20, 400, 1200);
    int64_t bytes = 16;
    for (int i = 0; i < tensors; ++i) {
      TensorEntry tensor{};
      tensor.numel = tensors > 20 ? draw(1, 2, 5, 17, 40)
                                  : draw(1, 3, 4, 7, 8, 9, 255, 1023, 1024, 1025, 4095, 4097, 6000, 30001);
      tensor.dtype = tensor.grad_dtype = tensor.rounded_dtype = mixed ? static_cast<DType>(random() % kNumDTypes) : one;
      tensor.hyper = static_cast<int32_t>(int64_t{i} * groups / tensors);
      tensor.index = static_cast<uint32_t>(random());
      for (DType& of_state : tensor.state_dtypes) of_state = tensor.dtype;
      tensor.uniform = true;
      bool master = false;
      if (step.rule != Rule::clip_grad && mixtures && tensor.dtype != DType::float64) {
        const DType narrow = tensor.rounded_dtype = draw(DType::bfloat16, DType::float16);
        master = random() % 2;
        if (random() % 4) {  // else a master of its own dtype, or only rounded at random
          tensor.dtype = master ? DType::float32 : draw(DType::float32, narrow);
          tensor.grad_dtype = draw(DType::float32, narrow);
          for (DType& of_state : tensor.state_dtypes) of_state = draw(DType::float32, narrow);
        }
        tensor.uniform = false;
      }
      has_rounded.push_back(master);
      tensor.step_is_float64 = random() % 2;
      if (step.hypers[tensor.hyper].momentum != 0) tensor.momentum = draw(Momentum::first, Momentum::running);
      tensor.first_chunk = step.chunks;
      step.chunks += (tensor.numel + kChunk - 1) / kChunk;
      step.elements += tensor.numel;
      step.tensors.push_back(tensor);
      // Some are aligned, some not, by any number of elements.
      const int item = tensor.uniform ? item_size(tensor.dtype) : item_size(DType::float32);
      bytes = (bytes + 15) / 16 * 16 + draw(0, 0, 1, 3) * item;
      at_byte.push_back(bytes);
      grad_shift.push_back(random() % 6 == 0 ? item : 0);  // as a view into a bucket
      bytes += tensor.numel * item + draw(16, 64);
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      cpu.of[kind].assign(bytes / 8 + 4, -12345.678);
      for (int i = 0; i < tensors; ++i) {
        with_type(dtype_of(step.tensors[i], kind), [&](auto stored) {
          const bool squares = step.rule == Rule::adam && kind > kStates;  // no less than 0
          fill<decltype(stored)>(cpu.of[kind], at(i, kind) / sizeof(stored), step.tensors[i].numel, random, squares);
        });
      }
    }
    for (const TensorEntry& tensor : step.tensors) {
      const float counted = random() % 1000;
      double& kept = cpu.steps.emplace_back(counted);
      if (!tensor.step_is_float64) memcpy(&kept, &counted, sizeof(counted));
    }
    if (random() % (step.skip_nonfinite ? 2 : 8) == 0) {  // somewhere a NaN
      const auto which = random() % tensors;
      with_type(step.tensors[which].grad_dtype, [&](auto stored) {
        using Stored = decltype(stored);
        auto* grads = reinterpret_cast<Stored*>(cpu.of[kGrads].data()) + at(which, kGrads) / sizeof(Stored);
        store(grads[random() % step.tensors[which].numel], static_cast<ComputeType<Stored>>(NAN));
      });
    }
    exact = step.norm != Norm::two;
    gpu = cpu;
    place(cpu);
  }

  int64_t at(size_t tensor, int kind) const { return at_byte[tensor] + (kind == kGrads ? grad_shift[tensor] : 0); }

  void place(Memory& memory) {
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      TensorEntry& tensor = step.tensors[i];
      const auto array = [&](int kind) { return reinterpret_cast<char*>(memory.of[kind].data()) + at(i, kind); };
      const bool adam = step.rule == Rule::adam;
      const int states = adam ? 2 + step.hypers[tensor.hyper].amsgrad : tensor.momentum != Momentum::none;
      tensor.param = step.rule == Rule::clip_grad ? nullptr : array(kParams);
      tensor.rounded = has_rounded[i] ? array(kRounded) : nullptr;
      tensor.grad = array(kGrads);
      for (int s = 0; s < kMaxStates; ++s) tensor.states[s] = s < states ? array(kStates + s) : nullptr;
      const bool counts = adam || (!tensor.uniform && step.hypers[tensor.hyper].stochastic_rounding);
      tensor.step = counts ? &memory.steps[i] : nullptr;
      step.counts_steps |= counts;
    }
  }
};

// One device of those that share a step: its tensors, and the scratch memory they need.
struct Device {
  Step step;
  Outcome outcome{};
  std::vector<Measure> measures;
  std::vector<double> counts = std::vector<double>(cuda::kMaxBlocks, std::nan(""));
  std::vector<unsigned char> table_memory;
  cuda::DeviceTable table;
  bool on_cpu = false;

  Device(const Step& whole, size_t begin, size_t end) : step(whole) {
    step.tensors.assign(whole.tensors.begin() + begin, whole.tensors.begin() + end);
    step.chunks = step.elements = 0;
    for (TensorEntry& tensor : step.tensors) {
      tensor.first_chunk = step.chunks;
      step.chunks += (tensor.numel + kChunk - 1) / kChunk;
      step.elements += tensor.numel;
    }
    const cuda::Needs needs = cuda::needs(step);
    measures.resize(std::max<int64_t>(needs.measures, step.chunks));
    table_memory.resize(needs.table_bytes);
    table.memory = table_memory.data();
    step.outcome = &outcome;
    step.measures = measures.data();
    if (step.clamped) step.clamped = counts.data();
  }

  double clamped() const { return on_cpu ? counts[0] : std::accumulate(counts.begin(), counts.end(), 0.0); }

  bool run(Passes passes) {
    step.passes = passes;
    if (on_cpu) return cpu::run(step, cpu::ThreadPool{1, one_thread}), true;
    const char* error = cuda::run(step, table, 0, nullptr);
    if (error) std::printf("error: %s\n", error);
    return !error;
  }
};

bool same(double a, double b, bool exact) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return exact ? a == b : a == b || std::fabs(a - b) <= 1e-13 * std::fabs(b);
}

// Values to the bit where the case is exact, but for which NaN a NaN is; else with a rounding of the coefficient in its
// last place. And all the bytes around them.
bool same_memory(const Case& c, int kind) {
  const auto &a = c.gpu.of[kind], &b = c.cpu.of[kind];
  if (memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0) return true;
  std::vector<double> rest_a = a, rest_b = b;  // without the tensors
  for (size_t i = 0; i < c.step.tensors.size(); ++i) {
    bool close = true;
    with_type(dtype_of(c.step.tensors[i], kind), [&](auto stored) {
      using Stored = decltype(stored);
      const double tolerance = c.exact ? 0 : sizeof(Stored) == 8 ? 1e-12 : sizeof(Stored) == 4 ? 1e-5 : 0.02;
      const auto at = c.at(i, kind) / static_cast<int64_t>(sizeof(Stored));
      auto* of_a = reinterpret_cast<Stored*>(rest_a.data()) + at;
      auto* of_b = reinterpret_cast<Stored*>(rest_b.data()) + at;
      for (int64_t j = 0; j < c.step.tensors[i].numel; ++j) {
        const double x = load(of_a[j]), y = load(of_b[j]);
        close &= (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * (1 + std::fabs(y));
        of_a[j] = of_b[j] = Stored{};
      }
    });
    if (!close) return false;
  }
  return memcmp(rest_a.data(), rest_b.data(), a.size() * sizeof(double)) == 0;
}

bool check(uint64_t seed) {
  Case c(seed);
  Outcome expected{};
  std::vector<Measure> measures(c.step.chunks);
  double expected_clamped = 0;
  c.step.outcome = &expected;
  c.step.measures = measures.data();
  if (c.step.rule != Rule::clip_grad && seed % 4 != 0) c.step.clamped = &expected_clamped;
  cpu::run(c.step, cpu::ThreadPool{1, one_thread});

  c.place(c.gpu);
  const size_t tensors = c.step.tensors.size();
  bool good = true;
  Outcome outcome;
  double clamped = 0;
  if (c.step.norm != Norm::none && tensors > 1 && seed % 3 == 0) {  // as two devices, with one norm
    Device first(c.step, 0, tensors / 2), second(c.step, tensors / 2, tensors);
    second.on_cpu = seed % 2;
    good &= first.run(Passes::measure) && second.run(Passes::measure);
    const Measure sums[] = {first.outcome.sum, second.outcome.sum};
    for (Device* part : {&first, &second}) {
      part->step.sums = sums;
      part->step.devices = 2;
      part->step.counts = part == &first;
      good &= part->run(Passes::update);
    }
    good &= same(first.outcome.total_norm, second.outcome.total_norm, true);
    outcome = first.outcome;
    outcome.skipped_steps += second.outcome.skipped_steps;
    good &= first.outcome.skipped == second.outcome.skipped;
    clamped = first.clamped() + second.clamped();
  } else {
    Device whole(c.step, 0, tensors);
    good &= whole.run(Passes::all);
    outcome = whole.outcome;
    clamped = whole.clamped();
  }
  good &= outcome.arrived == 0 && outcome.finished == 0 && outcome.skipped == expected.skipped;
  good &= outcome.skipped_steps == expected.skipped_steps;
  if (c.step.clamped && !expected.skipped) good &= clamped == expected_clamped;
  good &= same(outcome.total_norm, expected.total_norm, c.exact) && same(outcome.coefficient, expected.coefficient, c.exact);
  good &= c.gpu.steps == c.cpu.steps;
  for (int kind = 0; kind < kKinds; ++kind) good &= same_memory(c, kind);
  if (!good) std::printf("seed %llu differs: %zu tensors\n", static_cast<unsigned long long>(seed), tensors);
  return good;
}

}  // namespace

// One tensor of more than 2^31 elements. Its pages are all the same two megabytes, and beyond them there is nothing: a
// gradient of ones that is clipped to a half is right wherever it is looked at, and its norm counts its elements.
bool check_huge() {
  constexpr int64_t kNumel = (int64_t{1} << 31) + 5001;
  constexpr size_t kPiece = 2 << 20, kNowhere = size_t{16} << 30;
  const size_t bytes = (kNumel * sizeof(BFloat16) + kPiece - 1) / kPiece * kPiece;
  const int file = memfd_create("huge", 0);
  if (file < 0 || ftruncate(file, kPiece) != 0) return std::perror("memfd"), false;
  auto* reserved = static_cast<char*>(mmap(nullptr, bytes + 2 * kNowhere, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (reserved == MAP_FAILED) return std::perror("mmap"), false;
  auto* grads = reinterpret_cast<BFloat16*>(reserved + kNowhere);
  for (size_t at = 0; at < bytes; at += kPiece) {
    if (mmap(reserved + kNowhere + at, kPiece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
      return std::perror("mmap"), false;
    }
  }
  for (size_t i = 0; i < kPiece / sizeof(BFloat16); ++i) store(grads[i], 1.0f);

  Step step;
  step.rule = Rule::clip_grad;
  step.norm = Norm::two;
  step.max_norm = std::sqrt(double{kNumel}) / 2;
  step.hypers.push_back({});
  step.hypers[0].clip_low = -HUGE_VAL;
  step.hypers[0].clip_high = HUGE_VAL;
  TensorEntry& tensor = step.tensors.emplace_back();
  tensor.grad = grads;
  tensor.numel = kNumel;
  tensor.dtype = tensor.grad_dtype = DType::bfloat16;
  tensor.uniform = true;
  Device device(step, 0, 1);
  const bool good = device.run(Passes::measure) && device.outcome.sum.medium == double{kNumel};
  step.norm = Norm::none;
  step.hypers[0].clip_high = 0.5;
  Device clips(step, 0, 1);
  bool clipped = clips.run(Passes::all);
  for (size_t i = 0; i < kPiece / sizeof(BFloat16); ++i) clipped &= load(grads[i]) == 0.5f;
  std::printf("huge: %s\n", good && clipped ? "right" : "wrong");
  return good && clipped;
}

// One for the whole run: what a device has room for is asked only once.
cuda_on_cpu::Device device_of(int kind) {
  cuda_on_cpu::Device device;
  if (kind == 1) device.cooperative = 0;
  if (kind == 2) {  // keeps few gradients between the passes
    device.multiprocessors = 2;
    device.threads_per_multiprocessor = 256;
    device.shared_per_multiprocessor = device.shared_per_block_optin = 40 << 10;
  }
  return device;
}

int main(int, char** arguments) {
  if (std::string_view(arguments[1]) == "huge") return !check_huge();
  const int schedule = std::atoi(arguments[1]), steps = std::atoi(arguments[3]);
  const uint64_t first = arguments[4] ? std::strtoull(arguments[4], nullptr, 10) : 0;
  const cuda_on_cpu::Device device = device_of(std::atoi(arguments[2]));
  cuda_on_cpu::set_device(&device);
  int different = 0;
  for (int i = 0; i < steps; ++i) {
    cuda_on_cpu::set_schedule(schedule, first + i);
    different += !check(first + i);
  }
  std::printf("%d steps, %d different\n", steps, different);
  return different != 0;
}
