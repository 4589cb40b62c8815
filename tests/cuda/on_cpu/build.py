"""Builds a fastclip whose CPU steps are taken by the CUDA kernels, on the emulated device of this folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.project import CSRC, ROOT

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")
# What nvcc takes for granted: types are punned in shared memory and tables.
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-w"]
SANITIZERS = {
    "plain": ["-O1", "-g1"],
    "quick": ["-O0"],  # to compile
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # A flag that is read in a loop until another thread has set it is volatile, and no race.
    "tsan": ["-O1", "-g1", "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"],
}
# Enough for one kernel of each kind: with 0 to 3 states, a scalar, norms of tensors, limits on the change, what is
# added, products. What the other rules have is arithmetic, and takes as long to compile.
FEW_RULES = "RuleList<SGD, Adam, NAdam, NovoGrad, ScaledAdam, ClipGrad>"


def copied(folder, few_rules=False):
    """A copy of csrc for this folder. Kernels take their argument by reference: it is never changed, and a copy for
    each thread, of 32 KB, would take a third of the time. With few rules it compiles in half the time."""
    csrc = shutil.copytree(CSRC, folder / "csrc")
    for name in ("cuda/table.cuh", "cuda/kernels.cuh"):
        _replace(csrc / name, r"const __grid_constant__ (\w+(?:<\w+>)?) ", r"const \1& ")
    # Tensors of more tiles than a warp sums are here, too.
    _replace(csrc / "cuda/table.cuh", r"(?<=constexpr uint32_t kTilesOfWarp = )1024(?=;)", "16")
    if few_rules:
        _replace(csrc / "rules/rules.h", r"(?<=^using Rules = )RuleList<[^>]*>", FEW_RULES)
    return csrc


def _replace(file, pattern, by):
    text, count = re.subn(pattern, by, file.read_text(), flags=re.M)
    assert count == 1, f"{file.name}: {pattern} is there {count} times"
    file.write_text(text)


def compile_(sanitizer, *arguments):
    command = [COMPILER, *FLAGS, *SANITIZERS[sanitizer], *map(str, arguments)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, f"{' '.join(command)}\n{built.stderr[-4000:]}"


def objects(folder, sanitizer, *sources, csrc):
    """Compiles each source, kernels too, with the headers of `csrc`; returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        compile_(sanitizer, f"-I{HERE}", f"-I{csrc}", "-x", "c++", "-c", source, "-o", target)
        found.append(target)
    return found


def package(folder):
    """A copy of the project's Python in `folder`, with a library of kernels of its own. Returns the environment to run
    it in.

    The glue, which knows torch, is taken as `make build` has compiled it.
    """
    csrc = copied(folder / "build")
    kernels = (csrc / "cuda/step.cu", HERE / "cuda_on_cpu.cpp", HERE / "step_cpu.cpp")
    made = objects(folder / "build", "plain", *kernels, csrc=csrc)
    for name in ("fastclip", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("libfastclip.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    library = folder / "fastclip" / "libfastclip.so"
    compile_("plain", "-shared", "-Wl,-soname,libfastclip.so", "-o", library, *made)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run_tests(folder, variables, *arguments):
    """pytest in `folder`, with this folder's plugin."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.cuda.on_cpu.plugin", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
