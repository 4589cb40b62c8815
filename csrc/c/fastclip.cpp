// The functions of fastclip.h: no exception leaves them.
#include <exception>
#include <memory>

#include "plan.h"

using namespace fastclip;

namespace {

thread_local std::string last_error;

// Calls body(), and returns what it returns; `failed` where it throws.
template <class Result, class Body>
Result guarded(Result failed, const Body& body) noexcept {
  try {
    return body();
  } catch (const Refused& refused) {
    last_error = refused.text;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return failed;
}

template <class Plan>
Plan& checked(Plan* plan) {
  if (!plan) refuse("there is no plan");
  return *plan;
}

}  // namespace

extern "C" {

const char* fastclip_error(void) { return last_error.c_str(); }

const char* fastclip_capability(void) { return cpu::capability(); }

fastclip_plan* fastclip_plan_new(const char* optimizer, const fastclip_setting* settings, size_t setting_count,
                                 const fastclip_tensor* tensors, size_t tensor_count) {
  return guarded<fastclip_plan*>(nullptr, [&] {
    rule_named(optimizer);
    if ((!settings && setting_count > 0) || (!tensors && tensor_count > 0)) refuse("a list is NULL, and not empty");
    Settings given;
    for (size_t i = 0; i < setting_count; ++i) {
      if (settings[i].name && given.has(settings[i].name)) refuse(settings[i].name, " is given twice");
      given.set(settings[i].name, settings[i].value);
    }
    auto plan = std::make_unique<fastclip_plan>(optimizer, std::move(given));
    for (size_t i = 0; i < tensor_count; ++i) plan->add(tensors[i]);
    return plan.release();
  });
}

void fastclip_plan_free(fastclip_plan* plan) { delete plan; }

int fastclip_step(fastclip_plan* plan, fastclip_result* result) {
  return guarded(-1, [&] {
    const fastclip_result taken = checked(plan).take_step();
    if (result) *result = taken;
    return 0;
  });
}

int fastclip_set(fastclip_plan* plan, const char* name, double value) {
  return guarded(-1, [&] { return checked(plan).set(name, value), 0; });
}

int fastclip_set_grad(fastclip_plan* plan, size_t tensor, void* grad) {
  return guarded(-1, [&] { return checked(plan).set_grad(tensor, grad), 0; });
}

void* fastclip_state(fastclip_plan* plan, size_t tensor, const char* name, fastclip_dtype* dtype) {
  return plan ? plan->state(tensor, name, dtype) : nullptr;
}

int fastclip_is_new(const fastclip_plan* plan, size_t tensor) {
  return guarded(-1, [&] { return int{checked(plan).is_new(tensor)}; });
}

int fastclip_resume(fastclip_plan* plan, size_t tensor) {
  return guarded(-1, [&] { return checked(plan).resume(tensor), 0; });
}

void fastclip_set_threads(fastclip_plan* plan, int threads,
                          void (*run)(int count, void (*work)(void*), void* context)) {
  if (plan) plan->use_threads(threads, run);
}

}  // extern "C"
