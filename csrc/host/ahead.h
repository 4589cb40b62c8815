// Fetches into the cache what the walk comes to next. A tensor is spread over some ten cache lines, and a training
// iteration has displaced them since the last step: without this, each of them is waited for in turn.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastclip {

// Where the last walk found its tensors, in its order. These are hints: what was there may be gone, and is never read.
// To fetch what is gone does nothing.
class Ahead {
 public:
  void begin() { next_ = 0; }

  // Before `count` calls of `pass`.
  [[gnu::always_inline]] void make_room(size_t count) {
    const size_t needed = next_ + count + kDistance;
    if (needed > seen_.size()) seen_.resize(2 * needed, {this, this, this, this});
  }

  // The walk is at this tensor, whose elements are at `data`.
  [[gnu::always_inline]] void pass(const at::Tensor& tensor, const void* data) {
    const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
    seen_[next_] = {&tensor, impl, impl->unsafe_storage().unsafeGetStorageImpl(), data};
    const Seen& later = seen_[next_ + kDistance];
    ++next_;
    fetch(later.tensor, 0);
    for (const int byte : {16, 80, 176}) fetch(later.impl, byte);  // what the walk reads of it
    for (const int byte : {16, 56}) fetch(later.storage, byte);
    fetch(later.data, 0);
  }

 private:
  static constexpr size_t kDistance = 16;  // tensors: those of some 0.3 µs

  struct Seen {
    const void* tensor;  // in its Python object
    const void* impl;
    const void* storage;
    const void* data;
  };

  [[gnu::always_inline]] static void fetch(const void* address, int byte) {
    __builtin_prefetch(static_cast<const char*>(address) + byte);
  }

  std::vector<Seen> seen_;
  size_t next_ = 0;
};

}  // namespace fastclip
