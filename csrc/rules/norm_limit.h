// A limit on the norm of the gradients: a number, or a rule that derives it from the norms of past steps. The only
// copy, for host and device; fastclip/norm_rules.py says what the rules mean.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace fastclip {

struct NormLimit {
  enum class Kind : uint8_t { none, number, quantile, ema };

  Kind kind = Kind::none;
  bool reciprocal = false;  // ema: a norm above the limit is limited the more, the larger it is
  int32_t window = 0;       // quantile: the number of norms that it looks at
  double warmup = 0;        // the number of norms before which the limit is `ceiling`
  double q = 0;             // quantile
  double factor = 1;        // of the quantile, or of the mean
  double z = 0;             // ema: the number of standard deviations above the mean
  double decay = 0;         // ema
  double floor = 0;
  double ceiling = HUGE_VAL;  // or the number. inf: norms are only measured

  bool operator==(const NormLimit& other) const {
    return kind == other.kind && reciprocal == other.reciprocal && window == other.window && warmup == other.warmup &&
           q == other.q && factor == other.factor && z == other.z && decay == other.decay && floor == other.floor &&
           ceiling == other.ceiling;
  }
  FASTCLIP_HD bool is_set() const { return kind != Kind::none; }
  FASTCLIP_HD bool is_rule() const { return kind > Kind::number; }
};

constexpr int kLargestWindow = 1024;

// What a rule remembers, in the optimizer's state, in memory of a device. A quantile's `window` norms follow twice: in
// the order of the steps, as a ring, and sorted.
struct History {
  double seen;      // number of norms that have entered
  double next;      // quantile: the next one's place in the ring
  double mean;      // ema
  double variance;  // ema
  double unused[4];
};
constexpr int64_t kDoublesOfHistory = sizeof(History) / sizeof(double);

inline int64_t doubles_of_history(const NormLimit& limit) { return kDoublesOfHistory + 2 * int64_t{limit.window}; }

FASTCLIP_HD double* ring_of(History* history) { return reinterpret_cast<double*>(history) + kDoublesOfHistory; }

// Where the norms of past steps lie.
struct Level {
  double center = HUGE_VAL;  // the quantile, or the mean; inf during the warm-up
  double deviation = 0;
};

// The same for both limits of a step. They are read before a step decides, as the history changes afterwards.
struct Levels {
  Level max_norm;
  Level skip_norm;
};

// Interpolates between two neighbours as numpy.quantile does.
FASTCLIP_HD double between(double low, double high, double weight) {
  const double distance = high - low;
  return weight < 0.5 ? low + distance * weight : high - distance * (1 - weight);
}

FASTCLIP_HD_RARE Level level_of(const NormLimit& limit, History* history) {
  if (!history || !(history->seen >= limit.warmup)) return {};
  if (limit.kind == NormLimit::Kind::ema) return {history->mean, sqrt(history->variance)};
  const int count = history->seen < limit.window ? static_cast<int>(history->seen) : limit.window;
  const double* const sorted = ring_of(history) + limit.window;
  const double place = limit.q * (count - 1);
  const int below = static_cast<int>(place);
  return {between(sorted[below], sorted[below + 1 < count ? below + 1 : below], place - below), 0};
}

// Returns the limit for a step with this norm, without floor and ceiling.
FASTCLIP_HD double unbounded_limit(const NormLimit& limit, Level level, double norm) {
  double above = limit.z * level.deviation;
  const double distance = norm - level.center;
  if (limit.reciprocal && distance > above) above *= above / distance;
  return limit.factor * level.center + above;
}

FASTCLIP_HD_RARE double value_of(const NormLimit& limit, Level level, double norm) {
  if (!limit.is_rule()) return limit.ceiling;
  const double value = unbounded_limit(limit, level, norm);
  const double raised = value < limit.floor ? limit.floor : value;
  return raised < limit.ceiling ? raised : limit.ceiling;  // also where it is NaN: a file's history was none
}

