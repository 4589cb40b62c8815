// The hyperparameters of a plan, by name: read by the rules as the host's groups are.
#pragma once

#include <cmath>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../step.h"

namespace fastclip {

// Something is wrong with what a C program gave; says what.
struct Refused {
  std::string text;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string text;
  ((text += parts), ...);
  throw Refused{std::move(text)};
}

class Settings {
 public:
  struct Key {
    const char* text;
    explicit Key(const char* name) : text(name) {}
  };

  void set(const char* name, double value) {
    if (!name) refuse("a setting has no name");
    if (std::isnan(value)) refuse(name, " is NaN");
    for (Setting& setting : all_) {
      if (setting.name == name) {
        setting.value = value;
        return;
      }
    }
    all_.push_back({name, value, false});
  }
  bool has(const char* name) const { return find(name) != nullptr; }

  double number(const Key& key) const {
    const Setting* const setting = find(key.text);
    if (!setting) refuse(key.text, " is missing: the optimizer needs a value");
    // As torch.optim, but for the dampening, whose sign it leaves alone.
    if (setting->value < 0 && setting->name != "dampening") refuse(key.text, " is negative");
    return setting->value;
  }
  double number_or(const char* name, double missing) const {
    const Setting* const setting = find(name);
    return setting ? setting->value : missing;
  }
  double non_negative_or(const char* name, double missing) const {
    const double value = number_or(name, missing);
    if (!(value >= 0)) refuse(name, " is negative");
    return value;
  }
  double number_or_none(const Key& key, double none) const { return non_negative_or(key.text, none); }
  double count(const Key& key) const { return number(key); }
  bool flag(const Key& key) const {
    const double value = number_or(key.text, 0);
    if (value != 0 && value != 1) refuse(key.text, " is a switch: 0 or 1");
    return value == 1;
  }
  void betas(const Key&, double& beta1, double& beta2) const {
    beta1 = beta("beta1");
    beta2 = beta("beta2");
  }

  // After all was read.
  void check_known(const char* optimizer) const {
    for (const Setting& setting : all_) {
      if (!setting.known) refuse(setting.name, " is no setting of ", optimizer);
    }
  }

 private:
  struct Setting {
    std::string name;
    double value;
    mutable bool known;  // somebody has asked for it
  };

  const Setting* find(const char* name) const {
    for (const Setting& setting : all_) {
      if (setting.name == name) {
        setting.known = true;
        return &setting;
      }
    }
    return nullptr;
  }
  double beta(const char* name) const {
    const double value = number(Key(name));
    if (!(value >= 0 && value < 1)) refuse(name, " must be at least 0 and below 1");
    return value;
  }

  std::vector<Setting> all_;
};

}  // namespace fastclip
