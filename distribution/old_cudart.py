"""Makes a copy of NVIDIA's static runtime that asks for no newer glibc than a wheel may.

glibc 2.34 gave its threads and its loader new versions, beside the old ones. A library that was compiled long before
asks for none, and gets the new ones where it is linked. In the copy, each of its symbols names an old version.
"""

import re
from pathlib import Path

import nvcc
import torches

NAME = "libcudart_static.a"
OLD = ("libpthread.so.0", "libdl.so.2", "librt.so.1")  # where these symbols are in an older glibc


def make(folder, compiler, newest, run):
    """Writes the copy to a folder, and returns the flags that link it; [] without CUDA.

    newest: of glibc, as (2, 28); run(what, *command) returns what a command prints.
    """
    compiler_of_cuda = nvcc.find_nvcc()
    if compiler_of_cuda is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    libc = run("libc", *compiler, "-print-file-name=libc.so.6").strip()
    names = renamed(run("libc", "readelf", "--dyn-syms", "-W", libc), newest)
    (folder / "names").write_text("".join(f"{name} {name}@{version}\n" for name, version in names.items()))
    original = Path(nvcc.cuda_libraries(compiler_of_cuda)) / NAME
    run(NAME, "objcopy", f"--redefine-syms={folder / 'names'}", original, folder / NAME)
    old = [run(name, *compiler, f"-print-file-name={name}").strip() for name in OLD]
    return ["-Wl,--no-as-needed", *old, f"-L{folder}"]


def renamed(symbols, newest):
    """Returns {name: its newest version that is old enough} of the symbols that readelf lists and whose own is not."""
    old, too_new = {}, set()
    for name, mark, version in re.findall(r" (\w+)(@@?)GLIBC_([\d.]+)$", symbols, re.MULTILINE):
        number = torches.number_of(version)
        if mark == "@@" and number > newest:
            too_new.add(name)
        elif number <= newest and number > torches.number_of(old.get(name, "0")):
            old[name] = version
    return {name: f"GLIBC_{old[name]}" for name in sorted(too_new & old.keys())}
