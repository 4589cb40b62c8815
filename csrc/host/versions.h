// Notices writes to parameters: a step measures what it makes of them, for the next step, and somebody may write in
// between.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastclip {

class Versions {
 public:
  void begin() { now_.clear(); }

  // Notes a tensor, the `position`th of all parameters, that this step measures at `place`. Returns whether the last
  // step has measured the same there, and nobody wrote since. `p.data = other` shows by another address.
  bool add(size_t position, const at::Tensor& tensor, const void* data, int64_t place) {
    if (seen_.size() <= position) seen_.resize(position + 1);
    c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
    if (impl->is_inference()) return false;  // it has no version
    now_.push_back({position, {impl, data, place, version_of(impl)}});
    return seen_[position] == now_.back().seen;
  }

  // A step was taken: the versions it leaves.
  void remember() {
    for (const Now& now : now_) {
      seen_[now.position] = now.seen;
      seen_[now.position].version = version_of(now.seen.tensor);
    }
  }

  void forget() { seen_.clear(); }

 private:
  // Addresses to compare with: a hint, as what was there may be gone.
  struct Seen {
    c10::TensorImpl* tensor = nullptr;
    const void* data = nullptr;
    int64_t place = -1;
    uint32_t version = 0;

    bool operator==(const Seen& other) const {
      return tensor == other.tensor && data == other.data && place == other.place && version == other.version;
    }
  };
  struct Now {
    size_t position;
    Seen seen;
  };

  static uint32_t version_of(c10::TensorImpl* tensor) { return tensor->version_counter().current_version(); }

  std::vector<Seen> seen_;  // of each parameter, after the last step
  std::vector<Now> now_;
};

}  // namespace fastclip
