// What this machine allows. Its memory: one array is read, and others are read and written, as a step does with a
// gradient, a parameter and its states. All are words of 32 bits, whatever their dtype; nothing is computed that takes
// longer. Its divider: a square root and two divisions for each number, as Adam has them; memory takes no time then.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>

// torch's own threads: others would be new to each pass, and share the cores with them. OpenMP of GCC, and of LLVM, has
// it.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

namespace {

constexpr int64_t kBlock = 128, kLine = 16;  // words
constexpr int64_t kPiece = 1 << 20;
constexpr int kMostWritten = 4;

struct Tensor {
  const uint32_t* read;
  uint32_t* written[kMostWritten];
  int64_t words;
};

// Adds the bits of what is read that are in `mask`. It is 0, which a compiler does not know: no array changes.
template <int kWritten>
uint32_t run(const Tensor& tensor, int64_t begin, int64_t end, int64_t bytes_ahead, uint32_t mask) {
  const uint32_t* __restrict const read = tensor.read;
  uint32_t* __restrict const a = tensor.written[0];
  uint32_t* __restrict const b = tensor.written[1];
  uint32_t* __restrict const c = tensor.written[2];
  uint32_t* __restrict const d = tensor.written[3];
  uint32_t sum = 0;
  const auto pass = [&](int64_t from, int64_t size) __attribute__((always_inline)) {
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t x = read[from + i] & mask;
      if (kWritten == 0) sum += x;
      if (kWritten > 0) a[from + i] += x;
      if (kWritten > 1) b[from + i] += x;
      if (kWritten > 2) c[from + i] += x;
      if (kWritten > 3) d[from + i] += x;
    }
  };
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) {
    const auto ask_for = [&](const uint32_t* array) __attribute__((always_inline)) {
      for (int64_t i = 0; i < kBlock; i += kLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(array + at + i) + bytes_ahead);
      }
    };
    if (bytes_ahead) {
      ask_for(read);
      if (kWritten > 0) ask_for(a);
      if (kWritten > 1) ask_for(b);
      if (kWritten > 2) ask_for(c);
      if (kWritten > 3) ask_for(d);
    }
    pass(at, kBlock);
  }
  pass(at, end - at);
  return sum;
}

// Numbers of a thread's own, in the innermost cache, again and again.
class Divided {
 public:
  Divided() {
    std::fill_n(squares_, kNumbers, 4.0f);
    std::fill_n(averages_, kNumbers, 6.0f);
  }

  // Divides each average by its root, divided by a number that the compiler does not know. Returns the sum.
  double run(int64_t count, float by) {
    double sum = 0;
    for (int64_t done = 0; done < count; done += kNumbers) {
      const int64_t size = std::min(kNumbers, count - done);
      for (int64_t i = 0; i < size; ++i) quotients_[i] = averages_[i] / (std::sqrt(squares_[i]) / by + 1.0f);
      asm volatile("" : : "r"(quotients_) : "memory");
      sum += quotients_[size - 1] * double(size);
    }
    return sum;
  }

 private:
  static constexpr int64_t kNumbers = 2048;
  alignas(64) float squares_[kNumbers], averages_[kNumbers], quotients_[kNumbers];
};

// Calls work() in all threads at once, and returns the seconds that it takes.
template <class Work>
double seconds_of(Work& work, int threads, Parallel parallel) {
  const auto call = [](void* context) { (*static_cast<Work*>(context))(); };
  const auto start = std::chrono::steady_clock::now();
  parallel ? parallel(call, &work, threads, 0) : work();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return seconds.count();
}

}  // namespace

// Returns the seconds that it takes to read all tensors' `read`, and to read and write the first `written` of their
// arrays; -1 if there are not as many.
extern "C" double pass_seconds(const Tensor* tensors, int64_t count, int written, int threads, int64_t bytes_ahead,
                               uint32_t mask, Parallel parallel) {
  using Run = decltype(&run<0>);
  constexpr Run kRuns[] = {run<0>, run<1>, run<2>, run<3>, run<4>};
  if (written < 0 || written > kMostWritten) return -1;
  std::atomic<int64_t> taken{0};  // pieces, each by the thread that is ready first
  std::atomic<uint32_t> sum{0};
  auto work = [&] {
    uint32_t own = 0;
    int64_t piece = taken++, first = 0;  // first: of a tensor
    for (int64_t i = 0; i < count; ++i) {
      const int64_t words = tensors[i].words, end = first + (words + kPiece - 1) / kPiece;
      for (; piece < end; piece = taken++) {
        const int64_t begin = (piece - first) * kPiece;
        own += kRuns[written](tensors[i], begin, std::min(begin + kPiece, words), bytes_ahead, mask);
      }
      first = end;
    }
    sum += own;
  };
  return seconds_of(work, threads, parallel);
}

// Returns the seconds of a square root and two divisions for each of `count` numbers; `sum` is that of the quotients.
extern "C" double divider_seconds(int64_t count, int threads, float by, double* sum, Parallel parallel) {
  std::atomic<int64_t> taken{0};
  std::atomic<double> all{0};
  auto work = [&] {
    Divided divided;
    double own = 0;
    for (int64_t begin = kPiece * taken++; begin < count; begin = kPiece * taken++) {
      own += divided.run(std::min(kPiece, count - begin), by);
    }
    all += own;
  };
  const double seconds = seconds_of(work, threads, parallel);
  *sum = all;
  return seconds;
}
