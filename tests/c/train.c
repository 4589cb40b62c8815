/* Trains two parameters from C, and prints a hash of their bits. test_program.py does the same in Python. */
#include <fastclip.h>
#include <stdio.h>
#include <string.h>

enum { WEIGHTS = 5000, BIASES = 7, STEPS = 20 };

static float weight[WEIGHTS], weight_grad[WEIGHTS], bias[BIASES], bias_grad[BIASES];

static void give_gradients(float* grad, int count, int step) {
  for (int i = 0; i < count; ++i) grad[i] = (float)((i * 31 + step * 17) % 113 - 56) / 32;
}

static uint64_t hashed(uint64_t hash, const float* values, int count) {
  for (int i = 0; i < count; ++i) {
    uint32_t word;
    memcpy(&word, &values[i], sizeof word);
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

int main(void) {
  const fastclip_setting settings[] = {{"lr", 0.01},
                                       {"beta1", 0.9},
                                       {"beta2", 0.999},
                                       {"eps", 1e-8},
                                       {"max_norm", 1},
                                       {"weight_decay", 0.01},
                                       {"decoupled_weight_decay", 1}};
  const fastclip_tensor tensors[] = {{weight, weight_grad, WEIGHTS, FASTCLIP_FLOAT32, FASTCLIP_FLOAT32},
                                     {bias, bias_grad, BIASES, FASTCLIP_FLOAT32, FASTCLIP_FLOAT32}};
  const size_t setting_count = sizeof settings / sizeof settings[0];
  fastclip_result result = {0, 0, 0, 0};

  for (int i = 0; i < WEIGHTS; ++i) weight[i] = (float)(i % 97 - 48) / 64;
  for (int i = 0; i < BIASES; ++i) bias[i] = (float)(i - 3) / 8;

  if (fastclip_plan_new("sdg", settings, setting_count, tensors, 2)) return 1;
  puts(fastclip_error());

  fastclip_plan* plan = fastclip_plan_new("adam", settings, setting_count, tensors, 2);
  if (!plan) return puts(fastclip_error());
  for (int step = 0; step < STEPS; ++step) {
    give_gradients(weight_grad, WEIGHTS, step);
    give_gradients(bias_grad, BIASES, step);
    if (fastclip_step(plan, &result) != 0) return puts(fastclip_error());
  }
  fastclip_plan_free(plan);

  const uint64_t hash = hashed(hashed(14695981039346656037u, weight, WEIGHTS), bias, BIASES);
  printf("%016llx %.17g\n", (unsigned long long)hash, result.total_norm);
  return 0;
}
