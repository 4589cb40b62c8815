"""A rule that lacks something does not compile: of each member that csrc/rules/rule.h asks for, one is taken away."""

import re
import shutil
import subprocess

import pytest

from tests.cuda.on_cpu import build
from tests.support.project import CSRC, load_setup

setup = load_setup()
RULE = "nadam.h"  # has all members, a scalar among them
# The place that needs each member; the last ones are the host's, which includes torch.
MEMBERS = {
    "cpu/step.cpp": ["kClipsInPlace", "kScalar", "kSwitches", "Constants", "constants", "next_scalar", "Settings"]
    + ["kLimitsChange", "kNeedsNorm", "kNeedsProducts", "kMeasuresDelta"],
    "cpu/baseline.cpp": ["canonical", "reads", "writes", "update"],
    "cuda/step.cu": ["kKernels", "kIsCommon", "kCountsSteps", "kStates"],
    "host/groups.cpp": ["read", "terms"],
    "host/states.cpp": ["new_value", "kFilledByFirstStep", "kQuantizesStates"],
    "host/bindings.cpp": ["kName"],
}


def without(text, member):
    """A header with the declaration of a member under another name."""
    kinds = "static constexpr|FASTCLIP_HD static|static|struct"
    declaration = re.compile(rf"^(  (?:{kinds})\b[^\n=;{{(]*?\b){member}\b(?=\s*[=({{[])", re.M)
    changed, count = declaration.subn(rf"\1forgotten_{member}", text)
    assert count == 1, f"{member}: {count} declarations"
    return changed


def compile_(csrc, source):
    """Only the checks of the compiler, of `source` in a copy of csrc."""
    from torch.utils import cpp_extension

    flags = ["-std=c++20", "-w", "-fsyntax-only", f"-I{build.HERE}", f"-I{csrc}"]
    if source.startswith("host/"):
        import sysconfig

        flags += [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
        flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    return subprocess.run([build.COMPILER, *flags, "-x", "c++", csrc / source], capture_output=True, text=True)


def test_every_member_that_is_asked_for_is_in_this_file():
    asked = re.findall(r"^//   (\w+)", (CSRC / "rules/rule.h").read_text(), re.M)
    listed = [member for members in MEMBERS.values() for member in members]
    assert sorted(set(asked) | {"writes"}) == sorted(listed)


@pytest.mark.thorough
@pytest.mark.parametrize("source", MEMBERS)
def test_a_rule_that_forgets_a_member_does_not_compile(source, tmp_path):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    result = compile_(csrc, source)
    assert result.returncode == 0, result.stderr
    # Where torch's headers make a compilation slow, all at once: each is an error of its own.
    together = [MEMBERS[source]] if source.startswith("host/") else [[member] for member in MEMBERS[source]]
    original = (csrc / "rules" / RULE).read_text()
    for members in together:
        text = original
        for member in members:
            text = without(text, member)
        (csrc / "rules" / RULE).write_text(text)
        errors = [line for line in compile_(csrc, source).stderr.splitlines() if "error: " in line]
        for member in members:
            assert any(re.search(rf"\b{member}\b", line) for line in errors), f"{source} compiles without {member}"


def test_a_rule_that_is_not_in_the_list_does_not_compile(tmp_path):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    rules = (csrc / "rules/rules.h").read_text()
    (csrc / "rules/rules.h").write_text(rules.replace("NAdam, ", ""))
    program = '#include "rules/rules.h"\nint main() { return fastclip::Rules::id_of<fastclip::NAdam>().index(); }\n'
    (csrc / "program.cpp").write_text(program)
    result = compile_(csrc, "program.cpp")
    assert result.returncode != 0 and "not in the list of rules" in result.stderr
