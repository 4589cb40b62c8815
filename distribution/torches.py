"""Which torch fastclip is compiled against: the one that imports, or those that FASTCLIP_TORCHES names.

torch's C++ interface is not stable. What fastclip reads of it, though, has changed only once since 2.11: a glue that is
compiled against the first release of a layout fits the others. fastclip/_extension.py chooses one, and checks that.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import PlatformError

# Each release that was tested (python -m tests.matrix), by the first one of the same layout.
LAYOUTS = {"2.11": ("2.11", "2.12"), "2.13": ("2.13", "2.14", "2.15")}
RELEASES = [release for layout in LAYOUTS.values() for release in layout]
OLDEST, NEWEST = RELEASES[0], RELEASES[-1]
# A glue names these of torch's libraries, and finds them at run time.
LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")

NO_TORCH = """\
fastclip is compiled against torch, and there is none here.
Install torch first: pip install torch"""
OLD_TORCH = """\
fastclip needs torch {} or newer, and this is torch {} in {}.
Install a newer one first: pip install -U torch"""


@dataclass(frozen=True)
class Torch:
    folder: Path  # the package; of it, its headers and version.py are used, and its libraries where they are there
    version: str  # as "2.13.0+cpu"

    @property
    def release(self):
        """As "2.13": the part that decides on the layout."""
        return ".".join(self.version.split(".")[:2])

    @property
    def number(self):
        """As (2, 13)."""
        return tuple(map(int, self.release.split(".")))

    @property
    def is_prerelease(self):
        return re.match(r"\d+(\.\d+)+\.?(a|b|rc|dev)", self.version) is not None

    @property
    def includes(self):
        return [self.folder / "include", self.folder / "include/torch/csrc/api/include"]


def read(folder, way_out="Install torch again, then fastclip."):
    """Returns the Torch of a package's folder; raises PlatformError if it is none, or an old one."""
    file = folder / "version.py"
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"""__version__ = ['"](\d+\.\d+[^'"]*)""", text)
    if found is None:
        raise PlatformError(f"{file} does not say which torch this is. {way_out}")
    torch = Torch(folder, found[1])
    if torch.number < number_of(OLDEST):
        raise PlatformError(OLD_TORCH.format(OLDEST, torch.version, folder.parent))
    return torch


def number_of(release):
    return tuple(map(int, release.split(".")))


def importable_folder():
    """Returns the folder of the torch that imports, or None. What is left of one, a folder alone, does not count."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def named():
    """Returns the Torches of FASTCLIP_TORCHES, folders that have a folder torch, with a ':' between them; the oldest
    first. [] where it is not set. Raises PlatformError."""
    text = os.environ.get("FASTCLIP_TORCHES", "")
    way_out = "FASTCLIP_TORCHES names folders that have a folder torch, as site-packages does."
    folders = [Path(folder) / "torch" for folder in text.split(os.pathsep) if folder.strip()]
    torches = sorted((read(folder, way_out) for folder in folders), key=lambda torch: torch.number)
    if len({torch.release for torch in torches}) < len(torches):
        raise PlatformError(f"FASTCLIP_TORCHES={text} names two torches of the same release")
    return torches


def here():
    """Returns the Torches to compile against, [] where there is none. Raises PlatformError."""
    folder = importable_folder()
    return named() or ([read(folder)] if folder else [])


def find():
    """The same; raises PlatformError where there is none."""
    torches = here()
    if not torches:
        raise PlatformError(NO_TORCH)
    return torches


def requirement(torches):
    """Returns what the metadata says of torch. A build for one torch has no upper bound: it goes where that torch is,
    and must not have pip fetch another one. A wheel for several goes everywhere: its bound is the release after the
    newest that was tested, which may fit."""
    if not torches:
        return f"torch>={OLDEST}"
    # A version such as 2.13.0a0+1f3 is before 2.13, and .dev0 is before that.
    lowest = f"torch>={torches[0].release}" + ".dev0" * torches[0].is_prerelease
    major, minor = number_of(NEWEST)
    return lowest if len(torches) == 1 else f"{lowest},<{major}.{minor + 2}"
