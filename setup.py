"""Builds fastclip._C: the CPU half always, the CUDA half whenever nvcc is found.

FASTCLIP_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST="8.0;Hopper" narrows its architectures, as in torch.
MAX_JOBS bounds how many compilers run at a time; NVCC_THREADS how many of nvcc's.
FASTCLIP_CXX_FLAGS="-g -O1" is added to the flags of the C++ compiler.
torch.utils.cpp_extension refuses .cu files beside a CPU-only torch, so nvcc is called here: the
CUDA half includes nothing of torch, and links the CUDA runtime statically.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch
from setuptools import setup
from setuptools.errors import PlatformError
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

CXX_FLAGS = [
    "-std=c++20",  # torch 2.11 and 2.12 would take 17
    "-O3",
    "-g0",  # Python brings -g, which makes the library ten times as large
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers have many
    "-Wno-psabi",  # vectors never cross a function that is not inlined
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-plt",
    # Only the fma that the code writes: the bits must not depend on a compiler's contractions.
    "-ffp-contract=off",
    # Compilers may turn comparisons into selects, and fma into its instruction.
    "-fno-trapping-math",
    "-fno-math-errno",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",  # as -ffp-contract=off
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-psabi,-fvisibility=hidden",
]
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


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
    architectures = [a for a in ARCHITECTURES if number_of(a) in known]
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
        with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=entry):
            flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError) as error:
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


class Build(BuildExtension):
    def run(self):
        super().run()
        self.write_build_info()

    def build_extensions(self):
        (extension,) = self.extensions
        nvcc = find_nvcc()
        if nvcc:
            architectures = cuda_architectures(nvcc)
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            extension.extra_objects.append(self.compile_cuda(nvcc, architectures, folder))
            extension.define_macros.append(("FASTCLIP_CUDA", None))
            extension.library_dirs.append(cuda_libraries(nvcc))
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extensions()

    def compile_cuda(self, nvcc, architectures, folder):
        sources = [
            Path("csrc/cuda/step.cu"),
            *Path("csrc").glob("**/*.h"),
            *Path("csrc").glob("**/*.cuh"),
            Path(__file__),
        ]
        release = ask(nvcc, r"release ([\d.]+)", "--version")[0]
        target = folder / f"step_cuda{release}_{'_'.join(architectures).replace('.', '')}.o"
        # Not `self.force`: torch sets it always, and leaves the question to ninja.
        if not target.exists() or any(s.stat().st_mtime > target.stat().st_mtime for s in sources):
            flags = dict.fromkeys(flag for architecture in architectures for flag in gencode(architecture))
            command = [
                nvcc,
                *NVCC_FLAGS,
                "-Xfatbin=-compress-all",  # a fifth of the size; as torch's own
                f"--threads={nvcc_threads()}",
                *flags,
                "-c",
                str(sources[0]),
                "-o",
                f"{target}.part",  # so that one who interrupts leaves nothing that looks whole
            ]
            print(" ".join(command), flush=True)
            if (code := subprocess.run(command).returncode) != 0:
                raise cuda_error(f"{nvcc} could not compile {sources[0]} and has returned {code}: see above")
            os.replace(f"{target}.part", target)
        return str(target)

    def write_build_info(self):
        """Writes the facts that fastclip can tell about itself even if the extension does not load."""
        nvcc = find_nvcc()
        folder = Path("fastclip") if self.inplace else Path(self.build_lib) / "fastclip"
        info = {
            "torch": torch.__version__,
            "cuda": ask(nvcc, r"release ([\d.]+)", "--version")[0] if nvcc else None,
            "cuda_architectures": cuda_architectures(nvcc) if nvcc else [],
            "compiler": output(*shlex.split(os.environ.get("CXX", "c++")), "--version").splitlines()[0],
        }
        (folder / "_build_info.py").write_text(f'"""Written by setup.py."""\n\nBUILD_INFO = {info!r}\n')


if __name__ == "__main__":
    setup(
        ext_modules=[
            CppExtension(
                "fastclip._C",
                sources=sorted(map(str, [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/host").glob("*.cpp")])),
                depends=sorted(
                    str(path) for path in Path("csrc").rglob("*") if path.is_file()
                ),  # a change in one rebuilds; an sdist takes them along
                # No code reads it: but objects of another torch are then not taken for those of this one.
                define_macros=[("FASTCLIP_FOR_TORCH", torch.__version__)],
                extra_compile_args=CXX_FLAGS + os.environ.get("FASTCLIP_CXX_FLAGS", "").split(),
            )
        ],
        cmdclass={"build_ext": Build},
    )
