// The states of each parameter: the tensors in optimizer.state[param], under torch's names.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <deque>
#include <vector>

#include "borrowed.h"
#include "groups.h"
#include "shards.h"
#include "tensors.h"

namespace fastclip {

// The names to look up for the parameters of a group.
struct StateNames {
  int count = 0;                         // one more than the last of `arrays`
  const Name* arrays[kMaxStates] = {};   // in the order of TensorEntry::states; nullptr where the group has none
  const Name* codes[kMaxStates] = {};    // the names of states in 8 bits, where the rule has them,
  const Name* scales[kMaxStates] = {};   // and of their scales
  const Name* step = nullptr;            // the count of a parameter's steps, where something needs it
  const Name* scalar = nullptr;          // the rule's number of a parameter, or row of numbers
  int64_t length_of_row = 1;
  const Name* master = nullptr;          // the float32 copy of a 16-bit parameter
  bool any = false;                      // of these
  bool filled_by_first_step = false;     // as the rule says
  bool rule_counts = false;              // and not only something else: then `step` belongs to the arrays
  uint32_t asked = 0;                    // tells which of the rule's names are set, but `master`: that is its bit 0
  int momentum = -1;                     // the array that momentum_dtype is about
  double first_scalar = 0;
};
StateNames state_names(Rules::Id rule, const Group& group);

// One parameter's states; nullptr where there is none (yet).
struct ParamStates {
  const at::Tensor* arrays[kMaxStates] = {};
  const at::Tensor* scales[kMaxStates] = {};  // where it is set, the array is one of codes
  const at::Tensor* step = nullptr;
  const at::Tensor* scalar = nullptr;
  const at::Tensor* master = nullptr;
  bool master_is_new = false;  // made of the parameter in this step
  // The name of an array that is there.
  const Name& name(const StateNames& names, int s) const { return scales[s] ? *names.codes[s] : *names.arrays[s]; }
  bool complete = false;  // all that the group needs is there
};

class States {
 public:
  States(Borrowed& borrowed, Shards& shards) : borrowed_(borrowed), shards_(shards) {}

  // A step begins: `state` is the optimizer's, a dict of dicts by parameter.
  void begin(PyObject* state);
  void end() { new_.clear(); }

  // Looks up what there is of the parameter at `position` among all. May run Python, with other threads. The result
  // holds until the next `find`.
  [[gnu::always_inline]] const ParamStates& find(const Place& place, size_t position, const StateNames& names) {
    if (seen_.size() <= position) seen_.resize(position + 1);
    const Seen& seen = seen_[position];
    const bool unchanged = seen.version_of_state == version_of(state_) && seen.param == place.param &&
                           seen.version == version_of(seen.entry) && seen.asked == asked(names, place.param);
    return unchanged ? seen.states : look_up(place, position, names);
  }
  // The same of a sharded parameter: its shards.
  ParamStates find_shards(const Place& place, size_t position, const StateNames& names, const Shard& param_shard);
  // Looks up a state that stands beside one parameter's, whichever that is, and the entry that has it. `hint` is where
  // the last look-up found it.
  Held find_anywhere(const Name& name, Py_ssize_t& hint, PyObject*& entry);
  // The same of a state beside one parameter, the one at `position` among all.
  Held find_beside(const Place& place, size_t position, const Name& name, PyObject*& entry);

  // Notes a state that the step makes; it gets into the dict by `store`. The pointer holds until `end`.
  [[gnu::noinline]] const at::Tensor* make(const Place& place, const Name& name, at::Tensor tensor);
  // Makes all that there is not yet. Refuses a parameter that has only some of those that belong together.
  [[gnu::noinline]] void make_missing(Rules::Id rule, const Group& group, const at::Tensor& grad, const Place& place,
                                      const StateNames& names, ParamStates& states);

  bool has_new() const { return !new_.empty(); }
  // Whether a parameter is given twice, and would get a second state in place of the first.
  bool makes_twice() const;
  // prepare() does all that can fail or run Python, before the first byte is written; after it, store() can fail only
  // for lack of memory.
  void prepare();
  void store();

 private:
  struct New {
    Held param;
    Place place;
    const Name* name;
    at::Tensor tensor;
    Held entry;    // state[param]
    Held wrapped;  // the tensor as a Python object
  };

  // What a look-up has found. It holds while nobody has written to the two dicts, which own what is borrowed here.
  // Remembered where it is complete.
  struct Seen {
    uint64_t version_of_state = ~uint64_t{0};  // no dict has this one
    PyObject* param = nullptr;
    PyObject* entry = nullptr;  // state[param]
    uint64_t version = 0;       // of the entry
    uint32_t asked = 0;
    Py_ssize_t place = 0;  // of the entry in the state: a hint for the next look-up
    ParamStates states;
  };

  // Tells which names are looked up: no master weights of a parameter of 32 bits, whatever its entry has.
  [[gnu::always_inline]] static uint32_t asked(const StateNames& names, PyObject* param) {
    return names.asked | (names.master && is_16_bit(THPVariable_Unpack(param).scalar_type()));
  }
  [[gnu::noinline]] ParamStates& look_up(const Place& place, size_t position, const StateNames& names);
  PyObject* entry_of(PyObject* param, size_t position);
  const at::Tensor* shard_in(const at::Tensor* state, const Name& name, const Place& place, size_t position,
                             const Shard& param_shard);

  Borrowed& borrowed_;
  Shards& shards_;
  PyObject* state_ = nullptr;
  std::vector<Seen> seen_;  // of each parameter
  std::deque<New> new_;
};

// Whether a parameter is large enough for states in 8 bits, and of a dtype that is computed in float32.
bool has_states_in_8_bits(const at::Tensor& param);

// Whether the kernels take codes and their scales. Raises where these can't belong to their parameter.
bool covers_codes(const at::Tensor& codes, const at::Tensor& scales, const StateNames& names, int s,
                  const at::Tensor& param, const Place& place);

// Whether the kernels take a state. Raises where it can't belong to its parameter.
bool covers_state(const at::Tensor& state, const Name& name, const at::Tensor& param, const Place& place);

}  // namespace fastclip
