"""make wheel, without the minutes of compiling: what it makes of a newer compiler, and which wheels it refuses."""

import ctypes
import json
import re
import shutil
import subprocess
import zipfile

import pytest

from tests.support.project import ROOT, load_setup

load_setup()  # puts the folder of the build in the path
import make_wheel  # noqa: E402
import old_cudart  # noqa: E402
import torches  # noqa: E402
from setuptools.errors import PlatformError  # noqa: E402

# What GCC's headers ask newer libraries for: a copied exception, a stream, an array's size, a pointer that is shared.
PROGRAM = """
#include <cmath>
#include <exception>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>
extern "C" int ownership() {
  std::exception_ptr first;
  try { throw std::runtime_error("x"); } catch (...) { first = std::current_exception(); }
  auto shared = std::make_shared<std::exception_ptr>(first);
  std::vector<std::exception_ptr> copies(100, *shared);
  first = nullptr;
  copies.resize(1);
  try { std::rethrow_exception(copies[0]); } catch (const std::runtime_error& error) { return error.what()[0]; }
}
extern "C" int text(double base, int count) {
  std::ostringstream stream;
  stream << std::pow(base, count);
  std::vector<double> numbers(count);
  return static_cast<int>(stream.str().size() + numbers.size());
}
"""


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize("optimised", ["-Os", "-O3"])  # -Os calls what -O3 has inlined
def test_what_a_newer_compiler_asks_for_is_made_of_older_parts(optimised, tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    (tmp_path / "exports.map").write_text("{ global: ownership; text; local: *; };")
    library = tmp_path / "library.so"
    flags = ["-std=c++20", optimised, "-fPIC", "-shared", "-Wl,--wrap=pow"]
    flags.append(f"-Wl,--version-script,{tmp_path / 'exports.map'}")
    sources = [tmp_path / "program.cpp", ROOT / "distribution" / "old_runtime.cpp"]
    subprocess.run(["c++", *flags, *sources, "-o", library], check=True)
    said = subprocess.run(["readelf", "--dyn-syms", "-W", library], check=True, text=True, capture_output=True).stdout
    found = {kind: set() for kind in ("GLIBC", "GLIBCXX", "CXXABI")}
    for kind, version in re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", said):
        found[kind].add(tuple(map(int, version.split("."))))
    assert max(found["GLIBC"]) <= (2, 28) and max(found["GLIBCXX"]) <= (3, 4, 24) and max(found["CXXABI"]) <= (1, 3, 11)
    loaded = ctypes.CDLL(str(library))
    assert loaded.ownership() == ord("x")
    assert loaded.text(ctypes.c_double(2), 10) == len("1024") + 10


def test_symbols_of_a_newer_glibc_get_their_newest_old_version():
    symbols = """
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 pthread_create@@GLIBC_2.34
     2: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 pthread_create@GLIBC_2.2.5
     3: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 dlmopen@@GLIBC_2.34
     4: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 dlmopen@GLIBC_2.3.4
     5: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 both@@GLIBC_2.34
     6: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 both@GLIBC_2.2.5
     7: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 both@GLIBC_2.12
     8: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 old@@GLIBC_2.2.5
     9: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 only_new@@GLIBC_2.36
    10: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 still_too_new@@GLIBC_2.34
    11: 0000000000088cb0   123 FUNC    GLOBAL DEFAULT   16 still_too_new@GLIBC_2.30
"""
    expected = {"pthread_create": "GLIBC_2.2.5", "dlmopen": "GLIBC_2.3.4", "both": "GLIBC_2.12"}
    assert old_cudart.renamed(symbols, (2, 28)) == expected


GOOD = {"external_libs": {"libc10.so": None, "libtorch_cpu.so": None}, "sym_tag": "manylinux_2_27_x86_64"}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes a wheel of a number of bytes, for which auditwheel says this."""

    def make(shown, size=1000, cuda=None):
        path = tmp_path / "fastclip-0-cp311-cp311-linux_x86_64.whl"
        info = {"torches": {"2.11": "2.11.0", "2.13": "2.13.0"}, "cuda": cuda, "cuda_architectures": ["9.0"]}
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("fastclip/_build_info.py", f"BUILD_INFO = {info!r}")
            file.writestr("fastclip/rest", bytes(size))
        monkeypatch.setattr(make_wheel, "run", lambda what, *command: f"a warning\n{json.dumps(shown)}")
        return path

    return make


def test_a_good_wheel_says_what_it_is(wheel):
    said = make_wheel.check(wheel(GOOD))
    assert said == "0.00 MB, manylinux_2_27_x86_64, for torch 2.11 and 2.13, no CUDA"
    assert make_wheel.check(wheel(GOOD, 7_000_000, "13.0")).endswith("CUDA 13.0 for 9.0")


@pytest.mark.parametrize(
    ("changed", "size", "cuda", "said"),
    [
        ({"sym_tag": "manylinux_2_34_x86_64"}, 0, None, "would not load everywhere"),
        ({"sym_tag": "linux_x86_64"}, 0, None, "would not load everywhere"),
        ({"external_libs": {"libcudart.so.13": None}}, 0, None, "would not load everywhere"),
        ({}, 1_000_000, None, "1.00 MB, more than 1"),
        ({}, 8_000_000, "13.0", "8.00 MB, more than 8"),
    ],
)
def test_a_wheel_that_is_too_new_or_too_large_is_refused(changed, size, cuda, said, wheel):
    with pytest.raises(make_wheel.WheelError, match=said):
        make_wheel.check(wheel(GOOD | changed, size, cuda))


def test_a_step_that_fails_says_which_and_why():
    with pytest.raises(make_wheel.WheelError, match=r"(?s)the answer: sh -c .*no such answer"):
        make_wheel.run("the answer", "sh", "-c", "echo no such answer >&2; exit 3")
    assert make_wheel.run("the answer", "sh", "-c", "echo 42") == "42\n"


# ---- which torches -----------------------------------------------------------------------------------------


@pytest.fixture
def folder_with(tmp_path):
    def make(name, version):
        (tmp_path / name / "torch").mkdir(parents=True)
        (tmp_path / name / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        return tmp_path / name

    return make


def test_named_torches_are_taken_the_oldest_first(folder_with, monkeypatch):
    folders = [folder_with("b", "2.13.0+cpu"), folder_with("a", "2.11.0")]
    monkeypatch.setenv("FASTCLIP_TORCHES", ":".join(map(str, [*folders, ""])))
    assert [torch.release for torch in torches.find()] == ["2.11", "2.13"]
    assert torches.requirement(torches.find()) == "torch>=2.11,<2.17"
    monkeypatch.setenv("FASTCLIP_TORCHES", str(folders[0]))
    assert torches.requirement(torches.find()) == "torch>=2.13"
    assert torches.requirement([]) == "torch>=2.11"


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0a0+5228986c39.nv26.06", "torch>=2.13.dev0"),
        ("2.14.0.dev20260701+cu130", "torch>=2.14.dev0"),
        ("2.14.0rc2", "torch>=2.14.dev0"),
        ("2.13.1+cpu", "torch>=2.13"),
        ("2.13.0+debug", "torch>=2.13"),
    ],
)
def test_the_requirement_is_met_by_the_torch_of_the_build(version, requirement, folder_with, monkeypatch):
    from packaging.requirements import Requirement

    monkeypatch.setenv("FASTCLIP_TORCHES", str(folder_with("a", version)))
    assert torches.requirement(torches.find()) == requirement
    assert Requirement(requirement).specifier.contains(version, prereleases=True)


def test_a_folder_without_torch_and_a_release_twice_are_refused(folder_with, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCLIP_TORCHES", str(tmp_path / "none"))
    with pytest.raises(PlatformError, match="none/torch/version.py does not say which torch this is"):
        torches.find()
    pair = [folder_with("a", "2.13.0"), folder_with("b", "2.13.1")]
    monkeypatch.setenv("FASTCLIP_TORCHES", ":".join(map(str, pair)))
    with pytest.raises(PlatformError, match="names two torches of the same release"):
        torches.find()
