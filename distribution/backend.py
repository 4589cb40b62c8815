"""The build backend of pyproject.toml: setuptools', which compiles against the torch that fastclip will run with.

pip and uv build in an isolation of their own, where the torch of the environment is out of sight. A torch among the
requirements of the build would be another one: a download of 3 GB, and an extension that does not load beside the
environment's. So none is required, and find_torch looks for the one that is there.
"""

import functools
import importlib
import os
import site
import sys
from pathlib import Path

import callers
import torches
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401  an sdist needs no torch
from setuptools.errors import PlatformError

NO_TORCH = """\
fastclip is built against the torch of the environment that it is installed into, and finds none there.
Install torch first: pip install torch
If you have, this build has not seen it. Then build without isolation:
  pip install 'setuptools>=77' ninja
  pip install --no-build-isolation ...
Looked in:
  {}"""


def _finds_torch(hook):
    """The hook of the same name, which runs setup.py: and setup.py looks for torch in the path."""

    @functools.wraps(hook)
    def find_and_call(*arguments, **settings):
        find_torch()
        return hook(*arguments, **settings)

    return find_and_call


get_requires_for_build_wheel = _finds_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _finds_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = _finds_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _finds_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = _finds_torch(build_meta.build_wheel)
build_editable = _finds_torch(build_meta.build_editable)


def find_torch():
    """Makes the environment's torch importable, unless FASTCLIP_TORCHES names others; where there is none, or an old
    one, stops and says what to do."""
    try:
        if not torches.named() and torches.importable_folder() is None:
            search()
        for torch in torches.find():
            print(f"fastclip is built against torch {torch.version} in {torch.folder.parent}", flush=True)
    except PlatformError as error:
        sys.exit(str(error))


def search():
    """Puts the folders of the environment in the path."""
    folders = environment()
    found = [folder for folder in folders if (folder / "torch" / "__init__.py").is_file()]
    if not found:
        sys.exit(NO_TORCH.format("\n  ".join(map(str, folders)) or "(found no environment)"))
    # Last: setuptools and the rest are those of the build. All: what torch needs may be in another one.
    sys.path.extend(map(str, dict.fromkeys(found + folders)))
    importlib.invalidate_caches()


def environment():
    """Returns the folders in which the environment has its packages, behind the isolation of the build."""
    prefix = callers.environment_of_caller(os.getppid())
    if prefix is not None:
        return callers.folders_of(prefix)
    # pip runs the environment's own Python, and takes its folders out of the path.
    users = [] if sys.prefix != sys.base_prefix else [site.getusersitepackages()]
    return [Path(folder) for folder in dict.fromkeys([*users, *site.getsitepackages()])]
