"""Compiles fastclip for aarch64, beside the torch of the emulated machine."""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from tests.support.project import CSRC, ROOT, load_setup

from .machine import CROSS


def build(machine, folder, objects, changes=None):
    """Builds a package in `folder`, and keeps objects in the folder `objects`.

    changes: {source: more flags}, to compile one otherwise; the other objects are then taken as they are.
    """
    sources = sorted([*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "host").glob("*.cpp")])
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    made_with = [*load_setup().CXX_FLAGS, machine.torch_version, machine.python.name]
    objects = objects / hashlib.sha256(" ".join(made_with).encode()).hexdigest()[:12]
    objects.mkdir(parents=True, exist_ok=True)
    changes = changes or {}
    made = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source in sources:
            name, flags = source.stem, changes.get(source.name, [])
            target = objects / f"{source.parent.name}_{name}{'_changed' if flags else ''}.o"
            if flags or not target.exists() or target.stat().st_mtime < newest:
                made.append((target, pool.submit(compile_one, machine, source, target, flags)))
            else:
                made.append((target, None))
        for _, job in made:
            if job is not None:
                job.result()
    link(machine, folder, [target for target, _ in made])


def compile_one(machine, source, target, flags):
    python = f"include/{machine.python.name}"
    includes = [machine.root / "usr" / python, machine.root / "usr" / "include"]
    torch = machine.site / "torch" / "include"
    command = [
        f"{CROSS}-g++", "-fPIC", "-DNDEBUG", *load_setup().CXX_FLAGS, *flags, "-DTORCH_EXTENSION_NAME=_C",
        *(f"-I{path}" for path in includes), "-isystem", torch, "-isystem", torch / "torch/csrc/api/include",
        "-c", source, "-o", target,
    ]  # fmt: skip
    compile_(command)


def link(machine, folder, objects):
    package = folder / "fastclip"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fastclip", package, ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__"))
    tag = f"cpython-3{machine.python.name.removeprefix('python3.')}-{CROSS}"
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    # Against torch alone: the libc in the emulated root names its parts by absolute paths.
    compile_([
        f"{CROSS}-g++", "-shared", "-s", *objects, "-o", package / f"_C.{tag}.so", f"-L{machine.site / 'torch/lib'}",
        *libraries, "-Wl,--allow-shlib-undefined",
    ])  # fmt: skip
    version = re.search(r"__version__ = '(.+)'", (machine.site / "torch" / "version.py").read_text())[1]
    compiler = subprocess.run([f"{CROSS}-g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    info = {"torch": version, "cuda": None, "cuda_architectures": [], "compiler": compiler}
    (package / "_build_info.py").write_text(f"BUILD_INFO = {info!r}\n")


def compile_(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
