"""Puts fastclip's optimizers and clips in the place of torch's, for code that is not to be changed."""

import importlib
import multiprocessing.spawn
import sys
import warnings
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

import torch

from . import counts, deferred
from .clip_grad import clip_grad_norm_, clip_grad_value_
from .eager import eager

CLIPS = ("own", "fused", "defer")
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "NAdam", "RAdam", "RMSprop")

# torch's own, whatever stands in their places now.
_clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
_clip_grad_value_ = torch.nn.utils.clip_grad_value_
_get_total_norm = torch.nn.utils.get_total_norm
_clip_grads_with_norm_ = torch.nn.utils.clip_grads_with_norm_
_get_preparation_data = multiprocessing.spawn.get_preparation_data


class patch:
    """Makes `torch.optim.SGD`, `Adam`, `AdamW` and others fastclip's, and torch's clips with them.

    From the call on, or for the time of a `with` block::

        fastclip.patch()
        from toolkit import train  # later: it binds the names when it is imported
        train()

    Processes that `multiprocessing` spawns are patched, too. `python -m fastclip.run -m toolkit.train` does the same
    for a program that is not to be changed, and counts.

    Args:
        clip (str): what `torch.nn.utils.clip_grad_norm_`, `clip_grad_value_` and `clip_grads_with_norm_` do. With
            "defer" they measure as torch does, and the step of the optimizer that has these parameters clips in its own
            pass over them. In float32 and float64 that has torch's bits. Where the gradients are not all those of one
            optimizer, torch clips at once. With "fused" the first two are fastclip's. "own": they stay torch's.

    Raises:
        ValueError: another `clip`.

    Warns:
        UserWarning: modules that are imported already have bound torch's names, and keep them.

    Example:
        >>> with fastclip.patch(clip="defer"):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # is a fastclip.SGD
        ...     model(x).sum().backward()
        ...     norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # only measures
        ...     optimizer.step()
    """

    def __init__(self, clip: str = "defer") -> None:
        if clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
        self._clip = clip
        self._replaced: list[tuple[Any, str, Any]] = []
        _warn_of_bound_names()
        self._apply()

    def __enter__(self) -> "patch":
        if not self._replaced:  # used again
            self._apply()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Puts back what was there before."""
        while self._replaced:
            module, name, before = self._replaced.pop()
            setattr(module, name, before)

    def _apply(self):
        fastclip = importlib.import_module("fastclip")  # which imports this module
        for name in OPTIMIZERS:
            ours = getattr(fastclip, name)
            for module in (torch.optim, sys.modules[_torchs_class(ours).__module__]):
                self._replace(module, name, ours)
        for name, ours in _CLIPS_OF[self._clip].items():
            self._replace(torch.nn.utils, name, ours)
            if hasattr(torch.nn.utils.clip_grad, name):
                self._replace(torch.nn.utils.clip_grad, name, ours)
        before = multiprocessing.spawn.get_preparation_data

        def get_preparation_data(name):
            return {**before(name), "fastclip": _PatchesChild(self._clip)}

        self._replace(multiprocessing.spawn, "get_preparation_data", get_preparation_data)

    def _replace(self, module, name, ours):
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, ours)


def _torchs_class(ours):
    """Returns the class of torch.optim that a class of fastclip is made of."""
    return next(cls for cls in ours.__mro__ if cls.__module__.startswith("torch.optim."))


def _warn_of_bound_names():
    fastclip = importlib.import_module("fastclip")
    names = {id(_torchs_class(getattr(fastclip, name))) for name in OPTIMIZERS}
    names |= {id(_clip_grad_norm_), id(_clip_grad_value_), id(_clip_grads_with_norm_)}
    late = sorted(
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in ("torch", "fastclip") and isinstance(getattr(module, "__dict__", None), dict)
        if any(id(value) in names for value in list(module.__dict__.values()))
    )
    if late:
        warnings.warn(
            f"fastclip.patch came too late for {', '.join(late[:5])}{', ...' if late[5:] else ''}: they have imported "
            "torch's optimizers or clips by name, and keep them. Patch first, or run `python -m fastclip.run`",
            stacklevel=4,
        )


class _PatchesChild:
    """Is nothing but what its unpickling does: a spawned process does that before it imports the main module."""

    def __init__(self, clip):
        self.code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from fastclip.patching import patch_child; patch_child({clip!r}, {counts.are_reported!r})"
        )

    def __reduce__(self):
        return exec, (self.code,)


def patch_child(clip: str, reports: bool) -> None:
    """Patches a spawned process for all its time."""
    patch(clip)
    if reports:
        counts.are_reported = True
        Finalize(None, counts.report, exitpriority=0)  # such a process runs no atexit


@eager
@torch.no_grad()
def _defer_norm(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    deferred.carry_out_earlier(parameters)
    owner, gradients = deferred.owner_of(parameters)
    if owner is None:
        counts.clips_by_torch += 1
        return _clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    grads = [p.grad for p in parameters if p.grad is not None]
    total_norm = _get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    deferred.defer_norm_clip(owner, gradients, max_norm, total_norm)
    return total_norm


@eager
@torch.no_grad()
def _defer_with_norm(parameters, max_norm, total_norm, foreach=None):
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    deferred.carry_out_earlier(parameters)
    owner, gradients = deferred.owner_of(parameters)
    if owner is None:
        counts.clips_by_torch += 1
        return _clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return deferred.defer_norm_clip(owner, gradients, max_norm, total_norm)


@eager
@torch.no_grad()
def _defer_value(parameters, clip_value, foreach=None):
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    deferred.carry_out_earlier(parameters)
    owner, gradients = deferred.owner_of(parameters)
    if owner is None:
        counts.clips_by_torch += 1
        return _clip_grad_value_(parameters, clip_value, foreach)
    clip_value = float(clip_value)
    return deferred.defer(owner, deferred.Deferred(gradients, bounds=(-clip_value, clip_value)))


@eager
def _fuse_norm(*positional, **named):
    counts.clips_at_once += 1
    return clip_grad_norm_(*positional, **named)


@eager
def _fuse_value(*positional, **named):
    counts.clips_at_once += 1
    return clip_grad_value_(*positional, **named)


_CLIPS_OF: dict[str, dict[str, Callable[..., Any]]] = {
    "own": {},
    "fused": {"clip_grad_norm_": _fuse_norm, "clip_grad_value_": _fuse_value},
    "defer": {
        "clip_grad_norm_": _defer_norm,
        "clip_grad_value_": _defer_value,
        "clip_grads_with_norm_": _defer_with_norm,
    },
}
