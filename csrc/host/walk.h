// The walk over all tensors of a step: found, checked, cut into chunks, handed to their devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <algorithm>
#include <optional>
#include <unordered_set>
#include <vector>

#include "ahead.h"
#include "borrowed.h"
#include "groups.h"
#include "masters.h"
#include "part.h"
#include "shards.h"
#include "states.h"
#include "tensors.h"
#include "versions.h"

namespace fastclip {

// Holds no tensor of the model from one step to the next: all are read again at every step. It keeps scratch memory,
// what States has found, and hints to where tensors lay.
class Walk {
 public:
  Walk(Rules::Id rule, Ranks ranks);

  void begin();
  void end_step();  // all is written
  void end();

  // All parameters of a group that have gradients; each gradient once, where it is to be clipped in place. Raises for
  // what can't be stepped, and nothing was changed.
  void add_group(Group& group, Py_ssize_t group_index);

  // Takes part in the norm of all ranks, also where no parameter here has a gradient.
  void await_others();

  // The first reason why the kernels do not cover the step, if there is one.
  std::optional<Reason>& reason() { return reason_; }
  [[gnu::noinline]] void not_covered(Reason reason);
  // A parameter that somebody wrote to since the last step, and that its master weights will change back.
  const std::optional<Place>& undone() const { return undone_; }
  // Whether an array that this step writes overlaps another that it writes or reads: then the order of the tensors
  // matters, which the kernels do not keep.
  bool shares_memory();

  std::vector<Part>& parts() { return parts_; }
  int64_t devices() const {
    return std::count_if(parts_.begin(), parts_.end(), [](const Part& part) { return part.in_use(); });
  }
  const std::vector<Part>& parts() const { return parts_; }
  Shards& shards() { return shards_; }
  const Shards& shards() const { return shards_; }
  States& states() { return states_; }
  Borrowed& borrowed() { return borrowed_; }
  const std::optional<c10::Device>& first_device() const { return first_device_; }  // of all parameters
  int64_t parameters() const { return static_cast<int64_t>(parameter_); }  // of all groups
  int64_t measured_params() const { return measured_params_; }  // elements of all parameters whose norm counts

 private:
  // A call is a good part of what a tensor costs: what is done for each of them is inlined, with torch's accessors
  // (`flatten`), and what is not is kept out of it (`noinline`).
  template <bool kInPlace>
  [[gnu::always_inline]] inline void add_param(const Group& group, const StateNames& names, Py_ssize_t group_index,
                                               Py_ssize_t index);
  [[gnu::noinline]] void begin_row(Part& part, const Hyper& hyper, Py_ssize_t group, DType dtype);
  // All that is covered. kPlain: as is_plain says.
  template <bool kPlain>
  [[gnu::noinline]] void add_tensor(const at::Tensor& param, const at::Tensor& grad, const StateNames& names,
                                    const ParamStates& states, bool is_first, const Group& group, const Place& place);
  // Whether a gradient that is to be clipped in place was found before.
  [[gnu::always_inline]] bool is_seen(const at::Tensor& grad) {
    return in_place_ && !seen_.insert(grad.unsafeGetTensorImpl()).second;
  }
  // A parameter without a gradient, where the norm of the parameters counts. A frozen one is left out.
  [[gnu::noinline]] void add_unstepped(const Group& group, const StateNames& names, const Place& place,
                                       const at::Tensor& param, const Shard* shard);
  // The segment of the parameter, where norms are taken over segments.
  [[gnu::noinline]] void begin_segment(Part& part, Py_ssize_t group);
  [[gnu::always_inline]] inline TensorEntry& begin_entry(const at::Tensor& grad, const Hyper& hyper,
                                                         const Place& place);
  void note_params(Step& step, TensorEntry& entry, const at::Tensor& measured, const Place& place, bool keeps_measures);
  // As add_param, of a DTensor: the kernels step on the shard that is here.
  [[gnu::noinline]] void add_shard(const Group& group, const StateNames& names, const Place& place, Shard shard);
  // The shard of a gradient that is placed as its parameter; nothing where it is not.
  std::optional<Shard> shard_of_grad(const at::Tensor& grad, const Shard& param, const Place& place);
  void await_norm(const Shard& param, const Place& place, const Group& group);
  // The rest of the walk over a parameter, or its shard. `like` is the gradient that a new state is made like.
  [[gnu::always_inline]] inline void add_one(const Group& group, const StateNames& names, const Place& place,
                                             const ParamStates& states, const at::Tensor& param, const at::Tensor& grad,
                                             const at::Tensor& like);
  [[gnu::always_inline]] static inline bool is_plain(const Group& group, const StateNames& names,
                                                     const ParamStates& states, const at::Tensor& param,
                                                     const at::Tensor& grad);
  // What is not plain: of other dtypes or layouts, new, or not covered.
  [[gnu::noinline]] void add_any(const Group& group, const StateNames& names, const Place& place, ParamStates states,
                                 const at::Tensor& param, const at::Tensor& grad, const at::Tensor& like);
  // These are in covers.cpp.
  [[gnu::noinline]] bool covers(const at::Tensor& param, const at::Tensor& grad, const Place& place);
  // Before a step is left to plain torch, which does not look.
  [[gnu::noinline]] void check_memory(const at::Tensor& param, const at::Tensor& grad, const StateNames& names,
                                      const ParamStates& states, const Place& place) const;
  [[gnu::noinline]] bool covers_numbers(const at::Tensor& param, const Place& place, const Name& name,
                                        const at::Tensor*& numbers, int64_t length);
  [[gnu::noinline]] bool covers_codes(const StateNames& names, int s, const ParamStates& states,
                                      const at::Tensor& param, const Place& place);
  [[gnu::noinline]] bool cover_states(const Group& group, const at::Tensor& param, const at::Tensor& like,
                                      const Place& place, const StateNames& names, ParamStates& states);
  [[gnu::noinline]] Part& part_of(c10::Device device, PyObject* reduction);

  const Rules::Id rule_;
  const bool in_place_;  // the rule has no parameters: gradients are clipped
  std::vector<Part> parts_;
  Part* part_ = nullptr;             // the last one
  PyObject* reduction_ = nullptr;          // of the parameter, where a norm is asked for,
  PyObject* reduction_of_group_ = nullptr;  // and of those of its group that are no DTensors
  Scope scope_ = Scope::global;            // of the norm
  size_t parameter_ = 0;                   // the position, over all groups
  Borrowed borrowed_;
  Ahead ahead_;
  Shards shards_;
  States states_{borrowed_, shards_};
  std::unordered_set<c10::TensorImpl*> seen_;  // gradients to be clipped in place
  uint64_t addresses_ = 0;  // a hash of all that this step writes, and of gradients in shared storages,
  uint64_t disjoint_addresses_ = 0;  // and of the last ones found not to overlap
  std::optional<Reason> reason_;
  Masters masters_;
  Versions versions_;
  int64_t measured_params_ = 0;
  std::optional<Place> undone_;
  std::optional<c10::Device> first_device_;
};

}  // namespace fastclip
