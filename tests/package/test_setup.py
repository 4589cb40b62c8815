"""What setup.py makes of its environment: CUDA architectures, jobs, an nvcc that does not work; what an sdist holds."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from setuptools.errors import PlatformError
from torch.utils import cpp_extension

from tests.support.project import ROOT, load_setup

setup = load_setup()
nvcc_of = setup.nvcc

KNOWN = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
LIST = "".join(f"echo compute_{a.replace('.', '')}\n" for a in KNOWN)


@pytest.fixture
def fake_nvcc(tmp_path):
    """Makes an nvcc of a shell script, in a folder that could be CUDA_HOME."""

    def make(script, first_line="#!/bin/sh"):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        nvcc.write_text(f"{first_line}\n{script}\n")
        nvcc.chmod(0o755)
        return str(nvcc)

    return make


# ---- TORCH_CUDA_ARCH_LIST ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        "8.0",
        "8.0;9.0+PTX",
        "8.0 9.0",
        "9.0a",
        "Ampere",
        "Hopper",
        "Ampere+Tegra;Ada",
        "Turing Ampere;10.0a",
        "12.0+PTX",
    ],
)
def test_architectures_are_read_as_torch_reads_them(asked, fake_nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    architectures = nvcc_of.cuda_architectures(fake_nvcc(LIST))
    flags = [flag for architecture in architectures for flag in nvcc_of.gencode(architecture)]
    assert sorted(flags) == cpp_extension._get_cuda_arch_flags()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == asked


@pytest.mark.parametrize(
    ("asked", "bad"),
    [
        ("8.0;Amper", "Amper"),
        ("80", "80"),
        ("sm_80", "sm_80"),
        ("9.0;3.5", "3.5"),
        ("Kepler", "Kepler"),
        ("All", "All"),
    ],
)
def test_an_architecture_that_is_none_is_named_with_the_way_out(asked, bad, fake_nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(PlatformError, match=rf"TORCH_CUDA_ARCH_LIST holds '{bad}'(.|\n)*FASTCLIP_CUDA=0"):
        nvcc_of.cuda_architectures(fake_nvcc(LIST))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_native_without_a_gpu_says_so(fake_nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(PlatformError, match="holds 'native': no GPU is here"):
        nvcc_of.cuda_architectures(fake_nvcc(LIST))


# ---- nvcc ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, str(os.cpu_count())),
        ({"MAX_JOBS": "3"}, "3"),
        ({"MAX_JOBS": "3", "NVCC_THREADS": "5"}, "5"),
        ({"MAX_JOBS": "many"}, str(os.cpu_count())),
    ],
)
def test_max_jobs_and_nvcc_threads_bound_nvcc(environment, threads, fake_nvcc, monkeypatch):
    for name in ("MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 8.6+PTX")
    arguments = nvcc_of.compile_command(fake_nvcc(f"{LIST}\necho release 13.0"))
    assert [a for a in arguments if a.startswith("--threads")] == [f"--threads={threads}"]
    gencode = [a for a in arguments if a.startswith("-gencode")]
    assert len(gencode) == len(set(gencode)) == 2


@pytest.mark.parametrize(("release", "smallest"), [("12.4", False), ("12.8", True), ("13.0", True)])
def test_code_is_made_as_small_as_nvcc_can(release, smallest, fake_nvcc):
    assert ("--compress-mode=size" in nvcc_of.compression(fake_nvcc(f"echo release {release}"))) == smallest


def test_only_what_has_changed_is_compiled_again(tmp_path, monkeypatch):
    """A source, a header, the command: each alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source, header = tmp_path / "a source.cpp", tmp_path / "number.h"
    header.write_text("#define NUMBER 1\n")
    source.write_text('#include "number.h"\nint number() { return NUMBER; }\n')

    def compilations(*flags):
        file = setup.ninja_file.NinjaFile(tmp_path / "build")
        command = ["sh", "-c", f'echo >> {tmp_path}/compiled; exec c++ "$@"', "sh", *flags]
        objects = file.add_objects("objects", [source], lambda source: command)
        file.add("link", tmp_path / "build" / "lib$.so", objects, ["c++", "-shared"])
        file.make()
        assert (tmp_path / "build" / "lib$.so").exists()
        return (tmp_path / "compiled").read_text().count("\n")

    assert compilations("-fPIC") == 1
    assert compilations("-fPIC") == 1
    assert compilations("-fPIC", "-O2") == 2
    for path in (source, header):
        before = compilations("-fPIC", "-O2")
        os.utime(path, (2e9, 2e9))
        assert compilations("-fPIC", "-O2") == before + 1
        os.utime(path, (1e9, 1e9))
        compilations("-fPIC", "-O2")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no license >&2; exit 3", "no license"),
        ("", "nothing"),
        ("echo fatal: unknown option", "fatal: unknown option"),
        ("echo compute_35; echo compute_50", "too old"),
    ],
)
def test_an_nvcc_that_does_not_work_is_named_with_the_way_out(script, said, fake_nvcc, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = fake_nvcc(script)
    with pytest.raises(PlatformError, match=rf"{nvcc}(.|\n)*{said}(.|\n)*CUDA_HOME(.|\n)*FASTCLIP_CUDA=0"):
        nvcc_of.cuda_architectures(nvcc)


def test_an_nvcc_that_is_no_program_is_named_with_the_way_out(fake_nvcc):
    nvcc = fake_nvcc("", first_line="#!/no/such/shell")
    with pytest.raises(PlatformError, match=rf"{nvcc}(.|\n)*FASTCLIP_CUDA=0"):
        nvcc_of.cuda_architectures(nvcc)


def test_a_toolkit_without_a_runtime_is_named_with_the_way_out(fake_nvcc, tmp_path):
    nvcc = fake_nvcc(f"echo '#$ TOP={tmp_path}'")
    with pytest.raises(PlatformError, match=r"libcudart_static.a(.|\n)*FASTCLIP_CUDA=0"):
        nvcc_of.cuda_libraries(nvcc)


def test_a_failing_compilation_is_named_with_the_way_out(tmp_path, capfd):
    file = setup.ninja_file.NinjaFile(tmp_path / "build")
    file.add("nvcc", tmp_path / "step.o", [tmp_path / "step.cu"], ["sh", "-c", "echo no memory >&2; exit 2"])
    (tmp_path / "step.cu").touch()
    with pytest.raises(PlatformError, match=r"the first error above says why(.|\n)*FASTCLIP_CUDA=0"):
        file.make()
    assert "no memory" in "".join(capfd.readouterr())


def test_an_installation_stops_with_the_message_alone(fake_nvcc, tmp_path):
    """Before anything is compiled, and without a traceback."""
    environment = {**os.environ, "CUDA_HOME": os.path.dirname(os.path.dirname(fake_nvcc("echo no license; exit 3")))}
    environment.pop("FASTCLIP_CUDA", None)
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    result = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode != 0
    assert "no license" in result.stderr and "FASTCLIP_CUDA=0" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("**/*.o"))


