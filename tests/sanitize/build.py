"""Builds fastclip with a sanitizer of GCC's in a folder of its own, and says how to run Python on it."""

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.project import ROOT, load_setup

ninja_file = load_setup().ninja_file
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "c++")
# libstdc++'s assertions find what a vector's capacity hides.
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]


@dataclass(frozen=True)
class Sanitizer:
    name: str
    kinds: str  # of -fsanitize
    runtimes: tuple  # the libraries that it needs, the one to preload first
    variables: dict  # of the environment
    plugins: tuple = ()  # of pytest
    preloads_openmp: bool = False

    @property
    def folder(self):
        return FOLDER / self.name

    @property
    def project(self):
        """A copy of the Python code, tests included, beside the extension that was built."""
        return self.folder / "project"

    @property
    def flag(self):
        return f"-fsanitize={self.kinds}"

    def why_not(self):
        """Why it can't be used here, or an empty text."""
        version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
        absent = [name for name in self.runtimes if not os.path.isabs(library(name))]
        if absent or "clang" in version:
            return (
                f"needs GCC with {' and '.join(absent or self.runtimes)}, which {COMPILER} does not bring. They come "
                "with g++ on Debian and Ubuntu, and as libasan, libubsan and libtsan on Fedora. CXX=g++ chooses GCC."
            )
        variables = {**os.environ, "LD_PRELOAD": library(self.runtimes[0]), "ASAN_OPTIONS": "detect_leaks=0"}
        started = subprocess.run([sys.executable, "-c", ""], env=variables, capture_output=True, text=True)
        if started.returncode:
            return (
                f"Python does not start with {self.runtimes[0]}: {started.stderr.strip()}\n"
                "Where this is about a memory mapping, `setarch -R make sanitize` helps (no randomised addresses)."
            )
        return ""

    def build(self, log):
        """Compiles what has changed. Raises CalledProcessError."""
        variables = {
            **os.environ,
            "FASTCLIP_CUDA": "0",
            "FASTCLIP_CXX_FLAGS": " ".join([*FLAGS, self.flag]),
            "LDFLAGS": self.flag,
        }
        folders = ["--build-lib", self.project, "--build-temp", self.folder / "objects"]
        command = [sys.executable, "setup.py", "build_ext", *folders]
        run(command, log, show=r"^\[\d+/\d+\]", cwd=ROOT, env=variables)
        copy_python(ROOT, self.project)
        if self.preloads_openmp:
            run([COMPILER, "-O1", "-fPIC", "-shared", "-o", self.openmp, HERE / "openmp.cpp"], log)

    @property
    def openmp(self):
        return self.folder / "openmp.so"

    def object_of(self, source):
        return next((self.folder / "objects").glob(f"{Path(source).parent.name}*/{Path(source).stem}.o"))

    def command_of(self, file):
        """Returns the command that made a file of the build."""
        ninja = [ninja_file.find_ninja(), "-f", self.folder / "objects" / "build.ninja", "-t", "commands", "-s", file]
        return subprocess.run(ninja, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def build_variant(self, project, original, csrc, log):
        """As `project`: the library, or the glue, whose source `original` is that of another `csrc`. Raises as build
        does."""
        copy_python(self.project, project)
        for file in (self.project / "fastclip").glob("*.so"):
            shutil.copy(file, project / "fastclip")
        shutil.copy(self.project / "fastclip" / "_build_info.py", project / "fastclip")
        replaced = self.object_of(original)
        target = project / replaced.name
        compiles = self.command_of(replaced).replace(str(replaced), str(target))
        compiles = compiles.replace(f" -c csrc/{original} ", f" -c {csrc / original} ")
        run(["sh", "-c", compiles], log, cwd=ROOT)
        pattern = "_C_*.so" if replaced.parent.name.startswith("host") else "libfastclip.so"
        (linked,) = (self.project / "fastclip").glob(pattern)
        links = self.command_of(linked).replace(str(replaced), str(target))
        run(["sh", "-c", links.replace(f"-o {linked}", f"-o {project / 'fastclip' / linked.name}")], log, cwd=ROOT)

    def environment(self, project, reports, halt):
        """To run Python on `project` in; what the sanitizer says goes to files `reports`.<process>."""
        preloaded = [library(self.runtimes[0]), library("libstdc++.so.6")]  # the latter for its exceptions
        if self.preloads_openmp:
            preloaded.append(str(self.openmp))
        variables = {
            name: value.format(reports=reports, halt=halt, here=HERE) for name, value in self.variables.items()
        }
        return {**os.environ, **variables, "LD_PRELOAD": " ".join(preloaded), "PYTHONPATH": str(project)}


SANITIZERS = [
    Sanitizer(
        "address",
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        {
            # Not detect_stack_use_after_return: its stack is not aligned for the arrays of AVX-512 loops, which GCC 12
            # fills by aligned stores (GCC's bug 110027).
            "ASAN_OPTIONS": "log_path={reports}:detect_stack_use_after_return=0:leak_check_at_exit=0",
            "LSAN_OPTIONS": "suppressions={here}/leak.supp:print_suppressions=0",
            "UBSAN_OPTIONS": "log_path={reports}:print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # or Python's objects come from pools, of which the sanitizer knows nothing
            "OMP_NUM_THREADS": "2",
        },
        ("tests.sanitize.leaks",),
    ),
    Sanitizer(
        "thread",
        "thread",
        ("libtsan.so",),
        {
            # A forked child that makes threads is out of its reach, but need not die.
            "TSAN_OPTIONS": "log_path={reports}:halt_on_error={halt}:suppressions={here}/thread.supp:die_after_fork=0",
            "OMP_NUM_THREADS": "4",
            "OMP_WAIT_POLICY": "passive",
        },
        preloads_openmp=True,
    ),
]


def library(name):
    """Its path, or the name alone where the compiler has none."""
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def copy_python(source, target):
    shutil.rmtree(target / "tests", ignore_errors=True)
    for folder in ("fastclip", "tests", "distribution", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__", "results", "out")
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True, ignore=ignored)
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(source / file, target)


def run(command, log, show=None, check=True, **options):
    """Runs `command`; appends it and what it prints to the file `log`, and shows the lines that match `show`."""
    command = list(map(str, command))
    with (
        open(log, "a") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process,
    ):
        print(*command, file=file, flush=True)
        for line in io.TextIOWrapper(process.stdout, errors="replace"):
            file.write(line)
            if show and (match := re.search(show, line)):
                print(f"  {match[0]}", flush=True)
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
