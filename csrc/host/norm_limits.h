// Reads a rule that stands for a limit on the norm: max_norm={"rule": "quantile", ...}.
#pragma once

#include <string>

#include "../rules/norm_limit.h"
#include "python.h"

namespace fastclip {

// Reads the rule in `group[key]`. fastclip/norm_rules.py checks it, says what is wrong with it, and puts the complete
// dict in its place; one that is complete is read without Python. `leaves_out`: the limit is skip_norm.
NormLimit read_rule(PyObject* group, const Name& key, bool leaves_out, const std::string& where);

}  // namespace fastclip
