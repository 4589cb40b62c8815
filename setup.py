"""Builds fastclip: libfastclip.so, the kernels, and beside it a glue for each torch.

FASTCLIP_TORCHES="/a:/b" compiles a glue for each torch in these folders, in place of the one that imports.
FASTCLIP_CXX_FLAGS="-g -O1" is added to the flags of the C++ compiler, CXX. MAX_JOBS bounds how many compilers run at a
time. The variables of the CUDA half, which is built wherever nvcc is found: distribution/nvcc.py.

torch.utils.cpp_extension is not used: it builds against one torch alone, and refuses .cu files beside a CPU-only one.
"""

import os
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

sys.path.insert(0, str(Path(__file__).parent / "distribution"))

import ninja_file  # noqa: E402  all three are in that folder
import nvcc  # noqa: E402
import torches  # noqa: E402

CXX_FLAGS = [
    "-std=c++20",
    "-fno-fast-math",  # NaN and inf have to be seen, whatever CXXFLAGS says
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-Wall",
    "-Wextra",
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
# Compiled to be small, as a wheel has it for each torch: what runs once a step, and not for each tensor.
ONCE_A_STEP = ("bindings", "engine", "histories", "huge_pages", "norm_limits", "reasons", "self_check", "shards")
IS_MACOS = sys.platform == "darwin"
if IS_MACOS:
    LIBRARY = ["-dynamiclib", "-install_name", "@rpath/libfastclip.so"]
    GLUE = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path"]
else:  # Each exports what it means to: what it has from headers is its own.
    LIBRARY = ["-shared", "-Wl,-soname,libfastclip.so", "-Wl,--version-script,distribution/library.map"]
    GLUE = ["-shared", "-Wl,--no-as-needed", "-Wl,--version-script,distribution/glue.map"]
    # Before LD_LIBRARY_PATH: another fastclip's library may be there.
    GLUE += ["-Wl,-rpath,$ORIGIN", "-Wl,--disable-new-dtags"]


def words_of(variable):
    return shlex.split(os.environ.get(variable, ""))


def compiler():
    return words_of("CXX") or ["c++"]


def command_for(*flags):
    """Returns a function from a source to the command that compiles it."""
    given = [*words_of("CPPFLAGS"), *words_of("CXXFLAGS")]
    return lambda source: [*compiler(), *given, *CXX_FLAGS, *flags_of(source), *flags, *words_of("FASTCLIP_CXX_FLAGS")]


def link_command(*flags):
    return [*compiler(), *words_of("CXXFLAGS"), *flags, *words_of("LDFLAGS")]


def flags_of(source):
    """Returns more flags of a source: of most, none."""
    if source.parent.name == "host" and source.stem in ONCE_A_STEP:
        return ["-Os"]
    # Of few machines: those without AVX2. On ARM it is what runs.
    if source.name == "baseline.cpp" and sysconfig.get_platform().endswith("x86_64"):
        is_clang = "clang" in nvcc.output(*compiler(), "--version")
        return ["-O2", *([] if is_clang else ["-ftree-vectorize", "-fvect-cost-model=dynamic"])]
    return []


def sources_in(folder):
    found = sorted(Path(folder).glob("*.cpp"))
    if not found:
        raise PlatformError(
            f"{Path(folder).absolute()} has no sources: run setup.py in a clone of fastclip, or an sdist"
        )
    return found


def module_of(torch):
    """Returns the name of its glue."""
    return f"fastclip._C_{torch.release.replace('.', '_')}"


class Build(build_ext):
    def run(self):
        self.torches = torches.find()
        super().run()
        self.write_build_info()

    def get_ext_filename(self, name):
        return "fastclip/libfastclip.so" if name.endswith("libfastclip") else super().get_ext_filename(name)

    def get_export_symbols(self, extension):
        return []

    def build_extensions(self):
        file = ninja_file.NinjaFile(self.build_temp)
        library = self.add_library(file)
        for torch in self.torches:
            self.add_glue(file, torch, library)
        package = Path(self.build_lib, "fastclip")
        package.mkdir(parents=True, exist_ok=True)
        glues = {self.output_of(module_of(torch)) for torch in self.torches}
        for left_over in set(package.absolute().glob("_C*.so")) - glues:  # by a build for another torch
            left_over.unlink()
        file.make()

    def output_of(self, name):
        return Path(self.build_lib, self.get_ext_filename(name)).absolute()

    def add_library(self, file):
        objects = file.add_objects("cpu", sources_in("csrc/cpu"), command_for())
        objects += file.add_objects("c", sources_in("csrc/c"), command_for("-Ifastclip/include"))
        libraries = []
        if compiler_of_cuda := nvcc.find_nvcc():
            command = nvcc.compile_command(compiler_of_cuda)
            objects.append(file.add("nvcc", file.folder / "cuda/step.o", ["csrc/cuda/step.cu"], command))
            libraries = [f"-L{nvcc.cuda_libraries(compiler_of_cuda)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return file.add("link", self.output_of("fastclip.libfastclip"), objects, link_command(*LIBRARY), libraries)

    def add_glue(self, file, torch, library):
        includes = [*torch.includes, sysconfig.get_paths()["include"]]
        flags = [word for folder in includes for word in ("-isystem", folder)]
        flags += [f"-ffile-prefix-map={torch.folder.parent}/=", f"-DFASTCLIP_FOR_TORCH={torch.version}"]
        flags += ["-DFASTCLIP_CUDA"] if nvcc.find_nvcc() else []
        objects = file.add_objects(f"host-{torch.release}", sources_in("csrc/host"), command_for(*flags))
        libraries = [f"-L{torch.folder / 'lib'}", *(f"-l{name}" for name in torches.LIBRARIES)]
        file.add("link", self.output_of(module_of(torch)), [*objects, library], link_command(*GLUE), libraries)

    def write_build_info(self):
        """Writes the facts that fastclip can tell about itself even if the extension does not load."""
        found = nvcc.find_nvcc()
        info = {
            "torches": {torch.release: torch.version for torch in self.torches},
            "newest_torch": torches.NEWEST,
            "cuda": nvcc.release(found) if found else None,
            "cuda_architectures": nvcc.cuda_architectures(found) if found else [],
            "compiler": nvcc.output(*compiler(), "--version").splitlines()[0],
        }
        folder = Path("fastclip") if self.inplace else Path(self.build_lib) / "fastclip"
        (folder / "_build_info.py").write_text(f'"""Written by setup.py."""\n\nBUILD_INFO = {info!r}\n')


if __name__ == "__main__":
    try:
        found = torches.here()
    except PlatformError as error:
        sys.exit(str(error))
    setup(
        install_requires=[torches.requirement(found), "typing-extensions"],
        ext_modules=[Extension(name, []) for name in ("fastclip.libfastclip", *map(module_of, found))],
        cmdclass={"build_ext": Build},
    )
