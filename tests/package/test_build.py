"""What the build promises: it says what it is, both halves compile and link, and no kernel spills."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastclip
from fastclip import _extension
from tests.cuda.sass import compiled, nvcc
from tests.support.project import ROOT, load_setup

setup = load_setup()

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
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("AVX512", "AVX2", "baseline")
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_command_line():
    result = run(sys.executable, "-m", "fastclip")
    assert result.returncode == 0, result.stdout
    assert torch.__version__ in result.stdout and fastclip.build_info()["cpu_capability"] in result.stdout


def test_another_torch_is_told_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
    with pytest.raises(ImportError) as raised:
        importlib.reload(_extension)
    message = str(raised.value)
    assert fastclip.build_info()["torch"] in message and "9.9.0+cpu" in message and _extension.BUILD_COMMAND in message
    monkeypatch.undo()
    importlib.reload(_extension)


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130", "2.13.1"])
def test_the_same_release_in_another_variant_is_taken(version):
    assert _extension._release(version) == "2.13"


def test_without_a_build_the_command_is_told(tmp_path):
    shutil.copytree(
        ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    )
    result = subprocess.run([sys.executable, "-c", "import fastclip"], cwd=tmp_path, text=True, capture_output=True)
    assert "ImportError" in result.stderr and "setup.py build_ext --inplace" in result.stderr


INSTRUCTION_SETS_SCRIPT = """
import hashlib, torch, fastclip
from fastclip import _extension
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    inf, both = {"max_norm": 0.5, "norm_type": "inf"}, {"clip_value": 0.5, "max_norm": 1.0}
    for clip in ({}, {"clip_value": 0.5}, {"max_norm": 1.0}, inf, both):
        params = [torch.randn(n).to(dtype).requires_grad_() for n in (1, 17, 100, 5003)]
        opt = fastclip.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, **clip)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
        for p in params:
            digest.update(p.detach().double().numpy().tobytes())
        if opt.total_norm is not None:
            digest.update(opt.total_norm.numpy().tobytes())
print(_extension.build_info()["cpu_capability"], digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    """AVX-512, AVX2 and the baseline, as far as this machine has them."""
    results = {}
    for wanted in ("AVX512", "AVX2", "baseline"):
        result = run(sys.executable, "-c", INSTRUCTION_SETS_SCRIPT, FASTCLIP_CPU_CAPABILITY=wanted)
        assert result.returncode == 0, result.stdout
        capability, digest = result.stdout.split()
        results[capability] = digest
    assert "baseline" in results
    assert len(set(results.values())) == 1, results


@needs_nvcc
def test_the_cuda_half_was_built_and_linked():
    if os.environ.get("FASTCLIP_CUDA") == "0":
        pytest.skip("FASTCLIP_CUDA=0")
    assert fastclip.build_info()["cuda"]
    assert "9.0" in fastclip.build_info()["cuda_architectures"] or os.environ.get("TORCH_CUDA_ARCH_LIST")


@needs_nvcc
def test_kernels_compile_without_warnings_and_do_not_spill():
    """For every architecture that fastclip is built for. What else their code must be: test_sass.py."""
    known = run(nvcc, "--list-gpu-arch").stdout
    architectures = [a for a in setup.ARCHITECTURES if f"compute_{a.replace('.', '')}\n" in known]
    assert architectures
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for cubin in pool.map(compiled, architectures):
            kernels = cubin.log.count("Compiling entry function")
            assert kernels >= 10 and cubin.log.count("bytes spill stores") >= kernels
            assert not [line for kernel, line in cubin.spills() if kernel.dtypes in ("float32", "bfloat16")]


def test_cuda_can_be_left_out(monkeypatch):
    monkeypatch.setenv("FASTCLIP_CUDA", "0")
    assert setup.find_nvcc() is None


@needs_nvcc
def test_cuda_architectures(monkeypatch):
    """All that the toolkit has, with PTX of the newest; TORCH_CUDA_ARCH_LIST narrows them."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    found = setup.cuda_architectures(nvcc)
    assert {"8.0", "9.0"} <= {a.removesuffix("+PTX") for a in found}
    assert [a for a in found if a.endswith("+PTX")] == [found[-1]]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    narrowed = setup.cuda_architectures(nvcc)
    assert narrowed == ["8.0", "9.0+PTX"]
    assert [flag for a in narrowed for flag in setup.gencode(a)] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_sources_keep_to_their_layers():
    """Kernels know no torch, and only bindings.cpp knows pybind11."""
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        if path.name != "bindings.cpp":
            assert "pybind11/" not in text, path.name
        if path.stem in (
            "dtypes",
            "clip_rules",
            "update_rules",
            "step",
            "step_cpu",
            "loops_cpu",
            "halves_cpu",
            "step_cuda",
            "kernels_cuda",
            "tiles_cuda",
            "table_cuda",
        ):
            includes = re.findall(r"#include [<\"]([^>\"]+)", text)
            assert not [i for i in includes if i.startswith(("torch/", "ATen/", "c10/", "Python"))], path.name
