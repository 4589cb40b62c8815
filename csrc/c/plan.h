// A plan: tensors, their states, and what a step needs besides.
#pragma once

#include <fastclip.h>

#include <string>
#include <utility>
#include <vector>

#include "options.h"

struct fastclip_plan {
 public:
  // All throw fastclip::Refused, and have then changed nothing.
  fastclip_plan(const char* optimizer, fastclip::Settings settings);
  void add(const fastclip_tensor& tensor);
  void set(const char* name, double value);
  void set_grad(size_t tensor, void* grad);

  fastclip_result take_step();
  void* state(size_t tensor, const char* name, fastclip_dtype* dtype);  // nullptr where there is none
  bool is_new(size_t tensor) const { return at(tensor).is_new; }
  void resume(size_t tensor) { at(tensor).is_new = false; }

  using Run = void (*)(int count, void (*work)(void*), void* context);
  void use_threads(int count, Run run);

 private:
  struct Tensor {
    fastclip_tensor given;
    std::vector<double> arrays[fastclip::kMaxStates];  // of `state_dtypes`; double for the alignment
    fastclip::DType state_dtypes[fastclip::kMaxStates];
    float step = 0;
    float scalar = 0;
    bool is_new = true;  // no step has taken it
  };

  const Tensor& at(size_t tensor) const;
  Tensor& at(size_t tensor) { return const_cast<Tensor&>(std::as_const(*this).at(tensor)); }
  void lay_out(Tensor& tensor);
  void list();
  void list_segments();
  fastclip::TensorEntry entry_of(Tensor& tensor, uint32_t index);

  fastclip::cpu::ThreadPool pool_;
  fastclip::Rules::Id rule_;
  std::string optimizer_;
  fastclip::Settings settings_;
  fastclip::Options options_;
  std::vector<Tensor> tensors_;
  fastclip::Step step_;
  fastclip::Outcome outcome_{};
  std::vector<fastclip::Measure> measures_;
  std::vector<fastclip::DeltaSums> deltas_;
  std::vector<fastclip::SegmentOutcome> segment_outcomes_;
  double clamped_ = 0;
};
