"""The build backend of pyproject.toml: setuptools', which compiles against the torch that fastclip will run with.

pip and uv build in an isolation of their own, where the torch of the environment is out of sight. A torch among the
requirements of the build would be another one: a download of 3 GB, and an extension that does not load beside the
environment's. So none is required, and find_torch looks for the one that is there.
"""

import importlib.util
import os
import re
import site
import sys
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import get_requires_for_build_sdist  # noqa: F401  a hook, as those below

OLDEST = (2, 11)
LIBRARY = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"

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


def get_requires_for_build_wheel(config_settings=None):
    find_torch()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    find_torch()
    return build_meta.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    find_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    find_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    find_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return build_meta.build_sdist(sdist_directory, config_settings)


def find_torch():
    """Makes the environment's torch importable; where there is none, or an old one, stops and says what to do."""
    if importlib.util.find_spec("torch") is None:
        folders = environment()
        found = next((folder for folder in folders if (folder / "torch" / "version.py").is_file()), None)
        if found is None:
            sys.exit(NO_TORCH.format("\n  ".join(map(str, folders))))
        sys.path.append(str(found))  # last: setuptools and the rest are those of the build
        importlib.invalidate_caches()
    folder = Path(importlib.util.find_spec("torch").origin).parent
    version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if (int(version[2]), int(version[3])) < OLDEST:
        sys.exit(OLD_TORCH.format(".".join(map(str, OLDEST)), version[1], folder.parent))
    print(f"fastclip is built against torch {version[1]} in {folder.parent}", flush=True)


def environment():
    """Returns the folders in which the environment has its packages, behind the isolation of the build."""
    if Path(setuptools.__file__).is_relative_to(sys.prefix):
        # uv and build have made a virtual environment, with the build's packages. Those who called know the other one.
        return [prefix / LIBRARY for prefix in called_for() if prefix != Path(sys.prefix)][:1]
    # pip runs the environment's own Python, and takes its folders out of the path.
    users = [] if sys.prefix != sys.base_prefix else [site.getusersitepackages()]
    return [Path(folder) for folder in dict.fromkeys([*users, *site.getsitepackages()])]


def called_for():
    """Yields the environments that the program which builds is told of, likely ones first; on Linux alone."""
    caller = Path("/proc") / str(os.getppid())
    try:
        variables = dict(text.split("=", 1) for text in (caller / "environ").read_text().split("\0") if "=" in text)
        program, *arguments = (caller / "cmdline").read_text().split("\0")
        here = (caller / "cwd").readlink()
    except OSError:
        return
    values = [argument.rpartition("=")[2] for argument in arguments]  # of uv's --python, which takes either
    prefixes = [prefix for value in values for prefix in (here / value, (here / value).parent.parent)]
    if Path(program).name.startswith("python"):  # python -m build
        prefixes.append((here / program).parent.parent)
    prefixes += [Path(variables[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if variables.get(name)]
    prefixes += [folder / ".venv" for folder in (here, *here.parents)]
    prefixes += [Path(folder).parent for folder in variables.get("PATH", "").split(os.pathsep)]
    yield from (prefix for prefix in prefixes if (prefix / LIBRARY).is_dir())
