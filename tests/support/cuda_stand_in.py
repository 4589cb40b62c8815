"""Lets a torch that is built for CUDA import where there is no CUDA: one small library in the place of NVIDIA's.

PyPI's torch for Linux needs 3 GB of libraries beside it, which a CPU never calls. The stand-in has a function for each
symbol that torch's own libraries look for and do not have among them; each returns an error.
"""

import re
import subprocess

FIRST = ("libtorch_python.so", "libtorch_global_deps.so", "libtorch_cuda_linalg.so")
RETURN_100 = {"aarch64": "mov w0, #100\n ret", "x86_64": "mov $100, %eax\n ret"}  # cudaErrorNoDevice
TYPE = {"aarch64": "%function", "x86_64": "@function"}


def make(torch_libraries, out, compiler, machine, more=()):
    """Writes to the folder `out` what the libraries in the folder `torch_libraries` lack; `more`: folders they may use.

    Returns the names of the libraries that it stands for.
    """
    found, missing = _needed([torch_libraries, *more])
    needed, versions, there = set(), {}, set()
    for path in found.values():
        for line in _output("nm", "-D", path).splitlines():
            *_, kind, symbol = line.split()
            name, _, version = symbol.partition("@")
            if kind == "U":
                needed.add(name)
                if version:
                    versions[name] = version.strip("@")
            elif kind not in "wv":
                there.add(name)
    lacking = sorted(name for name in needed - there if not name.startswith(("Py", "_Py")))
    out.mkdir(parents=True, exist_ok=True)
    labels = "".join(f".globl {name}\n.type {name}, {TYPE[machine]}\n{name}:\n" for name in lacking)
    (out / "stand_in.s").write_text(f".text\n{labels} {RETURN_100[machine]}\n")
    nodes = {}
    for name in lacking:
        if name in versions:
            nodes.setdefault(versions[name], []).append(name)
    script = "".join(f"{node} {{ global: {'; '.join(names)}; }};\n" for node, names in nodes.items())
    (out / "stand_in.map").write_text(script)
    options = [f"-Wl,--version-script={out / 'stand_in.map'}"] if nodes else []
    _output(compiler, "-shared", "-nostdlib", *options, "-o", out / "libstand_in.so", out / "stand_in.s")
    for name in missing:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to("libstand_in.so")
    return sorted(missing)


def _needed(folders):
    """Returns {name: path} of the libraries that torch loads, and the names of those that none of the folders has."""
    queue, found, missing = list(FIRST), {}, set()
    while queue:
        name = queue.pop()
        if name in found or name in missing:
            continue
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if path is None:
            missing.add(name)
            continue
        found[name] = path
        queue += re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", path))
    return found, missing


def _output(*command):
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, check=True).stdout
