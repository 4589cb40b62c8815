"""python -m tests.arm: what it says where it can't run, and the stand-in for CUDA's libraries that it uses."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.arm import __main__ as arm
from tests.support import cuda_stand_in


@pytest.mark.parametrize(("options", "code", "word"), [([], 77, "skipped"), (["--required"], 1, "failed")])
def test_what_is_not_here_is_named(options, code, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["tests.arm", "--folder", str(tmp_path / "arm"), *options])
    assert arm.main() == code
    said = capsys.readouterr().out
    assert said.startswith(f"{word}: aarch64-linux-gnu-g++, ") and "apt-get install g++-aarch64-linux-gnu" in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_stand_in_lets_a_library_load_without_those_it_needs(tmp_path):
    """The needed function has a version, as those of cuDNN have."""
    for name in ("torch", "elsewhere", "stand_in"):
        (tmp_path / name).mkdir()

    def library(folder, name, text, *options):
        (tmp_path / f"{name}.c").write_text(text)
        command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / folder / name, tmp_path / f"{name}.c", *options]
        subprocess.run([*map(str, command)], check=True, capture_output=True)

    (tmp_path / "map").write_text("libcuda_9 { global: cudaThing; };")
    library("elsewhere", "libcuda_thing.so.9", "int cudaThing(int x) { return x; }",
            f"-Wl,--version-script={tmp_path / 'map'}", "-Wl,-soname,libcuda_thing.so.9")  # fmt: skip
    uses = "int cudaThing(int); int call(void) { return cudaThing(5); }"
    rpath = f"-Wl,-rpath,{tmp_path / 'stand_in'}"
    library("torch", "libtorch_python.so", uses, rpath, str(tmp_path / "elsewhere" / "libcuda_thing.so.9"))
    for name in cuda_stand_in.FIRST[1:]:
        library("torch", name, "int nothing_of_the_kind;")
    with pytest.raises(OSError, match="libcuda_thing"):
        ctypes.CDLL(str(tmp_path / "torch" / "libtorch_python.so"))
    made = cuda_stand_in.make(tmp_path / "torch", tmp_path / "stand_in", "gcc", "x86_64", [folder_of_libc()])
    assert made == ["libcuda_thing.so.9"]
    assert ctypes.CDLL(str(tmp_path / "torch" / "libtorch_python.so")).call() == 100


def folder_of_libc():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(Path(line.split()[-1]).parent for line in lines if line.endswith("/libc.so.6"))
