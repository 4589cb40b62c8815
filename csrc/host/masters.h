// Master weights undo what others write to a 16-bit parameter, since they are what is updated. Version counters tell
// that somebody wrote.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isclose.h>

#include <vector>

namespace fastclip {

class Masters {
 public:
  void begin() { now_.clear(); }

  // Notes the parameter at `position` among all, and its master weights. Returns whether they differ, which is looked
  // at where somebody wrote to the parameter since the last step, and where no step is known: after a checkpoint was
  // loaded. A GPU would have to be waited for, so there it is whether somebody wrote. `is_new`: the step makes them of
  // the parameter.
  bool add(size_t position, const at::Tensor& param, const at::Tensor& master, bool is_new) {
    if (seen_.size() <= position) seen_.resize(position + 1);
    c10::TensorImpl* const impl = param.unsafeGetTensorImpl();
    const void* const of_master = master.unsafeGetTensorImpl();
    now_.push_back({position, impl, of_master});
    const Seen& seen = seen_[position];
    const bool known = seen.param == impl && seen.master == of_master;
    if (is_new || (known && seen.version == version_of(impl))) return false;
    if (!param.is_cpu()) return known;
    const at::Tensor rounded = master.to(param.scalar_type());
    return !at::isclose(rounded, param, /*rtol=*/0, /*atol=*/0, /*equal_nan=*/true).all().item<bool>();
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
