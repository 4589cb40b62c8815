"""Puts fastclip's optimizers and clips in the place of torch's, for code that is not to be changed."""

import functools
import multiprocessing.spawn
import sys
import warnings
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

import torch

from . import counts, deferred
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip_grad import clip_grad_norm_, clip_grad_value_
from .eager import eager
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

CLIPS = ("own", "fused", "defer")
OPTIMIZERS = {
    cls.__name__: cls for cls in (SGD, Adam, AdamW, Adadelta, Adagrad, NAdam, RAdam, RMSprop)
}  # torch's names

# torch's own, whatever stands in their places now.
_clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
_clip_grad_value_ = torch.nn.utils.clip_grad_value_
_get_total_norm = torch.nn.utils.get_total_norm
_clip_grads_with_norm_ = torch.nn.utils.clip_grads_with_norm_
_zero_grad = torch.nn.Module.zero_grad
_init_optimizer = torch.optim.Optimizer.__init__
_all_reduce = torch.distributed.all_reduce if torch.distributed.is_available() else None
_get_preparation_data = multiprocessing.spawn.get_preparation_data

_patches: "list[patch]" = []  # those that hold, the last of which acts
_before: dict[tuple[Any, str], Any] = {}  # what the names meant before any


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
        self.clip = clip
        _warn_of_bound_names()
        self._apply()

    def __enter__(self) -> "patch":
        if self not in _patches:  # used again
            self._apply()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Puts back what was there before; a patch that came later, or before, goes on."""
        if self in _patches:
            _patches.remove(self)
            _refresh()

    def _apply(self):
        _patches.append(self)
        _refresh()


def _refresh():
    """Gives all names the meaning of the last patch that holds, or their own."""
    for (place, name), before in _before.items():
        setattr(place, name, before)
    if not _patches:
        return
    for (place, name), ours in _meanings(_patches[-1].clip):
        _before.setdefault((place, name), getattr(place, name))
        setattr(place, name, ours)


def _meanings(clip):
    """Returns ((module or class, name), what it is to mean)."""
    for name, ours in OPTIMIZERS.items():
        yield (torch.optim, name), ours
        yield (sys.modules[_torchs_class(ours).__module__], name), ours
    for name, function in _CLIPS_OF[clip].items():
        yield (torch.nn.utils, name), function
        if hasattr(torch.nn.utils.clip_grad, name):
            yield (torch.nn.utils.clip_grad, name), function
    yield (multiprocessing.spawn, "get_preparation_data"), _prepare_child
    if clip == "defer":  # who else may count on clipped gradients, or makes them anew
        yield (torch.optim.Optimizer, "__init__"), _see_optimizer
        yield (torch.nn.Module, "zero_grad"), _see_zero_grad
        if _all_reduce is not None:
            yield (torch.distributed, "all_reduce"), functools.wraps(_all_reduce)(_clip_and_reduce)


def _prepare_child(name):
    return {**_get_preparation_data(name), "fastclip": _PatchesChild(_patches[-1].clip)}


@functools.wraps(_init_optimizer)
def _see_optimizer(self, *positional, **named):
    _init_optimizer(self, *positional, **named)
    deferred.enlist_other(self)
    deferred.carry_out_earlier([param for group in self.param_groups for param in group["params"]])


@functools.wraps(_zero_grad)
def _see_zero_grad(self, set_to_none=True):
    deferred.forget_all(self.parameters())
    _zero_grad(self, set_to_none)


def _clip_and_reduce(*positional, **named):
    """Calls `all_reduce`, which changes tensors behind autograd's back, with all clips carried out first."""
    deferred.carry_out_all()
    return _all_reduce(*positional, **named)


def _torchs_class(ours):
    """Returns the class of torch.optim that a class of fastclip is made of."""
    return next(cls for cls in ours.__mro__ if cls.__module__.startswith("torch.optim."))


def _warn_of_bound_names():
    names = {id(_torchs_class(ours)) for ours in OPTIMIZERS.values()}
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


def _owner_of(parameters):
    """Returns a list of the parameters, the optimizer that a clip of theirs is deferred to, or None, and the
    gradients."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    deferred.carry_out_earlier(parameters)
    owner, gradients = deferred.owner_of(parameters)
    counts.clips_by_torch += owner is None and any(p.grad is not None for p in parameters)
    return parameters, owner, gradients


@eager
def _defer_norm(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    given, (parameters, owner, gradients) = parameters, _owner_of(parameters)
    if owner is None:
        return _clip_grad_norm_(parameters or given, max_norm, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        grads = [p.grad for p in parameters if p.grad is not None]
        total_norm = _get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
        deferred.defer_norm_clip(owner, gradients, max_norm, total_norm, patched=True)
    return total_norm


@eager
def _defer_with_norm(parameters, max_norm, total_norm, foreach=None):
    parameters, owner, gradients = _owner_of(parameters)
    if owner is None:
        return _clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    with torch.no_grad():
        return deferred.defer_norm_clip(owner, gradients, max_norm, total_norm, patched=True)


@eager
def _defer_value(parameters, clip_value, foreach=None):
    parameters, owner, gradients = _owner_of(parameters)
    clip_value = float(clip_value)
    if owner is None or not clip_value >= 0:  # torch takes any
        return _clip_grad_value_(parameters, clip_value, foreach)
    return deferred.defer(owner, deferred.Deferred(gradients, bounds=(-clip_value, clip_value), patched=True))


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
for _clips in _CLIPS_OF.values():
    for _name, _function in _clips.items():
        _function.__name__ = _function.__qualname__ = _name
        _function.__doc__ = getattr(torch.nn.utils, _name).__doc__
