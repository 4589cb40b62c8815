"""Builds fastclip._C: the CPU half always, the CUDA half whenever nvcc is found.

FASTCLIP_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" narrows its architectures.
FASTCLIP_CXX_FLAGS="-g -O1" is added to the flags of the C++ compiler.
torch.utils.cpp_extension refuses .cu files beside a CPU-only torch, so nvcc is called here: the
CUDA half includes nothing of torch, and links the CUDA runtime statically.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CXX_FLAGS = [
    "-O3",
    "-g0",  # Python brings -g, which makes the library ten times as large
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers have many
    "-Wno-psabi",  # vectors never cross a function that is not inlined
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-plt",
    "-fopenmp",  # for at::parallel_for; torch brings the runtime, so it is not linked again
    # Only the fma that is written: the bits must not depend on what a compiler contracts.
    "-ffp-contract=off",
    # Comparisons may become selects, and fma its instruction.
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
    """The path of nvcc, or None; CUDA_HOME goes before PATH."""
    if os.environ.get("FASTCLIP_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def output(*command):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def cuda_architectures(nvcc):
    """Those asked for, e.g. ["8.0", "9.0+PTX"]; else those the toolkit has, PTX of the newest."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked.replace(";", " ").split()
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    architectures = [a for a in ARCHITECTURES if a.replace(".", "") in known]
    return architectures[:-1] + [architectures[-1] + "+PTX"]


def gencode(architecture):
    number = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_libraries(nvcc):
    """The folder of libcudart_static.a."""
    top = Path(re.search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.M)[1])
    folders = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    return next(str(f) for f in folders if (f / "libcudart_static.a").exists())


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
        sources = [Path("csrc/step_cuda.cu"), *Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh"), Path(__file__)]
        target = folder / f"step_cuda_{'_'.join(architectures).replace('.', '')}.o"
        if self.force or not target.exists() or any(s.stat().st_mtime > target.stat().st_mtime for s in sources):
            flags = [flag for architecture in architectures for flag in gencode(architecture)]
            command = [
                nvcc,
                *NVCC_FLAGS,
                f"--threads={os.cpu_count()}",
                *flags,
                "-c",
                str(sources[0]),
                "-o",
                str(target),
            ]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        return str(target)

    def write_build_info(self):
        """What fastclip can say of itself even where the extension does not load."""
        nvcc = find_nvcc()
        folder = Path("fastclip") if self.inplace else Path(self.build_lib) / "fastclip"
        info = {
            "torch": torch.__version__,
            "cuda": re.search(r"release ([\d.]+)", output(nvcc, "--version"))[1] if nvcc else None,
            "cuda_architectures": cuda_architectures(nvcc) if nvcc else [],
            "compiler": output(os.environ.get("CXX", "c++"), "--version").splitlines()[0],
        }
        (folder / "_build_info.py").write_text(f'"""Written by setup.py."""\n\nBUILD_INFO = {info!r}\n')


if __name__ == "__main__":
    setup(
        ext_modules=[
            CppExtension(
                "fastclip._C",
                sources=[
                    "csrc/bindings.cpp",
                    "csrc/plan.cpp",
                    "csrc/walk.cpp",
                    "csrc/states.cpp",
                    "csrc/shards.cpp",
                    "csrc/device_part.cpp",
                    "csrc/tensors.cpp",
                    "csrc/groups.cpp",
                    "csrc/step_cpu.cpp",
                ],
                depends=sorted(map(str, Path("csrc").glob("*.h"))),
                extra_compile_args=CXX_FLAGS + os.environ.get("FASTCLIP_CXX_FLAGS", "").split(),
            )
        ],
        cmdclass={"build_ext": Build},
    )
