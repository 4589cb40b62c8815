"""python distribution/make_wheel.py: makes an sdist, and of it a wheel for this Python that PyPI takes.

The wheel has a glue for each layout of torch. It needs no container: what a newer compiler would ask for,
old_runtime.cpp has. auditwheel names the platform, twine reads the metadata. The tools are those of
requirements-wheel.txt. --machine names that of the compiler CXX, where it is another than this one: how such a wheel is
made, tests/arm shows.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import old_cudart
import torches
from torch_headers import CACHE, GLIBC, fetch, platform_of
from torches import LIBRARIES

ROOT = Path(__file__).parents[1]
LARGEST_MB = {True: 8, False: 1}  # with CUDA, without


class WheelError(Exception):
    """A step failed; says which, and how its output ends."""


def run(what, *command, cwd=ROOT, shows=None, **variables):
    """Returns what a command prints. `shows`: what of its lines is shown meanwhile."""
    # The tools are where this Python is, and call each other by name.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment, lines = {**os.environ, "PATH": path, **variables}, []
    with subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if shows and (found := re.match(shows, line)):
                print(f"{what} {found[0]}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    if process.returncode != 0:
        raise WheelError(f"{what}: {shlex.join(map(str, command))}\n{''.join(lines)[-4000:]}")
    return "".join(lines)


def make_sdist(folder):
    """Returns the path of an sdist of the project."""
    run("the sdist", sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def make_wheel(sdist, folder, machine):
    """Makes a wheel of an sdist, in the folder; returns its path."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    named = []
    for release in torches.LAYOUTS:
        print(f"Headers of torch {release}", flush=True)
        named.append(str(fetch(release, machine, compiler, run)))
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    runtime, flags = folder / "old_runtime.o", ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
    run("old_runtime.cpp", *compiler, *flags, "-c", source / "distribution/old_runtime.cpp", "-o", runtime)
    old = old_cudart.make(folder / "old_cudart", compiler, GLIBC, run)
    variables = {
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {shlex.join(map(str, [runtime, '-Wl,--wrap=pow', '-s', *old]))}",
        "FASTCLIP_TORCHES": os.pathsep.join(named),
    }
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", folder / "built"]
    run("Compiling", *command, cwd=source, shows=r"\[\d+/\d+\]", **variables)
    (wheel,) = (folder / "built").glob("*.whl")
    return wheel


def repair(wheel, folder, machine):
    """Makes a wheel that names the platforms it loads on, in the folder; returns its path."""
    excluded = [word for name in LIBRARIES for word in ("--exclude", f"lib{name}.so")]
    # auditwheel knows the names of this machine's platforms alone; the oldest that fits it finds for any.
    wanted = platform_of(machine) if machine == platform.machine() else "auto"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", wanted, *excluded]
    run("auditwheel", *command, "--zip-compression-level", "9", "-w", folder / "repaired", wheel)
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


def check(wheel):
    """Returns what a wheel says of itself. Raises WheelError if PyPI would refuse it, or if it is too large."""
    run("twine", sys.executable, "-m", "twine", "check", "--strict", wheel)
    shown = run("auditwheel", sys.executable, "-m", "auditwheel", "show", "--json", wheel)
    found = json.loads(shown[shown.index("{") :])
    # The libraries that torch has loaded before are outside, and there.
    foreign = set(found["external_libs"]) - {f"lib{name}.so" for name in LIBRARIES}
    newest = re.match(r"manylinux_(\d+)_(\d+)_", found["sym_tag"])
    if foreign or newest is None or tuple(map(int, newest.groups())) > GLIBC:
        raise WheelError(f"{wheel.name} would not load everywhere: {shown}")
    with zipfile.ZipFile(wheel) as file:
        namespace = {}
        exec(file.read("fastclip/_build_info.py"), namespace)
    info, megabytes = namespace["BUILD_INFO"], wheel.stat().st_size / 1e6
    if megabytes > LARGEST_MB[bool(info["cuda"])]:
        raise WheelError(f"{wheel.name} has {megabytes:.2f} MB, more than {LARGEST_MB[bool(info['cuda'])]}")
    cuda = f"CUDA {info['cuda']} for {', '.join(info['cuda_architectures'])}" if info["cuda"] else "no CUDA"
    return f"{megabytes:.2f} MB, {found['sym_tag']}, for torch {' and '.join(info['torches'])}, {cuda}"


def main():
    parser = argparse.ArgumentParser("python distribution/make_wheel.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--machine", default=platform.machine(), help="of the compiler CXX; default: %(default)s")
    options = parser.parse_args()
    folder = CACHE / "build"  # stays where something fails: to look at
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        sdist = make_sdist(folder)
        wheel = repair(make_wheel(sdist, folder, options.machine), folder, options.machine)
        said = check(wheel)
    except WheelError as error:
        sys.exit(f"failed: {error}")
    for file in (sdist, wheel):
        shutil.copy(file, options.out)
        print(options.out / file.name)
    print(said)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
