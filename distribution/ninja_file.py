"""What a build consists of, as a file for ninja: the kernels as a library, and for each torch a glue beside it.

    libfastclip.so       csrc/cpu, csrc/cuda, csrc/c: knows no torch and no Python
    _C_<release>.*.so    csrc/host, compiled against that release of torch; finds libfastclip.so beside itself

ninja compiles what has changed: sources, headers, commands.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools.errors import PlatformError

RULES = """\
builddir = {}
rule cxx
  command = $words -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $words -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  pool = console
rule link
  command = $words -o $out $in $libraries
"""


class NinjaFile:
    """Files to make, by commands that run in this folder's parent, the project."""

    def __init__(self, folder):
        self.folder = Path(folder).absolute()
        self.lines = [RULES.format(_escaped(self.folder))]

    def add(self, rule, output, inputs, command, libraries=()):
        """Adds a file to make. `command`, `libraries`: lists of words. Returns the file."""
        inputs = " ".join(map(_escaped, inputs))
        self.lines.append(f"build {_escaped(output)}: {rule} {inputs}\n  words = {_words(command)}\n")
        if libraries:
            self.lines.append(f"  libraries = {_words(libraries)}\n")
        return output

    def add_objects(self, folder, sources, command_for):
        """Adds the objects of sources, in a folder of their own; returns them. command_for: source to command."""
        return [
            self.add("cxx", self.folder / folder / f"{source.stem}.o", [source], command_for(source))
            for source in sources
        ]

    def make(self):
        """Makes all that was added. Raises PlatformError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("".join(self.lines))
        jobs = os.environ.get("MAX_JOBS", "")
        command = [find_ninja(), "-v", "-f", str(file), *(["-j", jobs] if jobs.isdigit() else [])]
        if subprocess.run(command).returncode != 0:
            raise PlatformError(
                "fastclip was not built: the first error above says why. FASTCLIP_CUDA=0 leaves CUDA out"
            )


def find_ninja():
    """Returns its path. Raises PlatformError."""
    found = shutil.which("ninja")
    if found is None:
        try:
            import ninja
        except ImportError:
            raise PlatformError("ninja is needed to build fastclip: pip install ninja") from None
        found = os.path.join(ninja.BIN_DIR, "ninja")
    return found


def _escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(words):
    return shlex.join(map(str, words)).replace("$", "$$")
