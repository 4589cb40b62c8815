// The list of all update rules, and the way from a rule that is chosen at run time to its type.
#pragma once

#include <algorithm>
#include <cstddef>
#include <tuple>

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "clip_grad.h"
#include "lamb.h"
#include "lion.h"
#include "nadam.h"
#include "novograd.h"
#include "radam.h"
#include "rmsprop.h"
#include "rule.h"
#include "scaled_adam.h"
#include "sgd.h"

namespace fastclip {

template <class R>
struct Tag {
  using Rule = R;
};

template <class... AllRules>
struct RuleList {
  static constexpr int kCount = sizeof...(AllRules);
  static_assert(((AllRules::kCountsSteps || AllRules::kScalar.name == nullptr) && ...),
                "a scalar belongs to counted steps");

  // A rule of the list. Only `id_of` and `find` return one.
  class Id {
   public:
    constexpr int index() const { return index_; }

   private:
    friend RuleList;
    explicit constexpr Id(int index) : index_(index) {}
    int index_;
  };

  template <class R>
  static constexpr Id id_of() {
    static_assert((std::is_same_v<R, AllRules> || ...), "not in the list of rules");
    int i = 0, found = 0;
    ((found = std::is_same_v<R, AllRules> ? i : found, ++i), ...);
    return Id(found);
  }

  // Calls found(id) for the first rule whose wanted(tag) is true. Returns whether there was one.
  template <class Wanted, class Found>
  static bool find(const Wanted& wanted, const Found& found) {
    return ((wanted(Tag<AllRules>{}) && (found(id_of<AllRules>()), true)) || ...);
  }

  // Calls body(tag) for the rule, and returns its result.
  template <class Body>
  static decltype(auto) visit(Id id, const Body& body) {
    return visit_from<0>(id, body);
  }

  template <class Body>
  static constexpr void each(const Body& body) {
    (body(Tag<AllRules>{}), ...);
  }

  static constexpr size_t kSettingsBytes = std::max({sizeof(typename AllRules::Settings)...});
  static constexpr size_t kConstantsBytes = std::max({sizeof(typename AllRules::template Constants<double>)...});

 private:
  template <int kIndex, class Body>
  static decltype(auto) visit_from(Id id, const Body& body) {
    using Rule = std::tuple_element_t<kIndex, std::tuple<AllRules...>>;
    if constexpr (kIndex + 1 < kCount) {
      if (id.index() != kIndex) return visit_from<kIndex + 1>(id, body);
    }
    return body(Tag<Rule>{});
  }
};

// The only list. Python finds a rule by its kName.
using Rules = RuleList<SGD, Adam, Lion, Adadelta, Adagrad, NAdam, RAdam, RMSprop, NovoGrad, ScaledAdam, LAMB, ClipGrad>;

// All hyperparameters of a group: those that all rules have, and those of its own rule.
struct Hyper : SharedHyper {
  alignas(double) unsigned char settings[Rules::kSettingsBytes];

  template <class R>
  FASTCLIP_HD const typename R::Settings& of() const {
    return *reinterpret_cast<const typename R::Settings*>(settings);
  }
};

// Returns the change that a gradient of norm 1 makes in the end.
inline double change_of(Rules::Id rule, const Hyper& hyper, double lr) {
  return Rules::visit(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kLimitsChange) {
      return R::change(hyper.of<R>(), lr);
    } else {
      return 0.0;
    }
  });
}

inline bool clips_in_place(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kClipsInPlace; });
}

inline bool needs_norm(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kNeedsNorm; });
}

inline bool needs_products(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kNeedsProducts; });
}

inline bool can_measure_delta(Rules::Id rule) {
  return Rules::visit(rule, [](auto tag) { return decltype(tag)::Rule::kMeasuresDelta; });
}

// Returns the parts of DeltaSums that the rule needs of the tensors of a row.
inline DeltaParts measured_of(Rules::Id rule, const Hyper& hyper) {
  return Rules::visit(rule, [&](auto tag) -> DeltaParts {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kMeasuresDelta) {
      return R::measured(hyper, hyper.of<R>());
    } else {
      return 0;
    }
  });
}

// Returns the factor of a tensor's learning rate that follows from them.
inline double lr_factor_of(Rules::Id rule, const Hyper& hyper, double numel, const DeltaNorms& norms) {
  return Rules::visit(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kMeasuresDelta) {
      return R::lr_factor(hyper, hyper.of<R>(), numel, norms);
    } else {
      return 1.0;
    }
  });
}

// Returns the length of the row of numbers that a rule keeps for each parameter; a scalar is one of 1.
inline int64_t length_of_row(Rules::Id rule, const Hyper& hyper) {
  return Rules::visit(rule, [&](auto tag) -> int64_t {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kNeedsProducts) {
      return R::numbers(hyper.of<R>());
    } else {
      return 1;
    }
  });
}

// Returns the weight of a tensor's norm in that clip.
inline double weight_of(Rules::Id rule, const Hyper& hyper, const Progress& at) {
  return Rules::visit(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kNeedsProducts) {
      return R::weight(hyper.of<R>(), at.numel, at.scalar);
    } else {
      return 1.0;
    }
  });
}

// Returns the clip that a rule has of its own.
inline WeightedClip weighted_clip_of(Rules::Id rule, const Hyper& hyper) {
  return Rules::visit(rule, [&](auto tag) -> WeightedClip {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kNeedsProducts) {
      return R::clip(hyper.of<R>());
    } else {
      return {};
    }
  });
}

}  // namespace fastclip
