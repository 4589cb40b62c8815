"""The build backend of pyproject.toml: setuptools', which compiles against the torch that fastclip will run with.

pip and uv build in an isolation of their own, where the torch of the environment is out of sight. A torch among the
requirements of the build would be another one: a download of 3 GB, and an extension that does not load beside the
environment's. So none is required, and find_torch looks for the one that is there.
"""

import functools
import importlib.util
import os
import re
import site
import sys
from pathlib import Path

import callers
from setuptools import build_meta

OLDEST = (2, 11)

NO_TORCH = """\
fastclip is built against the torch of the environment that it is installed into, and finds none there.
Install torch first: pip install torch
If you have, this build has not seen it. Then build without isolation:
  pip install 'setuptools>=77' ninja pybind11
  pip install --no-build-isolation ...
Looked in:
  {}"""
OLD_TORCH = """\
fastclip needs torch {} or newer, and this is torch {} in {}.
Install a newer one first: pip install -U torch"""


def _finds_torch(hook):
    """The hook of the same name, which runs setup.py: and setup.py imports torch."""

    @functools.wraps(hook)
    def find_and_call(*arguments, **settings):
        find_torch()
        return hook(*arguments, **settings)

    return find_and_call


get_requires_for_build_sdist = _finds_torch(build_meta.get_requires_for_build_sdist)
get_requires_for_build_wheel = _finds_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _finds_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = _finds_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _finds_torch(build_meta.prepare_metadata_for_build_editable)
build_sdist = _finds_torch(build_meta.build_sdist)
build_wheel = _finds_torch(build_meta.build_wheel)
build_editable = _finds_torch(build_meta.build_editable)


def find_torch():
    """Makes the environment's torch importable; where there is none, or an old one, stops and says what to do."""
    if torch_folder() is None:
        folders = environment()
        found = [folder for folder in folders if (folder / "torch" / "__init__.py").is_file()]
        if not found:
            sys.exit(NO_TORCH.format("\n  ".join(map(str, folders)) or "(found no environment)"))
        # Last: setuptools and the rest are those of the build. All: what torch needs may be in another one.
        sys.path.extend(map(str, dict.fromkeys(found + folders)))
        importlib.invalidate_caches()
    folder = torch_folder()
    version = re.search(r"""__version__ = ['"]((\d+)\.(\d+)[^'"]*)""", (folder / "version.py").read_text())
    if version is None:
        sys.exit(f"{folder / 'version.py'} does not say which torch this is. Install torch again, then fastclip.")
    if (int(version[2]), int(version[3])) < OLDEST:
        sys.exit(OLD_TORCH.format(".".join(map(str, OLDEST)), version[1], folder.parent))
    print(f"fastclip is built against torch {version[1]} in {folder.parent}", flush=True)


def torch_folder():
    """Returns the folder of the torch that imports, or None. What is left of one, a folder alone, does not count."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def environment():
    """Returns the folders in which the environment has its packages, behind the isolation of the build."""
    prefix = callers.environment_of_caller(os.getppid())
    if prefix is not None:
        return callers.folders_of(prefix)
    # pip runs the environment's own Python, and takes its folders out of the path.
    users = [] if sys.prefix != sys.base_prefix else [site.getusersitepackages()]
    return [Path(folder) for folder in dict.fromkeys([*users, *site.getsitepackages()])]
