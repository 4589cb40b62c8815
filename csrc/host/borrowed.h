// The tensors that a step reads and writes: borrowed from whoever owns them, and held only where they could go away.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "python.h"

namespace fastclip {

class Borrowed {
 public:
  void clear() {
    held_.clear();
    kept_.clear();
    read_.clear();
    written_.clear();
    held_read_ = held_written_ = 0;
  }

  [[gnu::always_inline]] void read(const at::Tensor& tensor) { read_.push_back(tensor.unsafeGetTensorImpl()); }
  [[gnu::always_inline]] void write(const at::Tensor& tensor) { written_.push_back(tensor.unsafeGetTensorImpl()); }

  // Before Python may run, or the GIL is released: another thread may then drop what was found so far.
  void hold() {
    hold(read_, held_read_);
    hold(written_, held_written_);
  }

  // Cheaper than hold(): keeps the owning Python objects alive (a reference of Python's costs a tenth). This does not
  // prevent `torch.utils.swap_tensors`, so call check() after Python code has run and before the first write.
  void keep(Held owner) {
    c10::TensorImpl* const tensor = THPVariable_Unpack(owner.object).unsafeGetTensorImpl();
    kept_.push_back({std::move(owner), tensor});
  }
  void all_are_kept() {
    held_read_ = read_.size();
    held_written_ = written_.size();
  }
  void check() const {
    for (const Kept& kept : kept_) {
      if (THPVariable_Unpack(kept.owner.object).unsafeGetTensorImpl() != kept.tensor) {
        raise(PyExc_RuntimeError, "a tensor was swapped for another while the optimizer stepped");
      }
    }
  }

  // Before the GIL is released while the kernels run: what is kept, too.
  void hold_all() {
    held_read_ = held_written_ = 0;
    hold();
  }

  void bump_versions() const {
    // The kernels have displaced the counts, and each increment would wait for its cache line.
    constexpr size_t kDistance = 8;
    for (size_t i = 0; i < written_.size(); ++i) {
      const auto later = [&](size_t distance) {
        return &written_[std::min(i + distance, written_.size() - 1)]->version_counter();
      };
      __builtin_prefetch(later(2 * kDistance));
      __builtin_prefetch(count_of(*later(kDistance)), /*rw=*/1);
      written_[i]->bump_version();
    }
  }

 private:
  struct Kept {
    Held owner;
    c10::TensorImpl* tensor;
  };

  // Where torch has the count, which it keeps to itself: to be fetched, not read.
  static const void* count_of(const c10::VariableVersion& version) {
    const void* count;
    static_assert(sizeof(version) == sizeof(count));
    memcpy(&count, &version, sizeof(count));
    return count;
  }

  using Tensors = c10::SmallVector<c10::TensorImpl*, 0>;  // appends without a call

  void hold(const Tensors& tensors, size_t& done) {
    for (; done < tensors.size(); ++done) {
      held_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensors[done]));
    }
  }

  Tensors read_, written_;
  size_t held_read_ = 0, held_written_ = 0;  // how many of each are held, or kept
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_;
  std::vector<Kept> kept_;
};

}  // namespace fastclip
