"""The CUDA update kernels, run on the CPU thread by thread, give the bits of the CPU's step."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "cuda_on_cpu"


COMPILER = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-w"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_(*arguments):
    built = subprocess.run([*COMPILER, *SANITIZERS, *map(str, arguments)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def cpu_step(tmp_path_factory):
    target = tmp_path_factory.mktemp("step") / "step_cpu.o"
    compile_("-c", ROOT / "csrc" / "step_cpu.cpp", "-o", target)
    return target


def build_and_run(folder, cpu_step, kernels=None):
    """`kernels`: the text of kernels_cuda.cuh to use instead of the project's."""
    if kernels is not None:
        (folder / "kernels_cuda.cuh").write_text(kernels)
    program = folder / "update_kernels"
    includes = [f"-I{path}" for path in (folder, HERE, ROOT / "csrc")]
    compile_(*includes, HERE / "update_kernels.cpp", cpu_step, "-o", program)
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_update_kernels_have_the_bits_of_the_cpu(tmp_path, cpu_step):
    """Every dtype and rule, sizes around chunks and packs, aligned and not; under address and UB sanitizers."""
    result = build_and_run(tmp_path, cpu_step)
    assert result.returncode == 0 and result.stdout == "3600 compared, 0 different\n", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("i < size; i += kThreads) one(i);", "i + 1 < size; i += kThreads) one(i);"),  # the tail
        ("const int64_t rest = entry.numel - begin;", "const int64_t rest = kChunk;"),  # out of bounds
        ("(entries[middle].first_chunk <= chunk ? low : high)", "(entries[middle].first_chunk < chunk ? low : high)"),
        ("const bool read_buffer = terms.momentum == Momentum::running;", "const bool read_buffer = false;"),
    ],
    ids=["tail", "bounds", "search", "momentum"],
)
def test_a_planted_bug_is_found(right, wrong, tmp_path, cpu_step):
    kernels = (ROOT / "csrc" / "kernels_cuda.cuh").read_text()
    assert kernels.count(right) == 1
    assert build_and_run(tmp_path, cpu_step, kernels.replace(right, wrong)).returncode != 0
