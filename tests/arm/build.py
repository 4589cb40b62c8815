"""Builds fastclip for aarch64 by setup.py, beside the torch of the emulated machine."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.project import CSRC, ROOT, load_setup

from .machine import CROSS


def environment(machine, objects):
    """To run setup.py in: what it asks Python, it is told of the emulated machine's.

    CPython's own way to cross-compile: a module with the variables of that Python's build, and its platform's name.
    """
    python = machine.python.name
    variables = objects / "variables"
    variables.mkdir(parents=True, exist_ok=True)
    told = machine.root / "usr" / "lib" / python / f"_sysconfigdata__{CROSS}.py"
    shutil.copy(told, variables)
    includes = [machine.root / "usr" / "include" / python, machine.root / "usr" / "include"]
    return {
        **os.environ,
        "CXX": f"{CROSS}-g++",
        "CPPFLAGS": " ".join(f"-I{folder}" for folder in includes),
        "FASTCLIP_CUDA": "0",
        "FASTCLIP_TORCHES": str(machine.site),
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "_PYTHON_SYSCONFIGDATA_NAME": told.stem,
        "PYTHONPATH": str(variables),
        # The libraries of the emulated machine are not searched: its libc names its parts by absolute paths.
        "LDFLAGS": "-Wl,--allow-shlib-undefined",
    }


def build(machine, folder, objects):
    """Builds the package in `folder`, and keeps objects in the folder `objects`."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "setup.py", "build_py", "--build-lib", folder]
    command += ["build_ext", "--build-lib", folder, "--build-temp", objects]
    run(command, env=environment(machine, objects))


def make_wheel(machine, folder, objects, out):
    """Makes a wheel in the folder `out`, and unpacks it in `folder`. Returns what make_wheel.py says."""
    python = next(p for p in (ROOT / ".venv-wheel" / "bin" / "python", Path(sys.executable)) if p.exists())
    command = [python, "distribution/make_wheel.py", "--machine", "aarch64", "--out", out]
    said = run(command, env=environment(machine, objects))
    (wheel,) = out.glob(f"*cp3{machine.python.name.removeprefix('python3.')}-*aarch64.whl")
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return said.splitlines()[-1]


def build_planted(machine, folder, objects, source, flag):
    """The same as in machine.package, with a source of the kernels compiled with one more flag."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(machine.package, folder)
    compiler, made = f"{CROSS}-g++", []
    for path in (*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "c").glob("*.cpp")):
        made.append(objects / f"planted_{path.stem}.o")
        flags = [
            *load_setup().CXX_FLAGS,
            f"-I{ROOT / 'fastclip' / 'include'}",
            *([flag] if path.name == source else []),
        ]
        run([compiler, *flags, "-c", path, "-o", made[-1]])
    library = folder / "fastclip" / "libfastclip.so"
    run([compiler, "-shared", "-s", "-Wl,-soname,libfastclip.so", *made, "-o", library])
    return library.stat().st_size


def run(command, **settings):
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, **settings)
    said = done.stdout + done.stderr
    if done.returncode != 0 or re.search(r":\d+: warning:", said):  # of a compiler
        raise RuntimeError(f"{' '.join(map(str, command))}\n{said[-4000:]}")
    return said
