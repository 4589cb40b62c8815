"""Loads the compiled half that fits this torch. Where there is none, says what to do."""

import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._self_check import first_misread

# Without pip's cache, which keeps what was built from a URL for another torch.
BUILD_COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir ."
WAYS_OUT = (
    # Not from PyPI, where another project has this name.
    "Install a newer wheel of fastclip: pip install -U fastclip --no-index --find-links FOLDER. If you build it, build "
    f"it again, in a clone or with git+URL in place of the dot: {BUILD_COMMAND}, with uv: uv pip install "
    "--reinstall-package fastclip --no-cache ."
)

NOT_BUILT = (
    "fastclip's extension is not built{}. In a clone of fastclip: python setup.py build_ext --inplace, "
    f"or {BUILD_COMMAND}"
)

BUILD_INFO: dict[str, Any]
try:
    from ._build_info import BUILD_INFO
except ImportError as error:
    raise ImportError(NOT_BUILT.format("")) from error
if "torches" not in BUILD_INFO:
    raise ImportError(NOT_BUILT.format(" by this version of it"))


def _release(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13): torch's C++ interface changes between minor releases."""
    return tuple(map(int, version.split("+")[0].split(".")[:2]))


def _choose(releases: list[str], version: str) -> str:
    """Returns the release whose glue may fit this version of torch: the newest that is not newer than it."""
    fitting = [release for release in releases if _release(release) <= _release(version)]
    if not fitting:
        oldest = min(releases, key=_release)
        raise ImportError(
            f"torch {version} is older than {oldest}, the oldest that this fastclip was built for. "
            f"Install a newer torch: pip install -U torch. If you build fastclip, build it again: {BUILD_COMMAND}"
        )
    return max(fitting, key=_release)


def _file_of(release: str) -> Path:
    """Returns the file of the glue for this release of torch. Raises ImportError where there is none."""
    file = f"_C_{release.replace('.', '_')}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path = Path(__file__).with_name(file)
    if not path.exists():
        raise ImportError(NOT_BUILT.format(f" for this Python: there is no {path}"))
    return path


def _load(path: Path) -> Any:
    """Returns a glue as the module fastclip._C."""
    spec = importlib.util.spec_from_file_location(f"{__package__}._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_fitting(releases: list[str], version: str) -> tuple[Any, str]:
    """Returns the glue that fits this version of torch, and its release. Raises ImportError where none does."""
    release = _choose(releases, version)
    unfit = f"fastclip was built for torch {release}, and that does not fit torch {version}: "
    path = _file_of(release)
    try:
        glue = _load(path)
    except ImportError as error:
        raise ImportError(f"{unfit}{error}. {WAYS_OUT}") from error
    if found := first_misread(glue):
        raise ImportError(f"{unfit}it reads another {found} of a tensor than Python does. {WAYS_OUT}")
    newest = max(*map(_release, releases), _release(BUILD_INFO["newest_torch"]))
    if _release(version) > newest:
        warnings.warn(
            f"torch {version} is newer than fastclip knows. It reads tensors rightly, and goes on with what was built "
            f"for torch {release}. {WAYS_OUT}",
            stacklevel=4,  # whoever imports fastclip
        )
    return glue, release


_chosen: str
if TYPE_CHECKING:
    from . import _C
else:
    _C, _chosen = _load_fitting(list(BUILD_INFO["torches"]), torch.__version__)
    sys.modules[_C.__name__] = sys.modules[__package__]._C = _C


def build_info() -> dict[str, Any]:
    """Returns how fastclip was built, and what of it runs here.

    Returns:
        dict: ``torch`` (the version that the part in use was built against), ``torches`` (the versions of all parts),
        ``cuda`` (the toolkit's version, or None where the CUDA half was left out), ``cuda_architectures`` (a list such
        as ``["8.0", "9.0+PTX"]``), ``compiler``, and ``cpu_capability``: the instruction set that the CPU kernels use
        on this machine, ``"AVX512"``, ``"AVX2"`` or ``"baseline"``, on ARM ``"NEON"``.

    Example:
        >>> fastclip.build_info()["cpu_capability"] in ("AVX512", "AVX2", "baseline", "NEON")
        True
    """
    return {
        "torch": BUILD_INFO["torches"][_chosen],
        "torches": list(BUILD_INFO["torches"].values()),
        **{name: BUILD_INFO[name] for name in ("cuda", "cuda_architectures", "compiler")},
        "cpu_capability": _C.cpu_capability(),
    }
