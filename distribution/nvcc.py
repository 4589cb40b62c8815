"""The CUDA half: which nvcc compiles it, for which architectures, with which runtime.

FASTCLIP_CUDA=0 leaves it out; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST="8.0;Hopper" narrows the architectures,
as in torch. NVCC_THREADS, or MAX_JOBS, bounds how many nvcc compiles at a time.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torches
from setuptools.errors import PlatformError

NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",  # as -ffp-contract=off
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-psabi,-fvisibility=hidden",
]
# Those of torch's own wheels, and Jetson's. 8.9 runs the code of 8.6.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.7", "9.0", "10.0", "11.0", "12.0"]
JETSON = {"8.7", "11.0"}  # whose processors are Arm: an x86 machine's build leaves them out


def find_nvcc():
    """Returns the path of nvcc, or None; CUDA_HOME goes before PATH."""
    if os.environ.get("FASTCLIP_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def output(*command):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def cuda_error(problem, way_out="Mend that, name another toolkit by CUDA_HOME"):
    return PlatformError(f"{problem}\n{way_out}, or leave CUDA out: FASTCLIP_CUDA=0")


def ask(nvcc, pattern, *arguments):
    """Returns all matches of `pattern` in nvcc's output."""
    try:
        said = output(nvcc, *arguments)
    except (OSError, subprocess.CalledProcessError) as error:
        raise cuda_error(f"{error}\n{getattr(error, 'stdout', '')}".strip()) from error
    found = re.findall(pattern, said, re.M)
    if not found:
        raise cuda_error(
            f"{shlex.join((nvcc, *arguments))} does not say what it should, but:\n{said.strip() or 'nothing'}"
        )
    return found


def cuda_architectures(nvcc):
    """Returns the architectures asked for, such as ["8.0", "9.0+PTX"]. By default all of ARCHITECTURES that the toolkit
    knows, with PTX of the newest."""
    known = ask(nvcc, r"^compute_(\d+)$", "--list-gpu-arch")
    entries = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    asked = {entry: architectures_of(entry) for entry in entries}
    for entry, architectures in asked.items():
        for architecture in architectures:
            if number_of(architecture).rstrip("af") not in known:
                raise bad_entry(entry, f"{nvcc} does not know {architecture}")
    if asked:
        return list(dict.fromkeys(sum(asked.values(), [])))
    absent = JETSON if platform.machine() == "x86_64" else set()
    architectures = [a for a in ARCHITECTURES if number_of(a) in known and a not in absent]
    if not architectures:
        raise cuda_error(
            f"{nvcc} is too old, or too new: it knows none of the architectures {', '.join(ARCHITECTURES)}"
        )
    return architectures[:-1] + [architectures[-1] + "+PTX"]


def architectures_of(entry):
    """Returns the architectures of an entry of TORCH_CUDA_ARCH_LIST: a number such as "8.6+PTX" or "9.0a", or a name
    that torch knows, such as "Ampere"."""
    if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
        return [entry]
    try:
        from torch.utils import cpp_extension

        with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=entry):
            flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError, ImportError) as error:
        raise bad_entry(entry, "no GPU is here" if entry == "native" else error) from error
    native, ptx = (re.findall(rf"code={kind}_(\d+)(\d)", flags) for kind in ("sm", "compute"))
    return [".".join(number) + "+PTX" * (number in ptx) for number in sorted(native, key=lambda n: tuple(map(int, n)))]


def bad_entry(entry, problem):
    return cuda_error(
        f"TORCH_CUDA_ARCH_LIST holds {entry!r}: {problem}", "Write numbers and names as in '8.0;9.0+PTX;Blackwell'"
    )


def number_of(architecture):
    return architecture.removesuffix("+PTX").replace(".", "")


def gencode(architecture):
    number = number_of(architecture)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_libraries(nvcc):
    """Returns the folder of libcudart_static.a."""
    top = Path(ask(nvcc, r"^#\$ TOP=(.+)$", "--dryrun", "-E", "-x", "cu", os.devnull)[0])
    folders = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    found = [str(f) for f in folders if (f / "libcudart_static.a").exists()]
    if not found:
        raise cuda_error(f"libcudart_static.a of {nvcc} is in none of {', '.join(map(str, folders))}")
    return found[0]


def nvcc_threads():
    """Returns the number of architectures that nvcc compiles at a time."""
    limits = (os.environ.get(name, "") for name in ("NVCC_THREADS", "MAX_JOBS"))
    return next((limit for limit in limits if limit.isdigit()), str(os.cpu_count()))


def release(nvcc):
    """Returns its release, as "13.0"."""
    return ask(nvcc, r"release ([\d.]+)", "--version")[0]


def compile_command(nvcc):
    """Returns the command that compiles for all architectures, but for its files."""
    flags = dict.fromkeys(flag for architecture in cuda_architectures(nvcc) for flag in gencode(architecture))
    return [nvcc, *NVCC_FLAGS, *compression(nvcc), f"--threads={nvcc_threads()}", *flags]


def compression(nvcc):
    """Returns the flags that make the code as small as this nvcc can."""
    smallest = [] if torches.number_of(release(nvcc)) < (12, 8) else ["--compress-mode=size"]
    return ["-Xfatbin=-compress-all", *smallest]
