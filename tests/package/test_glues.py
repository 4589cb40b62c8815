"""The part that is compiled against torch: one that fits is chosen, and one that does not is found at import."""

import ctypes
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastclip
from fastclip import _C, _extension, _self_check
from tests.support.project import CSRC, load_setup

INCLUDE = Path(torch.__file__).parent / "include"
BOTH = ["2.11", "2.13"]


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.11.0", "2.11"),
        ("2.12.1+cpu", "2.11"),
        ("2.13.0+cu130", "2.13"),
        ("2.13.1", "2.13"),
        ("2.15.0", "2.13"),
        ("2.20.0a0+git1f3", "2.13"),
        ("3.0.0", "2.13"),
    ],
)
def test_the_newest_that_is_not_newer_than_torch_is_chosen(version, release):
    assert _extension._choose(BOTH, version) == release
    assert _extension._choose(BOTH[::-1], version) == release


def test_releases_are_compared_as_numbers():
    assert _extension._choose(["2.9", "2.11"], "2.12.0") == "2.11"


def test_a_torch_that_is_older_is_told():
    with pytest.raises(ImportError, match=r"torch 2\.10\.1\+cpu is older than 2\.11") as said:
        _extension._choose(BOTH, "2.10.1+cpu")
    assert "pip install -U torch" in str(said.value) and _extension.BUILD_COMMAND in str(said.value)


