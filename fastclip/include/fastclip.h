/* Clips gradients and updates the parameters of a model in one pass over memory: the CPU kernels of fastclip for C.
   They need no Python and no torch, and take the same steps as fastclip in Python, to the bit.

     const fastclip_setting settings[] = {{"lr", 0.1}, {"momentum", 0.9}, {"dampening", 0}, {"max_norm", 1}};
     const fastclip_tensor tensors[] = {{weight, weight_grad, 1000, FASTCLIP_FLOAT32, FASTCLIP_FLOAT32}};
     fastclip_plan* plan = fastclip_plan_new("sgd", settings, 4, tensors, 1);
     if (!plan) return puts(fastclip_error());
     for (...) {
       ... fills weight_grad ...
       if (fastclip_step(plan, NULL) != 0) return puts(fastclip_error());
     }
     fastclip_plan_free(plan);

   `python -m fastclip` says where this file and libfastclip.so are. A plan belongs to one thread at a time. The C++
   runtime library has to be there; no exception leaves a function. */
#ifndef FASTCLIP_H
#define FASTCLIP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTCLIP_C __attribute__((visibility("default")))

typedef enum { FASTCLIP_FLOAT32, FASTCLIP_FLOAT64, FASTCLIP_BFLOAT16, FASTCLIP_FLOAT16 } fastclip_dtype;

/* A parameter. Both arrays are contiguous, of `numel` elements, aligned to one, and overlap no other's. float64 goes
   with float64 alone. */
typedef struct {
  void* param;
  void* grad; /* NULL: no gradient in the next step, which leaves the parameter alone. Set with fastclip_set_grad */
  int64_t numel;
  fastclip_dtype dtype;
  fastclip_dtype grad_dtype;
} fastclip_tensor;

/* A hyperparameter, by torch's name. `lr` and all that the optimizer has need a value: none is assumed. true is 1.
     sgd       momentum, dampening, nesterov
     adam      beta1, beta2, eps, amsgrad, decoupled_weight_decay (1: AdamW), max_update_rms (may be left out)
     novograd  beta1, beta2, eps, grad_averaging
     lamb      beta1, beta2, eps, bias_correction, adam_w_mode, grad_averaging, use_nvlamb, max_update_rms; max_norm is
               apex's max_grad_norm
     others    lion, adadelta, adagrad, nadam, radam, rmsprop: as in torch.optim
     all       lr, weight_decay, maximize, clip_value (or clip_low and clip_high), max_norm, norm_type (2, or INFINITY),
               skip_nonfinite, stochastic_rounding, rounding_seed, momentum_dtype (a fastclip_dtype)
   Refused are: a setting that the optimizer does not have, NAN, and numbers that torch.optim refuses. Switches,
   weight_decay and the clips may be left out. A clip of INFINITY clips nothing. */
typedef struct {
  const char* name;
  double value;
} fastclip_setting;

typedef struct fastclip_plan fastclip_plan;

/* What a step did. */
typedef struct {
  double total_norm;  /* of all gradients after the value clip, before the norm clip; NAN without max_norm */
  double coefficient; /* that the norm clip multiplied them by */
  int64_t clamped;    /* number of elements that the value clip changed */
  int skipped;        /* 1: skip_nonfinite met an inf or NaN, and nothing was changed */
} fastclip_result;

/* Why the last call on this thread that failed did so. */
FASTCLIP_C const char* fastclip_error(void);

/* The instruction set that runs: "AVX512", "AVX2", "baseline" or "NEON". */
FASTCLIP_C const char* fastclip_capability(void);

/* Returns a plan with states of its own, new; NULL where something is wrong. Copies what it is given, but for the
   arrays, which have to stay as long as the plan does. */
FASTCLIP_C fastclip_plan* fastclip_plan_new(const char* optimizer, const fastclip_setting* settings,
                                            size_t setting_count, const fastclip_tensor* tensors, size_t tensor_count);
FASTCLIP_C void fastclip_plan_free(fastclip_plan* plan);

/* Clips and updates. `result` may be NULL. Returns 0, or -1 where nothing was changed. */
FASTCLIP_C int fastclip_step(fastclip_plan* plan, fastclip_result* result);

/* Changes a setting, such as lr, from the next step on. Returns 0, or -1 and nothing has changed. momentum_dtype, and
   what would need other states, can't be changed. */
FASTCLIP_C int fastclip_set(fastclip_plan* plan, const char* name, double value);

/* Another array for the gradient of a tensor, or NULL. Returns 0, or -1 where there is no such tensor. */
FASTCLIP_C int fastclip_set_grad(fastclip_plan* plan, size_t tensor, void* grad);

/* Returns a state of a tensor by torch's name ("momentum_buffer", "exp_avg", "step"), to save it or to write what was
   saved; NULL where there is none. It has numel elements of `*dtype`; "step" and "mu_product" are one float. `dtype`
   may be NULL. The address stays until fastclip_set, or the end of the plan. */
FASTCLIP_C void* fastclip_state(fastclip_plan* plan, size_t tensor, const char* name, fastclip_dtype* dtype);

/* Returns whether no step has taken a tensor yet: then its states say nothing, and need not be saved. */
FASTCLIP_C int fastclip_is_new(const fastclip_plan* plan, size_t tensor);

/* Takes a tensor's states for those of a training that goes on, after they were written. Returns 0, or -1 where there
   is no such tensor. Leave out a tensor that was new when it was saved. */
FASTCLIP_C int fastclip_resume(fastclip_plan* plan, size_t tensor);

/* Steps take `threads` threads: run(count, work, context) has to call work(context) `count` times, each on a thread of
   its own, and to return after all have; `count` is at most `threads`. `run` must return: no exception, no longjmp. By
   default there is one thread, and no call. */
FASTCLIP_C void fastclip_set_threads(fastclip_plan* plan, int threads,
                                     void (*run)(int count, void (*work)(void*), void* context));

#ifdef __cplusplus
}
#endif

#endif
