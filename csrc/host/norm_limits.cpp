// Reads a rule that stands for a limit on the norm: max_norm={"rule": "quantile", ...}.
#include "norm_limits.h"

#include <optional>

namespace fastclip {
namespace {

// Reads a dict in the order in which fastclip/norm_rules.py writes its keys. It is good if each value is there, and of
// its type, and there is no other key.
class RuleReader {
 public:
  explicit RuleReader(PyObject* dict) : size_(PyDict_Size(dict)), dict_(dict) {}

  PyObject* value(const Name& name) {
    ++read_;
    return dict_.value(name);
  }

  double number(const Name& name) {
    PyObject* const number = value(name);
    if (number && PyFloat_CheckExact(number)) return PyFloat_AS_DOUBLE(number);
    good_ = false;
    return 0;
  }

  int32_t count(const Name& name) {
    PyObject* const number = value(name);
    int overflow = 1;
    const long count = number && PyLong_CheckExact(number) ? PyLong_AsLongAndOverflow(number, &overflow) : 0;
    good_ &= !overflow && count >= 0 && count <= INT32_MAX;
    return good_ ? static_cast<int32_t>(count) : 0;
  }

  void require(bool good) { good_ &= good; }
  bool good() const { return good_ && read_ == size_; }

 private:
  const Py_ssize_t size_;
  DictInOrder dict_;
  Py_ssize_t read_ = 0;
  bool good_ = true;
};

bool is_text(PyObject* value, const char* text) {
  return value && PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

bool is_finite(double number) { return number - number == 0; }

// The limits of the values are those of fastclip/norm_rules.py, which words them.
std::optional<NormLimit> read_complete(PyObject* value, bool leaves_out) {
  static const Name kRule("rule"), kQ("q"), kScale("scale"), kWindow("window"), kWarmup("warmup"), kFloor("floor"),
      kCeiling("ceiling"), kZ("z"), kRatio("ratio"), kDecay("decay"), kAbove("above");
  if (!PyDict_CheckExact(value)) return {};
  RuleReader reader(value);
  NormLimit limit;
  PyObject* const rule = reader.value(kRule);
  if (is_text(rule, "quantile")) {
    limit.kind = NormLimit::Kind::quantile;
    limit.q = reader.number(kQ);
    limit.factor = reader.number(kScale);
    limit.window = reader.count(kWindow);
    const int32_t warmup = reader.count(kWarmup);
    limit.warmup = warmup;
    reader.require(limit.q >= 0 && limit.q <= 1 && limit.window >= 2 && limit.window <= kLargestWindow &&
                   warmup <= limit.window);
  } else {
    reader.require(is_text(rule, "ema"));
    limit.kind = NormLimit::Kind::ema;
    limit.z = reader.number(kZ);
    limit.factor = reader.number(kRatio);
    limit.decay = reader.number(kDecay);
    limit.warmup = reader.count(kWarmup);
    PyObject* const above = reader.value(kAbove);
    limit.reciprocal = is_text(above, "reciprocal");
    reader.require(limit.reciprocal || is_text(above, "threshold"));
    reader.require(limit.z >= 0 && is_finite(limit.z) && limit.decay >= 0 && limit.decay < 1);
    reader.require(!leaves_out || limit.z > 0 || limit.factor > 1);
  }
  limit.floor = reader.number(kFloor);
  limit.ceiling = reader.number(kCeiling);
  reader.require(limit.factor > 0 && is_finite(limit.factor) && limit.warmup >= 1);
  reader.require(limit.floor >= 0 && limit.floor <= limit.ceiling && is_finite(limit.floor));
  reader.require(!leaves_out || limit.factor >= 1);
  if (!reader.good()) return {};
  return limit;
}

}  // namespace

NormLimit read_rule(PyObject* group, const Name& key, bool leaves_out, const std::string& where) {
  const Held given(PyDict_GetItemWithError(group, key.object));
  if (!given.object) raise(PyExc_KeyError, key.text, where, " is missing");
  if (const auto limit = read_complete(given.object, leaves_out)) return *limit;
  const Held rules = checked(PyImport_ImportModule("fastclip.norm_rules"));
  const Held what = checked(PyUnicode_FromString((key.text + where).c_str()));
  const Held rule = checked(PyObject_CallMethod(rules.object, "complete_rule", "OOi", given.object, what.object,
                                                static_cast<int>(leaves_out)));
  const auto limit = read_complete(rule.object, leaves_out);
  if (!limit) raise(PyExc_ValueError, key.text, where, " can't be read: ", repr(rule.object));
  // Groups share one dict, which has all keys already. Another one, which may be the caller's, is left as it is.
  const bool in_place = PyDict_CheckExact(given.object) && PyDict_Size(given.object) == PyDict_Size(rule.object);
  const int failed =
      in_place ? PyDict_Update(given.object, rule.object) : PyDict_SetItem(group, key.object, rule.object);
  if (failed) throw PythonError{};
  return *limit;
}

}  // namespace fastclip