// A thread that does by itself what a GPU's warp does together, see cuda/decision.cuh.
struct Alone {
  bool is_first() const { return true; }
  void sync() const {}
  // Returns how many of the sorted numbers are below a bound.
  int count_below(const double* sorted, int count, double bound) const {
    int below = 0;
    while (count > 0) {
      const int half = count / 2;
      const bool right = sorted[below + half] < bound;
      below = right ? below + half + 1 : below;
      count = right ? count - half - 1 : half;
    }
    return below;
  }
  // Moves numbers by one place, up or down.
  void move(double* to, const double* from, int count) const { memmove(to, from, sizeof(double) * count); }
};

// Puts a norm into the ring, in place of the oldest, and among the sorted ones.
template <class Workers>
FASTCLIP_HD void push_to_ring(const NormLimit& limit, History* history, double norm, Workers workers) {
  const int window = limit.window;
  double* const ring = ring_of(history);
  double* const sorted = ring + window;
  // Whatever a file has put there, nothing outside is touched.
  const bool full = !(history->seen < window);
  const int count = full ? window : history->seen > 0 ? static_cast<int>(history->seen) : 0;
  const int next = history->next >= 0 && history->next < window ? static_cast<int>(history->next) : 0;
  const int after = workers.count_below(sorted, count, norm);
  int gap = full ? workers.count_below(sorted, count, ring[next]) : count;  // where the oldest one is
  gap = gap < window ? gap : window - 1;
  const int place = after > gap ? after - 1 : after;
  const bool up = place < gap;
  workers.move(sorted + (up ? place + 1 : gap), sorted + (up ? place : gap + 1), up ? gap - place : place - gap);
  workers.sync();  // all have read what the first one changes
  if (!workers.is_first()) return;
  sorted[place] = ring[next] = norm;
  history->next = next + 1 < window ? next + 1 : 0;
  history->seen += 1;
}

// Puts a norm into the averages: those of the first `warmup` norms, then moving ones. What enters is cut at the limit.
// A limit below the mean, as of a ratio below 1, would bring the mean to 0, and a skip_norm below twice the mean might
// never rise, and leave out all steps from then on: what enters is then cut at twice the mean.
FASTCLIP_HD void push_to_averages(const NormLimit& limit, History* history, Level level, double norm, bool leaves_out) {
  double mean = history->mean, variance = history->variance, seen = history->seen;
  const bool sound = seen > 0 && mean > 0 && variance >= 0;
  if (!sound) mean = variance = seen = 0;
  double next_mean, next_variance;
  if (seen < limit.warmup) {
    const double weight = 1 / (seen + 1);
    const double distance = norm - mean;
    next_mean = mean + distance * weight;
    next_variance = variance + (distance * (norm - next_mean) - variance) * weight;
  } else {
    const double limited = unbounded_limit(limit, level, norm);
    const double most = limited >= (leaves_out ? 2 * mean : mean) ? limited : 2 * mean;
    const double entering = norm < most ? norm : most;
    next_mean = limit.decay * mean + (1 - limit.decay) * entering;
    const double distance = entering - next_mean;
    next_variance = limit.decay * variance + (1 - limit.decay) * (distance * distance);
  }
  if (!(next_variance < HUGE_VAL)) return;  // float64 norms above 1e154
  history->mean = next_mean;
  history->variance = next_variance;
  history->seen = seen + 1;
}

// Remembers the norm of a step. 0 and numbers that are not finite never enter. `level` is that of before the step;
// `leaves_out`: the limit is skip_norm.
template <class Workers>
FASTCLIP_HD_RARE void push(const NormLimit& limit, History* history, Level level, double norm, bool leaves_out,
                           Workers workers) {
  if (!history || !(norm > 0 && norm < HUGE_VAL)) return;
  if (limit.kind == NormLimit::Kind::quantile) {
    push_to_ring(limit, history, norm, workers);
  } else if (workers.is_first()) {
    push_to_averages(limit, history, level, norm, leaves_out);
  }
}

}  // namespace fastclip
