// Notices writes to parameters: a step measures what it makes of them, for the next step, and somebody may write in
// between.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

namespace fastclip {

class Versions {
 public:
  void begin() { now_.clear(); }

  // Notes the `position`th of all parameters, and the tensor with its values that this step measures at `place`:
  // itself, its shard or its master weights. Returns whether the last step has measured the same there, and nobody
  // wrote since. `p.data = other` shows by another address.
  bool add(size_t position, const at::Tensor& param, const at::Tensor& measured, const void* data, int64_t place) {
    if (seen_.size() <= position) seen_.resize(position + 1);
    Seen seen{param.unsafeGetTensorImpl(), measured.unsafeGetTensorImpl(), data, place};
    if (seen.param->is_inference() || seen.measured->is_inference()) return false;  // they have no version
    seen.find_versions();
    now_.push_back({position, seen});
    return seen_[position] == seen;
  }

  // A step was taken: the versions it leaves. Others may have taken the place of what was not in it.
  void remember() {
    if (now_.size() != seen_.size()) std::fill(seen_.begin(), seen_.end(), Seen{});
    for (const Now& now : now_) {
      seen_[now.position] = now.seen;
      seen_[now.position].find_versions();
    }
  }

  void forget() { seen_.clear(); }

 private:
  // Addresses to compare with: a hint, as what was there may be gone.
  struct Seen {
    c10::TensorImpl* param = nullptr;
    c10::TensorImpl* measured = nullptr;
    const void* data = nullptr;
    int64_t place = -1;
    uint32_t version = 0;           // of `measured`,
    uint32_t version_of_param = 0;  // and of a DTensor: an operation on it does not count at its shard

    void find_versions() {
      version = measured->version_counter().current_version();
      version_of_param = param == measured ? version : param->version_counter().current_version();
    }
    bool operator==(const Seen& other) const {
      return param == other.param && measured == other.measured && data == other.data && place == other.place &&
             version == other.version && version_of_param == other.version_of_param;
    }
  };
  struct Now {
    size_t position;
    Seen seen;
  };

  std::vector<Seen> seen_;  // of each parameter, after the last step
  std::vector<Now> now_;
};

}  // namespace fastclip
