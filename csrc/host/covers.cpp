// What the walk asks of a tensor and its states before the kernels get them: do they cover it, is its memory there, and
// is it its own?
#include <algorithm>
#include <utility>

#include "walk.h"

namespace fastclip {

bool Walk::covers(const at::Tensor& param, const at::Tensor& grad, const Place& place) {
  const char* const written = in_place_ ? "gradient" : "";
  check_belongs(param, grad, place);
  check_inference(param, written, place);
  const at::Tensor* const left = uncovered(param, grad);
  if (left) not_covered({"no_kernels", place, left == &param ? written : "gradient", {*left, param}});
  return !left;
}

void Walk::check_memory(const at::Tensor& param, const at::Tensor& grad, const StateNames& names,
                        const ParamStates& states, const Place& place) const {
  const auto check = [&](const at::Tensor& tensor, auto* part) {
    if (!is_ordinary(tensor.unsafeGetTensorImpl())) return;
    const auto item = static_cast<int64_t>(tensor.itemsize());
    const bool dense = tensor.is_non_overlapping_and_dense();
    data_of(tensor, item, dense || tensor.numel() == 0 ? item * tensor.numel() : item, part, place);
  };
  check(param, "");
  check(grad, "gradient");
  for (int s = 0; s < names.count; ++s) {
    if (states.arrays[s]) check(*states.arrays[s], &states.name(names, s));
    if (states.scales[s]) check(*states.scales[s], names.scales[s]);
  }
  if (states.master) check(*states.master, names.master);
  if (states.step) check(*states.step, names.step);
  if (states.scalar) check(*states.scalar, names.scalar);
}

// Makes the states that there are not, and says whether the kernels take those that there are.
bool Walk::cover_states(const Group& group, const at::Tensor& param, const at::Tensor& like, const Place& place,
                        const StateNames& names, ParamStates& states) {
  if (names.master && !states.master) {  // it is made of the parameter, which has to be there
    const int64_t item = item_size(dtype_of(param));
    data_of(param, item, item * param.numel(), "", place);
  }
  if (!states.complete) states_.make_missing(rule_, group, like, place, names, states);
  const auto covers = [&](const at::Tensor& state, const Name& name) {
    if (covers_state(state, name, param, place)) return true;
    not_covered({"no_kernels", place, name.text, {state, param}});
    return false;
  };
  for (int s = 0; s < names.count; ++s) {
    if (!states.arrays[s]) continue;
    if (!states.scales[s] != !states.scales[0]) {
      not_covered({"no_kernels_for_codes", place, states.name(names, s).text, {*states.arrays[s], param}});
      return false;
    }
    if (states.scales[s] ? !covers_codes(names, s, states, param, place)
                         : !covers(*states.arrays[s], *names.arrays[s])) {
      return false;
    }
  }
  if (states.master) {
    if (states.master->scalar_type() != at::kFloat) refuse("no_float32", place, names.master->text, *states.master);
    if (!covers(*states.master, *names.master)) return false;
  }
  return (!names.step || covers_numbers(param, place, *names.step, states.step, 1)) &&
         (!names.scalar || covers_numbers(param, place, *names.scalar, states.scalar, names.length_of_row));
}

bool Walk::covers_codes(const StateNames& names, int s, const ParamStates& states, const at::Tensor& param,
                        const Place& place) {
  const at::Tensor& codes = *states.arrays[s];
  const bool takes = fastclip::covers_codes(codes, *states.scales[s], names, s, param, place);
  if (takes && param.scalar_type() != at::kDouble) return true;
  not_covered({"no_kernels_for_codes", place, names.codes[s]->text, {codes, param}});
  return false;
}

bool Walk::covers_numbers(const at::Tensor& param, const Place& place, const Name& name, const at::Tensor*& numbers,
                          int64_t length) {
  // On a GPU the device decides whether a step is skipped, so it counts them, too.
  if (param.is_cuda() && numbers->is_cpu()) numbers = states_.make(place, name, numbers->to(param.device()));
  if (numbers->numel() != length) {
    if (length == 1) refuse("not_one_element", place, name.text, *numbers);
    refuse("other_length", place, name.text, *numbers, std::to_string(length));
  }
  check_inference(*numbers, name.text, place);
  const bool counts = numbers->scalar_type() == at::kFloat || numbers->scalar_type() == at::kDouble;
  if (counts && is_ordinary(numbers->unsafeGetTensorImpl()) && numbers->device() == param.device() &&
      numbers->is_contiguous()) {
    return true;
  }
  not_covered({"no_kernels_for_number", place, name.text, {*numbers, param}});
  return false;
}

// Looked at only where an address is new.
bool Walk::shares_memory() {
  if (addresses_ == disjoint_addresses_) return false;
  using Ranges = std::vector<std::pair<uintptr_t, uintptr_t>>;
  Ranges ranges, read;
  for (const auto& part : parts_) {
    for (const auto& tensor : part.step.tensors) {
      const auto add_to = [](Ranges& to, const void* data, int64_t bytes) {
        const auto begin = reinterpret_cast<uintptr_t>(data);
        if (data && bytes > 0) to.emplace_back(begin, begin + bytes);
      };
      const auto add = [&](const void* written, int64_t bytes) { add_to(ranges, written, bytes); };
      if (!in_place_) add_to(read, tensor.grad, tensor.numel * item_size(tensor.grad_dtype));
      add(tensor.param, tensor.numel * item_size(tensor.dtype));
      add(tensor.rounded, tensor.numel * item_size(tensor.rounded_dtype));
      for (int s = 0; s < kMaxStates; ++s) {
        add(tensor.states[s], tensor.numel * (tensor.scales ? 1 : item_size(tensor.state_dtypes[s])));
        if (tensor.scales) add(tensor.scales->of[s], blocks_of(tensor.numel) * int64_t{sizeof(float)});
      }
      add(tensor.step, tensor.step_is_float64 ? 8 : 4);
      add(tensor.scalar, length_of_row(rule_, part.step.hypers[tensor.hyper]) * (tensor.scalar_is_float64 ? 8 : 4));
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  for (const auto& [begin, end] : read) {
    const auto after = std::lower_bound(ranges.begin(), ranges.end(), std::pair(end, uintptr_t{0}));
    if (after != ranges.begin() && std::prev(after)->second > begin) return true;
  }
  disjoint_addresses_ = addresses_;
  return false;
}

}  // namespace fastclip
