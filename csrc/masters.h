// Master weights undo what others write to a 16-bit parameter, since they are what is updated. Version counters tell that
// somebody wrote.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>

#include <vector>

namespace fastclip {

class Masters {
 public:
  void begin() { now_.clear(); }

  // Notes the parameter at `position` among all, and its master weights. Returns whether somebody has changed the
  // parameter since the last step; a GPU would have to be waited for to compare, so there it is whether somebody wrote.
  bool add(size_t position, const at::Tensor& param, const at::Tensor& master) {
    if (seen_.size() <= position) seen_.resize(position + 1);
    c10::TensorImpl* const impl = param.unsafeGetTensorImpl();
    const void* const of_master = master.unsafeGetTensorImpl();
    now_.push_back({position, impl, of_master});
    const Seen& seen = seen_[position];
    if (seen.param != impl || seen.master != of_master || seen.version == version_of(impl)) return false;
    return !param.is_cpu() || !at::equal(master.to(param.scalar_type()), param);
  }

  // A step was taken: the versions it leaves.
  void remember() {
    for (const Now& now : now_) seen_[now.position] = {now.param, now.master, version_of(now.param)};
  }

  void forget() { seen_.clear(); }

 private:
  // Addresses to compare with: a hint, as what was there may be gone.
  struct Seen {
    const void* param = nullptr;
    const void* master = nullptr;
    uint32_t version = 0;
  };
  struct Now {
    size_t position;
    c10::TensorImpl* param;
    const void* master;
  };

  static uint32_t version_of(c10::TensorImpl* tensor) { return tensor->version_counter().current_version(); }

  std::vector<Seen> seen_;  // of each parameter, after the last step
  std::vector<Now> now_;
};

}  // namespace fastclip