# ---- sdist, installation --------------------------------------------------------------------------------


ERROR_OF_AN_INDEX = "No matching distribution found for"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that an sdist unpacks to."""
    tmp_path = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = (path.parent for path in tmp_path.glob("*/setup.py"))
    return unpacked


def test_an_sdist_holds_all_that_a_build_needs(unpacked):
    needed = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    needed += [path for path in (ROOT / "distribution").iterdir() if path.is_file()]
    needed += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [path for pattern in ("*.py", "*.pyi", "*.h", "py.typed") for path in (ROOT / "fastclip").rglob(pattern)]
    needed.remove(ROOT / "fastclip" / "_build_info.py")
    for path in needed:
        copy = unpacked / path.relative_to(ROOT)
        assert copy.exists() and copy.read_bytes() == path.read_bytes(), path.relative_to(ROOT)
    assert not (unpacked / "fastclip" / "_build_info.py").exists()  # says what was built here


@pytest.mark.thorough
def test_an_sdist_installs(unpacked, tmp_path):
    """By pip as a newcomer types it: behind its isolation, against the torch of this environment. Without CUDA, whose
    sources are compared above and compiled elsewhere; unoptimised, which is quicker."""
    environment = {**os.environ, "FASTCLIP_CXX_FLAGS": "-O0", "FASTCLIP_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path / "site", unpacked]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, text=True, capture_output=True)
    text = done.stdout + done.stderr
    if "No module named pip" in text or ERROR_OF_AN_INDEX in text:
        pytest.skip("pip can't fetch what a build needs")
    assert done.returncode == 0, text[-8000:]
    assert f"fastclip is built against torch {torch.__version__} in {Path(torch.__file__).parents[1]}" in text
    script = "import fastclip, torch; print(fastclip.__file__, fastclip.build_info()['cuda'])"
    environment["PYTHONPATH"] = str(tmp_path / "site")
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    ).stdout
    file, cuda = said.split()
    assert Path(file).is_relative_to(tmp_path / "site") and cuda == "None"
    assert not (tmp_path / "site" / "torch").exists() and not (tmp_path / "site" / "backend.py").exists()
