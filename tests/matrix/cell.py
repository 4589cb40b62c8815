"""One torch under one Python: an environment of their own, fastclip installed into it by pip, the tests of the step."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from tests.support import cuda_stand_in
from tests.support.project import ROOT

# What the tests import besides torch. hypothesis and the rest are those of requirements.txt.
PACKAGES = ("numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest")
# What torch needs, but for NVIDIA's libraries and Triton.
NEEDS = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec")
SOURCES = ("csrc", "fastclip", "distribution", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
TESTS = ("step/test_step", "step/test_norm", "step/test_adam", "step/test_rules", "drop_in/test_drop_in", "c/test_plan")


class CellError(Exception):
    """A step of a cell failed; says which, and how its output ends."""


class Cell:
    """`python`: the path of an interpreter; `torch`: a minor release, as "2.13". All is in `folder`. `wheels`: a folder
    with wheels to install in place of the sources."""

    def __init__(self, python, torch, folder, wheels=None):
        self.base, self.torch, self.folder, self.wheels = python, torch, folder, wheels
        self.python = folder / "bin" / "python"

    def run(self):
        """Returns {"torch", "python", "tests"}, which is pytest's last line; raises CellError."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._call("a virtual environment", self.base, "-m", "venv", self.folder)
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # Without NVIDIA's libraries, 3 GB that no CPU calls; lion-pytorch would ask for them, too.
        self._call("torch", *pip, "--no-deps", f"torch=={self.torch}.*", "lion-pytorch")
        self._call("what torch and the tests need", *pip, *NEEDS, *PACKAGES)
        self._stand_in()
        if self.wheels is None:
            self._call("fastclip, by pip install", *pip, "--no-deps", self._sources(), FASTCLIP_CUDA="0")
        else:
            wheels = ["--no-index", "--only-binary=:all:", "--find-links", self.wheels]
            self._call("fastclip, from a wheel", *pip, "--no-deps", *wheels, "fastclip", CXX="false", CC="false")
        self._call("python -m fastclip", self.python, "-m", "fastclip")
        script = "import sys, torch; print(torch.__version__, *sys.version_info[:3])"
        found = self._call("torch's version", self.python, "-c", script)
        version, *python = found.split()
        return {"torch": version, "python": ".".join(python), "tests": self._test()}

    def _sources(self):
        """A copy, as a build leaves its objects where it has run."""
        copy, built = self.folder / "source", shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
        copy.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=built)
            else:
                shutil.copy(ROOT / name, copy)
        return copy

    def _stand_in(self):
        """Where torch is built for CUDA."""
        (library,) = self.folder.glob("lib/python*/site-packages/torch/lib")
        if (library / "libtorch_cuda.so").exists():
            maps = Path("/proc/self/maps").read_text()
            system = {Path(path).parent for path in re.findall(r"(/\S+/libc\.so\.6)$", maps, re.MULTILINE)}
            stdlib = [Path(self._call("the compiler", "g++", f"-print-file-name={name}").strip()).resolve().parent
                      for name in ("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1")]  # fmt: skip
            cuda_stand_in.make(library, self.folder / "stand_in", "gcc", platform.machine(), [*system, *stdlib])

    def _test(self):
        """From a folder that has the tests, and not the project's fastclip."""
        here = self.folder / "project"
        here.mkdir()
        for name in ("tests", "examples", "benchmarks", "pyproject.toml"):
            (here / name).symlink_to(ROOT / name)
        options = ["-p", "no:cacheprovider", "-n", "auto", "--maxprocesses", "4", "--import-mode=importlib"]
        command = [
            self.python,
            "-m",
            "pytest",
            *options,
            *(f"tests/{name}.py" for name in TESTS),
            "tests/package/test_glues.py",
            "-m",
            "not slow and not thorough",
        ]
        lines = self._call("the tests", *command, cwd=here, OMP_NUM_THREADS="1", PYTHONPATH=str(here)).splitlines()
        if not re.match(r"\d+ passed", lines[-1]):
            raise CellError(f"the tests: {lines[-1]}")
        return re.sub(r" in [\d.]+s.*", "", lines[-1])

    def _call(self, what, *command, cwd=None, **variables):
        # No constraints: a machine's may hold torch to one release.
        environment = {
            **os.environ,
            "PIP_CONSTRAINT": os.devnull,
            "LD_LIBRARY_PATH": str(self.folder / "stand_in"),
            **variables,
        }
        done = subprocess.run(
            list(map(str, command)), cwd=cwd or self.folder.parent, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).splitlines()
            telling = [line for line in lines if " error: " in line][:5] + lines[-15:]
            raise CellError("\n".join([f"{what}: {' '.join(map(str, command))}", *telling]))
        return done.stdout
