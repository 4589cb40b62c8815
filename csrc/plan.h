// From an optimizer's groups to a Step: tensors found, checked, cut into chunks, handed to a device.
// The only C++ that knows torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <optional>
#include <string>
#include <vector>

#include "borrowed.h"
#include "device_part.h"
#include "groups.h"
#include "shards.h"
#include "states.h"
#include "step.h"
#include "tensors.h"

namespace fastclip {

// Owned by an optimizer. Holds no tensor of the model and no address from one step to the next: all
// are read anew at every step, which costs less than comparing them would. What stays is scratch
// memory and the places where states were found.
class Plan {
 public:
  explicit Plan(Rule rule) : rule_(rule) {}
  Rule rule() const { return rule_; }

  // One step over `groups` (a list of dicts) with `state` (a dict of dicts by parameter). Returns ""
  // when it was taken, or skipped because found_inf says so; otherwise why the kernels do not cover
  // it, and nothing was changed. Raises for bad input, and nothing was changed.
  std::string step(PyObject* groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf);

  // Clips the gradients of `params` (a list) in place. Returns as step does.
  std::string clip_grads(PyObject* params, double low, double high, NormClip norm_clip);

  // After a call that the kernels did not cover: the parameters whose gradients are placed otherwise than they are. All
  // ranks have to redistribute these first, and call again.
  std::vector<Held> take_misplaced() { return shards_.take_misplaced(); }

  // The norm before the norm clip of the last call, a float64 scalar on the parameters' device;
  // undefined if there was none to take.
  at::Tensor total_norm() const;

  // What the last step did to the gradients. Scalars on the parameters' device; undefined where there was no such clip.
  struct ClipStats {
    at::Tensor total_norm;        // float64
    at::Tensor coefficient;       // float64, of the norm clip
    at::Tensor clamped_fraction;  // float64: elements that the value clip moved, of those it looked at
    at::Tensor skipped;           // bool
  };
  ClipStats clip_stats() const;

  // Steps that were skipped since the plan was made, an int64 scalar on the parameters' device.
  at::Tensor skipped_steps() const;

 private:
  // Of the last step that did not raise: what is asked about it later.
  struct LastStep {
    NormClip norm_clip;
    bool clamps = false;  // some group has a value clip
    bool asks_device = false;  // whether it was skipped
    bool skipped_by_host = false;
    std::optional<c10::Device> device;  // of the first parameter
  };
  class Busy;

  // The walk over all tensors. A call is a good part of what a tensor costs: what is done for each of them is inlined,
  // with torch's accessors (`flatten`), and what is not is kept out of it (`noinline`).
  void clear();
  [[gnu::noinline]] void not_covered(const std::string& reason);
  void add_group(Group& group, Py_ssize_t group_index);
  [[gnu::always_inline]] inline void add_param(const Group& group, const StateNames& names, Py_ssize_t group_index,
                                               Py_ssize_t index);
  [[gnu::noinline]] void begin_row(DevicePart& part, const Hyper& hyper, Py_ssize_t group, DType dtype);
  // All that is covered; of `param` nullptr, the gradient alone is to be clipped.
  [[gnu::noinline]] void add_tensor(const at::Tensor* param, const at::Tensor& grad, const StateNames& names,
                                    const ParamStates& states, Momentum momentum, const Hyper& hyper, const Place& place);
  // As add_param, of a DTensor: the kernels step on the shard that is here.
  [[gnu::noinline]] void add_shard(const Group& group, const StateNames& names, const Place& place, const Shard& shard);
  // The shard of a gradient that is placed as its parameter; nothing where it is not.
  std::optional<Shard> shard_of_grad(const at::Tensor& grad, const Shard& param, const Place& place);
  void await_norm(const Shard& param, const Place& place, const NormClip& norm_clip);
  // The rest of the walk over a parameter, for ordinary tensors. `like` is the gradient that a new state is made like.
  [[gnu::always_inline]] inline void add_covered(const Group& group, const StateNames& names, const Place& place,
                                                 const Held& held, ParamStates& states, const at::Tensor& param,
                                                 const at::Tensor& grad, const at::Tensor& like);
  [[gnu::noinline]] bool cover_states(const Group& group, const Held& held, const at::Tensor& param, const at::Tensor& like,
                                      const Place& place, const StateNames& names, ParamStates& states);
  [[gnu::noinline]] DevicePart& part_of(c10::Device device, PyObject* reduction);
  bool shares_memory();
  void run(Rule rule, const NormClip& asked, const Amp& amp);
  void remember(const NormClip& norm_clip, bool skipped_by_host);
  bool asks_all_ranks(const NormClip& norm_clip) const;
  bool was_skipped() const;
  const DevicePart* first_stepped() const;

  const Rule rule_;
  std::vector<DevicePart> parts_;
  DevicePart* part_ = nullptr;             // the walk's last
  PyObject* reduction_ = nullptr;          // of the walk's parameter, where a norm is asked for
  Shards shards_;
  size_t parameter_ = 0;                   // the walk's position, over all groups
  Borrowed borrowed_;
  States states_{borrowed_};
  std::vector<Group> groups_;
  uint64_t written_addresses_ = 0;         // a hash of all that this step writes,
  uint64_t disjoint_addresses_ = 0;        // and of the last ones found not to overlap
  std::string reason_;                     // why the kernels do not cover this step
  std::optional<c10::Device> first_device_;
  LastStep last_;
  int64_t skipped_by_host_ = 0;
  bool busy_ = false;
};

}  // namespace fastclip
