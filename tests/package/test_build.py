"""What the build promises: it says what it is, both halves compile and link, and no kernel spills."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastclip
from tests.cuda.sass import compiled, missing, nvcc, usage_of
from tests.support import digest
from tests.support.project import CSRC, ROOT, load_setup

setup = load_setup()
nvcc_of = setup.nvcc

COMMON = ("float32", "bfloat16")  # of one dtype; those that mix dtypes may keep registers in memory meanwhile
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="needs nvcc")


def run(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_build_info_says_what_was_built():
    info = fastclip.build_info()
    assert info["torch"] == torch.__version__ and torch.__version__ in info["torches"]
    assert info["cpu_capability"] in ("AVX512", "AVX2", "baseline", "NEON")
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_command_line():
    result = run(sys.executable, "-m", "fastclip")
    assert result.returncode == 0, result.stdout
    assert torch.__version__ in result.stdout and fastclip.build_info()["cpu_capability"] in result.stdout


def test_without_a_build_the_command_is_told(tmp_path):
    shutil.copytree(
        ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    )
    result = subprocess.run([sys.executable, "-c", "import fastclip"], cwd=tmp_path, text=True, capture_output=True)
    assert "ImportError" in result.stderr and "setup.py build_ext --inplace" in result.stderr


def test_what_an_older_version_has_built_is_told(tmp_path):
    shutil.copytree(ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fastclip" / "_build_info.py").write_text("BUILD_INFO = {'torch': '2.13.0', 'cuda': None}")
    result = subprocess.run([sys.executable, "-c", "import fastclip"], cwd=tmp_path, text=True, capture_output=True)
    assert "ImportError: fastclip's extension is not built by this version of it" in result.stderr


def test_every_instruction_set_gives_the_same_bits():
    """AVX-512, AVX2 and the baseline, as far as this machine has them; read as AMD's memory likes it, and as others'.
    ARM: python -m tests.arm."""
    results = {}
    for wanted, memory in itertools.product(("AVX512", "avx2", "baseline"), ("AMD", "other")):
        chosen = {"FASTCLIP_CPU_CAPABILITY": wanted, "FASTCLIP_CPU_MEMORY": memory}
        result = run(sys.executable, "-m", "tests.support.digest", **chosen)
        assert result.returncode == 0, result.stdout
        capability, *digests = result.stdout.splitlines()
        results[capability, memory] = digests
    assert len(results["baseline", "AMD"]) == len(results["baseline", "other"]) == len(digest.ALL)
    assert len(set(map(tuple, results.values()))) == 1, results
    if "AVX512" in {capability for capability, _ in results}:
        assert len(results) == 6, results.keys()  # names in capitals or not, as torch's


@needs_nvcc
def test_the_cuda_half_was_built_and_linked():
    if os.environ.get("FASTCLIP_CUDA") == "0":
        pytest.skip("FASTCLIP_CUDA=0")
    assert fastclip.build_info()["cuda"]
    assert "9.0" in fastclip.build_info()["cuda_architectures"] or os.environ.get("TORCH_CUDA_ARCH_LIST")


@pytest.mark.skipif(bool(missing("cuobjdump")), reason=missing("cuobjdump") or "it is here")
def test_kernels_keep_their_registers():
    """For every architecture that fastclip is built for: setup.py lets no warning pass, and what spills has a stack.
    What else their code must be: test_sass.py."""
    architectures = [a.removesuffix("+PTX") for a in nvcc_of.cuda_architectures(nvcc)]
    assert architectures and "-Werror=all-warnings" in nvcc_of.NVCC_FLAGS
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for usage in pool.map(lambda architecture: usage_of(compiled(architecture)), architectures):
            assert len(usage) >= 10
            assert not [kernel for kernel, of in usage.items() if of["STACK"] > 0 and kernel.dtypes in COMMON]


def test_cuda_can_be_left_out(monkeypatch):
    monkeypatch.setenv("FASTCLIP_CUDA", "0")
    assert nvcc_of.find_nvcc() is None


@needs_nvcc
def test_cuda_architectures(monkeypatch):
    """All that the toolkit has, with PTX of the newest; TORCH_CUDA_ARCH_LIST narrows them."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    found = nvcc_of.cuda_architectures(nvcc)
    assert {"8.0", "9.0"} <= {a.removesuffix("+PTX") for a in found}
    assert [a for a in found if a.endswith("+PTX")] == [found[-1]]
    monkeypatch.setattr(nvcc_of.platform, "machine", lambda: "x86_64")
    of_x86 = nvcc_of.cuda_architectures(nvcc)
    monkeypatch.setattr(nvcc_of.platform, "machine", lambda: "aarch64")
    assert set(nvcc_of.cuda_architectures(nvcc)) - set(of_x86) <= nvcc_of.JETSON and not set(of_x86) & nvcc_of.JETSON
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    narrowed = nvcc_of.cuda_architectures(nvcc)
    assert narrowed == ["8.0", "9.0+PTX"]
    assert [flag for a in narrowed for flag in nvcc_of.gencode(a)] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


INCLUDE = re.compile(r"#include [<\"]([^>\"]+)")
OF_HOST = ("torch/", "ATen/", "c10/", "Python", "pybind11/")


def includes_of(path):
    return INCLUDE.findall(path.read_text())


@pytest.mark.parametrize("layer", ["rules", "cpu", "cuda", "c", "step.h"])
def test_kernels_know_no_torch_and_no_python(layer):
    """And nothing of the host, which includes both."""
    paths = [p for p in (CSRC / layer).rglob("*") if p.is_file()] or [CSRC / layer]
    assert paths[0].is_file()
    for path in paths:
        strange = [i for i in includes_of(path) if i.startswith(OF_HOST) or "host/" in i]
        assert not strange, f"{path.relative_to(CSRC)} includes {strange}"


def test_layers_are_included_downwards_only():
    """host, cpu and cuda include step.h, which includes rules; cpu and cuda know nothing of each other."""
    below = {"rules": [], "step.h": ["rules"], "cpu": ["rules", "step.h"], "cuda": ["rules", "step.h"]}
    below["c"] = ["rules", "step.h"]
    below["host"] = [*below, "cpu", "cuda"]
    for path in [p for p in CSRC.rglob("*") if p.is_file()]:
        layer = path.relative_to(CSRC).parts[0]
        for include in includes_of(path):
            if (target := (path.parent / include).resolve()).is_relative_to(CSRC) and target.exists():
                other = target.relative_to(CSRC).parts[0]
                assert other == layer or other in below[layer], f"{path.relative_to(CSRC)} includes {include}"


def test_only_the_bindings_know_pybind11():
    assert [p.name for p in CSRC.rglob("*.*") if "pybind11/" in p.read_text()] == ["bindings.cpp"]
