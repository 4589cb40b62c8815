// DTensors: which part of them is here, and over which ranks sums have to be added up.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/DispatchKeySet.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "borrowed.h"
#include "python.h"
#include "tensors.h"

namespace fastclip {

// The shard of a DTensor that this rank holds, and where the others are.
struct Shard {
  Held whole;   // the DTensor
  Held tensor;  // an ordinary tensor
  Held spec;    // DTensorSpec

  const at::Tensor& local() const;
  void keep_in(Borrowed& borrowed) &&;
};

inline bool is_subclass(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}
// Nothing for any other tensor. `object` is the tensor's.
std::optional<Shard> shard_of(const at::Tensor& tensor, PyObject* object);
std::optional<Shard> shard_of(const at::Tensor& tensor);

// The measure of one part of a step: the ranks over which it has to be added up, a fastclip.distributed.Reduction or
// nullptr, and the measure, as 3 float64.
using PartMeasure = std::pair<PyObject*, at::Tensor>;

// Two functions of fastclip/distributed.py, which knows process groups: `reduction_of` and `total_measure`.
struct Ranks {
  Held reduction_of;
  Held total_measure;
  bool beyond;  // it asks ranks that hold other parameters, too, in every step
};

// The sharded parameters of a step.
class Shards {
 public:
  Shards(const Borrowed& borrowed, Ranks ranks) : borrowed_(borrowed), ranks_(std::move(ranks)) {}

  void begin() {
    reductions_.clear();
    misplaced_.clear();
  }

  // The Reduction of a parameter, the `position`th of all: nullptr where all ranks hold the same. Borrowed from this.
  // Every parameter is asked for it, with or without a gradient: what the ranks do together must not depend on those.
  PyObject* reduction_of(const Shard& param, size_t position, const Place& place, bool replicated);
  // That of parameters that are whole here, and on all ranks beyond.
  PyObject* replicated();
  // Whether `other`, a gradient or state of the parameter, is sharded exactly like it. Call reduction_of first.
  bool placed_as(const Shard& param, size_t position, const Shard& other);
  bool over_ranks() const { return ranks_.beyond || !reductions_.empty(); }
  bool beyond() const { return ranks_.beyond; }

  // Notes a parameter whose gradient has other placements, say Partial: it has to be redistributed first.
  void add_misplaced(PyObject* param) { misplaced_.emplace_back(param); }
  std::vector<Held> take_misplaced() { return std::exchange(misplaced_, {}); }

  // Returns the measure of all ranks, and AMP's verdict on all of them, if there was one. The first `of_all` numbers
  // are about all parameters, the others about segments.
  std::pair<at::Tensor, at::Tensor> total(const std::vector<PartMeasure>& measures, Norm norm,
                                          const at::Tensor& found_inf, int64_t of_all) const;

 private:
  // The answers for a parameter with this DTensorSpec, which torch does not change once it is made. Asking Python takes
  // a microsecond.
  struct Known {
    Held spec;
    PyObject* reduction = nullptr;
    bool replicated = false;
    std::array<Held, kMaxStates + 2> placed_alike{};  // other specs: of states, master weights and gradients
    size_t next = 0;
  };
  PyObject* deduplicated(Held reduction);
  PyObject* noted(PyObject* reduction);

  const Borrowed& borrowed_;
  const Ranks ranks_;

  std::vector<Known> known_;           // of each parameter
  PyObject* replicated_ = nullptr;
  std::vector<Held> all_reductions_;   // there have been, each once
  std::vector<PyObject*> reductions_;  // of this step, in the order of the parameters
  std::vector<Held> misplaced_;
};

}  // namespace fastclip
