// How the chunks of a step are dealt out: to threads, and to the tensors and segments that they are of.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>

#include "../step.h"

namespace fastclip::cpu {
namespace {

// Elements per thread. With fewer, a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 32768;
// Chunks that a thread fetches at a time. A thread that is held up by other work on its core fetches less often; memory
// is read faster in long pieces.
inline int64_t chunks_per_fetch(int64_t chunks, int threads) {
  constexpr int64_t kLeast = 16, kMost = 256, kFetchesPerThread = 16;
  return std::clamp(chunks / (kFetchesPerThread * threads), kLeast, kMost);
}

// Calls body(tensor, first element, number of elements) for each tensor's share of a range of chunks.
template <class Body>
void for_each_run(const Step& step, int64_t first_chunk, int64_t last_chunk, const Body& body) {
  if (step.tensors.empty()) return;
  auto tensor = std::upper_bound(step.tensors.begin(), step.tensors.end(), first_chunk,
                                 [](int64_t chunk, const TensorEntry& entry) { return chunk < entry.first_chunk; });
  --tensor;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++tensor) {
    const int64_t begin = (chunk - tensor->first_chunk) * kChunk;
    const int64_t end = std::min(tensor->numel, (last_chunk - tensor->first_chunk) * kChunk);
    if (begin < end) body(*tensor, begin, end - begin);
    chunk += (end - begin + kChunk - 1) / kChunk;
  }
}

// Gives this thread the floating-point mode of the calling thread, for as long as the object lives.
// torch.set_flush_denormal sets the mode of one thread only. Without this, a subnormal number would count or not,
// depending on the thread that happens to fetch it.
class FloatingPointMode {
 public:
  explicit FloatingPointMode(const std::fenv_t& wanted) {
    std::fegetenv(&own_);
    std::fesetenv(&wanted);
  }
  ~FloatingPointMode() { std::fesetenv(&own_); }
  FloatingPointMode(const FloatingPointMode&) = delete;

 private:
  std::fenv_t own_;
};

// Runs one parallel region: calls body(first chunk, last chunk) until every chunk was fetched. `backwards` starts where
// the previous pass ended, on data that is still in the cache.
template <class Body>
void for_each_chunk(const Step& step, const ThreadPool& pool, bool backwards, const Body& body) {
  const int threads =
      static_cast<int>(std::min<int64_t>(pool.threads, std::max<int64_t>(step.elements / kElementsPerThread, 1)));
  if (threads == 1 && !backwards) return body(0, step.chunks);

  struct Work {
    const Body& body;
    const int64_t chunks;
    const bool backwards;
    const int64_t at_once;
    std::atomic<int64_t> fetched{0};
    std::fenv_t mode{};

    void fetch_and_run() {
      for (;;) {
        const int64_t begin = fetched.fetch_add(at_once, std::memory_order_relaxed);
        if (begin >= chunks) return;
        const int64_t end = std::min(begin + at_once, chunks);
        backwards ? body(chunks - end, chunks - begin) : body(begin, end);
      }
    }
  } work{body, step.chunks, backwards, chunks_per_fetch(step.chunks, threads)};
  if (threads == 1) return work.fetch_and_run();
  std::fegetenv(&work.mode);
  const auto run_in_mode = [](void* context) {
    auto& work = *static_cast<Work*>(context);
    const FloatingPointMode mode(work.mode);
    work.fetch_and_run();
  };
  pool.run(threads, run_in_mode, &work);
}

// Calls body(chunk) for the chunks of the tensors from `first` to `end`.
template <class Body>
void for_chunks_of_tensors(const Step& step, size_t first, size_t end, const Body& body) {
  const auto first_chunk = [&](size_t tensor) {
    return tensor < step.tensors.size() ? step.tensors[tensor].first_chunk : step.chunks;
  };
  for (int64_t chunk = first_chunk(first); chunk < first_chunk(end); ++chunk) body(chunk);
}

// Calls body(tensor, first element, number of elements, place of the chunk) for each chunk of a tensor's share.
template <class Body>
void for_each_chunk_of(const TensorEntry& tensor, int64_t begin, int64_t size, const Body& body) {
  int64_t place = tensor.first_chunk + begin / kChunk;
  for (int64_t done = 0; done < size; done += kChunk) body(begin + done, std::min(kChunk, size - done), place++);
}

}  // namespace
}  // namespace fastclip::cpu
