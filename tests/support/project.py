"""Where the project's files are, and its setup.py as a module."""

import functools
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"


@functools.cache
def load_setup():
    spec = importlib.util.spec_from_file_location("fastclip_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
