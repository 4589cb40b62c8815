"""The machine code of the CPU's loops, by each compiler: as wide as their instruction set, no call per element."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

from tests.support.project import CSRC, ROOT, load_setup

setup = load_setup()

REGISTERS = {"Avx512": "zmm", "Avx2": "ymm", "Baseline": "xmm"}
# What the compilers make of loops that copy, and no call per element.
COPIES = {"memcpy", "memset", "memmove"}
# What they read of the machine.
MACHINE = {"fastclip::cpu::kMachine"}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump"),
]


@dataclass
class Function:
    name: str
    instructions: list[str] = field(default_factory=list)
    symbols: set[str] = field(default_factory=set)  # that it refers to, and that are elsewhere

    def uses(self, register):
        return any(f"%{register}" in i for i in self.instructions)


@pytest.fixture(scope="module", params=["g++", "clang++"])
def functions(request, tmp_path_factory):
    """{instruction set: its functions} of csrc/cpu, compiled as setup.py does."""
    if not shutil.which(request.param):
        pytest.skip(f"needs {request.param}")
    folder = tmp_path_factory.mktemp("machine_code")

    def compiled(name):
        source, target = CSRC / "cpu" / f"{name.lower()}.cpp", folder / f"{name}.o"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", request.param)
            command = setup.command_for()(source)
        if found := built(command, f"cpu/{name.lower()}.o"):
            return found
        subprocess.run([*command, "-c", source, "-o", target], check=True)
        return target

    sets = {name: [] for name in REGISTERS}
    for name in sets:
        disassemble(compiled(name), sets)
    return sets


def built(command, name):
    """Returns the object that the build has made by the same command of the same sources; None where there is none."""
    compiler, *flags = command
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    for file in ROOT.glob("build/temp*/build.ninja"):
        target, text = file.parent / name, file.read_text()
        for alias in ("c++", compiler):
            same = os.path.realpath(shutil.which(alias) or "") == os.path.realpath(shutil.which(compiler))
            is_new = target.is_file() and target.stat().st_mtime > newest
            if same and is_new and f"words = {shlex.join(map(str, [alias, *flags]))} " in text.replace("\n", " "):
                return target
    return None


def disassemble(target, sets):
    """Adds the functions of an object to their sets."""
    function = None
    for line in setup.nvcc.output("objdump", "-drC", "--no-show-raw-insn", target).splitlines():
        if line.endswith(">:"):
            function = Function(line)
            found = re.search(rf"\b({'|'.join(sets)})::\w+<", line)
            if found and ".cold" not in line:
                sets[found[1]].append(function)
        elif relocation := re.search(r"\bR_X86_64_\w+\s+(\w[\w:]*)", line):
            function.symbols.add(relocation[1])
        elif function:
            function.instructions.append(line)


def check(functions, register):
    """Raises AssertionError where a loop calls what should be an instruction, or its registers are narrower."""
    for function in functions:
        calls = function.symbols - COPIES - MACHINE
        assert not calls, f"{function.name} calls {calls}"
        assert function.uses(register), f"{function.name} uses no {register}"
        if "update<" in function.name and "ClipGrad" not in function.name:
            fused = [i for i in function.instructions if re.search(rf"\bvfn?m(add|sub)\d+p[sd]\b.*%{register}", i)]
            assert fused, f"{function.name} multiplies and adds no {register} in one instruction"


@pytest.mark.parametrize("name", ["Avx512", "Avx2"])
def test_loops_are_as_wide_as_their_instruction_set_and_call_nothing(functions, name):
    assert len(functions[name]) >= 70
    check(functions[name], REGISTERS[name])


def test_registers_stay_in_their_instruction_set(functions):
    """Else a machine that has no other would stop at them."""
    assert not [f.name for f in functions["Avx2"] if f.uses("zmm")]
    assert not [f.name for f in functions["Baseline"] if f.uses("zmm") or f.uses("ymm")]


def test_a_set_that_has_lost_its_target_is_found(functions):
    """It would have the machine code of the baseline."""
    updates = [f for f in functions["Baseline"] if "update<" in f.name and "ClipGrad" not in f.name]
    with pytest.raises(AssertionError, match="calls {'fma"):
        check(updates, REGISTERS["Avx512"])
    with pytest.raises(AssertionError, match="uses no zmm"):
        check([f for f in functions["Baseline"] if "measure<" in f.name], REGISTERS["Avx512"])
