"""Fetches the headers of a torch, to compile a glue against it without installing it."""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torches

CACHE = Path(__file__).parents[1] / ".cache" / "wheel"
GLIBC = (2, 28)  # of torch's own wheels, and of ours


def platform_of(machine):
    """Returns the name of the platform, as in a wheel's tag."""
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


def fetch(release, machine, compiler, run):
    """Returns a folder with what setup.py needs of the newest torch of a release, as "2.13", for a machine.

    compiler: a list of words; run(what, *command, **variables) runs a command, and raises where it fails.
    """
    folder = CACHE / f"torch-{release}-{machine}"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    minor = f"3{sys.version_info[1]}"
    wanted = ["--platform", platform_of(machine), "--python-version", minor, "--abi", f"cp{minor}"]
    with tempfile.TemporaryDirectory() as there:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", there]
        # No constraints: a machine's may hold torch to one release.
        run(f"torch {release}", *pip, *wanted, f"torch=={release}.*", PIP_CONSTRAINT=os.devnull)
        (wheel,) = Path(there).glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(
                folder, [name for name in file.namelist() if name.startswith(("torch/include/", "torch/version.py"))]
            )
    (folder / "torch" / "lib").mkdir()
    for name in torches.LIBRARIES:  # to link, empty ones of these names are enough
        library = folder / "torch" / "lib" / f"lib{name}.so"
        run(library.name, *compiler, "-shared", f"-Wl,-soname,{library.name}", "-x", "c", os.devnull, "-o", library)
    (folder / "done").touch()
    return folder
