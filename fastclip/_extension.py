"""Loads the compiled half. Where it cannot be loaded, says how to build it."""

from typing import Any

import torch

# Without pip's cache, which keeps what was built from a URL for another torch.
BUILD_COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir ."

try:
    from ._build_info import BUILD_INFO
except ImportError as error:
    raise ImportError(
        "fastclip's extension is not built. In a clone of fastclip: python setup.py build_ext --inplace, "
        f"or {BUILD_COMMAND}"
    ) from error


def _release(version):
    """'2.13.0+cpu' -> '2.13', the part that must agree: torch's C++ interface changes between minor releases."""
    return ".".join(version.split("+")[0].split(".")[:2])


if _release(torch.__version__) != _release(BUILD_INFO["torch"]):
    raise ImportError(
        f"fastclip was built for torch {BUILD_INFO['torch']}, but this is torch {torch.__version__}. "
        f"Build it again, in a clone or with git+URL in place of the dot: {BUILD_COMMAND}, "
        "with uv: uv pip install --reinstall-package fastclip --no-cache ."
    )

from . import _C  # noqa: E402  after the check: its message says more than an undefined symbol


def build_info() -> dict[str, Any]:
    """Returns how fastclip was built, and the instruction set that it uses here.

    Returns:
        dict: ``torch`` (the version built against), ``cuda`` (the toolkit's version, or None where the CUDA half was
        left out), ``cuda_architectures`` (a list such as ``["8.0", "9.0+PTX"]``), ``compiler``, and ``cpu_capability``:
        the instruction set that the CPU kernels use on this machine, ``"AVX512"``, ``"AVX2"`` or ``"baseline"``, on ARM
        ``"NEON"``.

    Example:
        >>> fastclip.build_info()["cpu_capability"] in ("AVX512", "AVX2", "baseline", "NEON")
        True
    """
    return {**BUILD_INFO, "cpu_capability": _C.cpu_capability()}