def loading(monkeypatch, glue):
    """What an import does, where the glue is this one, or raises this error."""

    def load(path):
        if isinstance(glue, Exception):
            raise glue
        return glue

    monkeypatch.setattr(_extension, "_file_of", Path)
    monkeypatch.setattr(_extension, "_load", load)
    return lambda version: _extension._load_fitting(BOTH, version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1"])
def test_a_torch_that_was_tested_is_taken_silently(version, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loading(monkeypatch, _C)(version)[0] is _C


def test_a_torch_newer_than_tested_is_told_and_taken_where_the_check_passes(monkeypatch):
    with pytest.warns(
        UserWarning, match=r"torch 9\.9\.0\+cpu is newer than fastclip knows(.|\n)*pip install -U fastclip"
    ):
        assert loading(monkeypatch, _C)("9.9.0+cpu") == (_C, "2.13")


@pytest.mark.parametrize("problem", ["undefined symbol: _ZN3c104gone", "cannot open shared object file"])
def test_a_glue_that_does_not_load_is_told(problem, monkeypatch):
    with pytest.raises(ImportError) as raised:
        loading(monkeypatch, ImportError(problem))("2.16.0")
    message = str(raised.value)
    assert "built for torch 2.13, and that does not fit torch 2.16.0" in message and problem in message
    assert "pip install -U fastclip" in message and _extension.BUILD_COMMAND in message


# What a glue is told, in the order of _C.misread's arguments after the tensor: each alone is wrong.
WRONG = {
    "address": lambda told: told + 16,
    "numel": lambda told: told + 1,
    "sizes": lambda told: told[::-1],
    "strides": lambda told: (told[0] + 1, *told[1:]),
    "dtype": lambda told: torch.float64 if told == torch.float32 else torch.float32,
    "device": lambda told: not told,
    "keys": lambda told: not told,
    "contiguity": lambda told: not told,
    "data_ptr": lambda told: told + 8,
    "grad": lambda told: torch.zeros(1) if told is None else None,
    "version": lambda told: told + 1,
}


def test_the_check_passes_while_torch_transforms_a_function():
    script = """
import torch
def function(x):
    import fastclip
    return (x * x).sum()
print(torch.func.grad(function)(torch.ones(2)).tolist())
"""
    said = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert said.stdout == "[2.0, 2.0]\n", said.stderr


def test_a_glue_that_cannot_read_is_found():
    def misread(*_):
        raise RuntimeError("no such type")

    glue = SimpleNamespace(misread=misread, bump_version=None)
    assert _self_check.first_misread(glue) == "value (no such type)"


def test_what_another_version_or_another_python_has_built_is_told(monkeypatch):
    monkeypatch.setattr(_extension.importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-399-none.so"])
    with pytest.raises(
        ImportError, match=r"not built for this Python: there is no .*cpython-399(.|\n)*build_ext --inplace"
    ):
        _extension._load_fitting(["2.13"], "2.13.0")


@pytest.mark.parametrize(("place", "name"), list(enumerate(WRONG)))
def test_what_is_read_otherwise_is_found(place, name, monkeypatch):
    def misread(tensor, *told):
        told = list(told)
        told[place] = WRONG[name](told[place])
        return _C.misread(tensor, *told)

    glue = SimpleNamespace(misread=misread, bump_version=_C.bump_version)
    assert _self_check.first_misread(glue) == name
    with pytest.raises(ImportError, match=rf"it reads another {name} of a tensor than Python does(.|\n)*-U fastclip"):
        loading(monkeypatch, glue)("2.13.0")


def test_a_version_that_is_not_counted_is_found():
    glue = SimpleNamespace(misread=_C.misread, bump_version=lambda tensor: None)
    assert _self_check.first_misread(glue) == "version"


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
        "torch.set_default_device('cuda')",
        "torch.inference_mode().__enter__()",
        "from torch._subclasses import FakeTensorMode; FakeTensorMode().__enter__()",
        "torch.set_grad_enabled(False)",
    ],
)
def test_the_check_passes_under_any_default(setting):
    script = f"import torch; {setting}; import fastclip; print(fastclip.build_info()['torch'])"
    said = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert said.stdout.strip() == fastclip.build_info()["torch"], said.stderr


LOAD_ALONE = """
import importlib.machinery, importlib.util, sys, torch

def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

check = load("self_check", f"{sys.argv[1]}/_self_check.py")
file = f"{sys.argv[1]}/_C_{sys.argv[2].replace('.', '_')}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
try:
    print("misread:", check.first_misread(load("alone._C", file)))
except ImportError as error:
    print("no import:", error)
"""


@pytest.mark.parametrize("release", _extension.BUILD_INFO["torches"])
def test_of_the_glues_of_this_build_only_the_one_in_use_fits(release):
    """A wheel has several. Each alone in a process: a second one would share what the first has registered."""
    command = [sys.executable, "-c", LOAD_ALONE, Path(fastclip.__file__).parent, release]
    said = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    fits = r"misread: None$" if release == _extension._chosen else r"misread: (?!None)\w+$|no import: ."
    assert re.match(fits, said.stdout.strip()), said.stdout + said.stderr


# ---- a layout that is another: headers are changed, and the check is compiled with them ------------------


CHECK = """
#include "host/self_check.h"
using namespace fastclip;
extern "C" __attribute__((visibility("default"))) const char* check(
    PyObject* tensor, uintptr_t address, int64_t numel, const int64_t* sizes, const int64_t* strides, int64_t dim,
    PyObject* dtype, bool is_cpu, bool is_ordinary, bool is_contiguous, uintptr_t data, PyObject* grad,
    int64_t version) {
  return misread({tensor, address, numel, {sizes, sizes + dim}, {strides, strides + dim}, dtype, is_cpu, is_ordinary,
                  is_contiguous, data, grad, version});
}
"""
# The header, its text, what takes its place, what is then read wrongly.
LAYOUTS = [
    pytest.param("c10/core/TensorImpl.h", "", "", None, id="as it is"),
    pytest.param(
        "c10/core/TensorImpl.h",
        r"(  int64_t storage_offset_ = 0;)(.*?)(  int64_t numel_ = 1;)",
        r"\3\2\1",
        "numel",
        id="numel_ and storage_offset_ swapped",
    ),
    pytest.param(
        "torch/csrc/autograd/variable.h",
        r"(\n  Variable grad_;)",
        r"\n  void* planted_ = nullptr;\1",
        "grad",
        id="something before grad_",
    ),
]


def compiled_check(folder, header, text, other):
    """Returns the check that is compiled with a changed header, as a glue has it."""
    original = (INCLUDE / header).read_text()
    changed = re.sub(text, other, original, count=1, flags=re.S) if text else original
    assert (changed != original) == bool(text)
    (folder / header).parent.mkdir(parents=True)
    (folder / header).write_text(changed)
    (folder / "check.cpp").write_text(CHECK)
    setup = load_setup()
    # Functions are looked up when they are called: what is not called is not there.
    flags = [flag for flag in setup.CXX_FLAGS if flag not in ("-O3", "-fno-plt")] + ["-Wl,-z,lazy"]
    libraries = [f"-L{INCLUDE.parent / 'lib'}", *(f"-l{name}" for name in setup.torches.LIBRARIES)]
    includes = [f"-I{folder}", f"-I{CSRC}", "-isystem", INCLUDE, "-isystem", INCLUDE / "torch/csrc/api/include"]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    sources = [folder / "check.cpp", CSRC / "host" / "self_check.cpp", CSRC / "host" / "tensors.cpp"]
    command = [*setup.compiler(), *flags, *includes, "-shared", *sources, *libraries, "-o", folder / "check.so"]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check = ctypes.PyDLL(str(folder / "check.so"), mode=os.RTLD_LAZY).check
    check.restype = ctypes.c_char_p
    python, pointer, number = ctypes.py_object, ctypes.c_size_t, ctypes.c_int64
    numbers = ctypes.POINTER(number)
    check.argtypes = [python, pointer, number, numbers, numbers, number, python, *[ctypes.c_bool] * 3, pointer, python]
    check.argtypes += [number]

    def misread(tensor, address, numel, sizes, strides, *rest):
        array = number * len(sizes)
        found = check(tensor, address, numel, array(*sizes), array(*strides), len(sizes), *rest)
        return found.decode() if found else None

    return SimpleNamespace(misread=misread, bump_version=_C.bump_version)


@pytest.mark.thorough
@pytest.mark.parametrize(("header", "text", "other", "found"), LAYOUTS)
def test_another_layout_is_found(header, text, other, found, tmp_path):
    assert _self_check.first_misread(compiled_check(tmp_path, header, text, other)) == found


def test_it_is_loaded_under_one_name():
    assert sys.modules["fastclip._C"] is fastclip._C is _C and _C.__name__ == "fastclip._C"
    assert _C.Engine.__module__ == "fastclip._C"
