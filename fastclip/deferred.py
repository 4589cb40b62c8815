"""Clips that are deferred to the optimizer's step, which carries them out in its own pass over the gradients."""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import counts
from ._extension import _C
from .distributed import is_dtensor, local_of
from .reasons import changed_since, name_of
from .settings import LIMITS

_DROPS = 3  # clips in a row that no step has carried out: said once


class Living:
    """Objects for as long as they live. Another thread may add one while they are gone through, as with no WeakSet."""

    def __init__(self) -> None:
        self._found: dict[int, weakref.ref[Any]] = {}

    def add(self, one: Any) -> None:
        key = id(one)
        self._found[key] = weakref.ref(one, lambda _: self._found.pop(key, None))

    def discard(self, one: Any) -> None:
        self._found.pop(id(one), None)

    def __iter__(self) -> Iterator[Any]:
        return iter([one for one in [ref() for ref in list(self._found.values())] if one is not None])

    def __contains__(self, one: Any) -> bool:
        return id(one) in self._found


_ours = Living()  # the optimizers of fastclip
_others = Living()  # those that a patch has seen being made
_pending = Living()  # those of ours with a deferred clip: to go through all would keep those alive that others drop


def enlist(optimizer):
    """Makes an optimizer of fastclip one that clips can be deferred to."""
    _ours.add(optimizer)


def enlist_other(optimizer):
    """Notes any other optimizer, which may have the same parameters."""
    if optimizer not in _ours:
        _others.add(optimizer)


class Deferred:
    """A clip of gradients, to be carried out later. It is of these tensors with these values: of gradients that replace
    them all it says nothing, and it is an error to change them.

    Args:
        gradients (_C.Gradients): which tensors.
        factor (Tensor): a scalar, that of a norm clip; or
        bounds ((float, float)): those of a value clip.
        patched (bool): by a patch, which sees the model's `zero_grad`: gradients that are replaced without it, before
            any step, are an error, too.
    """

    def __init__(self, gradients, factor=None, bounds=None, patched=False):
        self._gradients, self._factor, self._bounds, self._patched = gradients, factor, bounds, patched
        self.carried_out = False  # by a step; another step on the same gradients does so again

    def in_step(self, groups):
        """Returns what a step needs: the groups, within the bounds, and the factor. RuntimeError: see `_state`."""
        here, joined = self._state(groups)
        if here and joined:
            self._clip(groups)  # these only
        if not here or joined:
            return groups, None
        if self._bounds is None:
            return groups, self._factor
        return [{**group, "clip_value": self._within(group.get("clip_value"))} for group in groups], None

    def carry_out(self, groups):
        """Clips the gradients in place, as torch does. RuntimeError: see `_state`."""
        if self._state(groups)[0]:
            self._clip(groups)

    def is_of_any(self, parameters):
        return any(map(self._gradients.has, parameters))

    def _within(self, clip_value):
        """Returns the bounds of two clamps, first the deferred one: they need not overlap."""
        low, high = _C.clip_bounds(clip_value, torch.float64)
        return tuple(min(max(bound, low), high) for bound in self._bounds)

    def _state(self, groups):
        """Returns whether the gradients are still there, and whether others have come besides.

        Raises:
            RuntimeError: one was changed, or replaced while others stayed, and no step had come before that.
        """
        change = self._gradients.changed_in(groups)
        if change is None:
            if self._patched and not self.carried_out and any(p.grad is not None for g in groups for p in g["params"]):
                raise changed_since(name_of(groups[0], 0, 0))
            return False, False
        joined, group, index = change
        if group >= 0 and not self.carried_out:
            raise changed_since(name_of(groups[group], group, index))
        return group < 0, joined

    @torch.no_grad()
    def _clip(self, groups):
        params = [p for group in groups for p in group["params"] if self._gradients.has(p)]
        for grad in (local_of(p.grad) for p in params):
            if self._bounds is None:
                grad.mul_(self._factor.to(grad.device, torch.promote_types(grad.real.dtype, torch.float32)))
            else:
                grad.clamp_(*self._bounds)


def owner_of(parameters):
    """Returns the optimizer that a clip of these gradients can be deferred to, or None; and the gradients.

    Its parameters with a gradient are exactly these, no other optimizer has any of them, and its step is fastclip's.
    """
    gradients = _C.Gradients(parameters)
    first = next((p for p in parameters if p.grad is not None), None)
    owners = [optimizer for optimizer in [*_ours, *_others] if _has(optimizer, first)]
    if len(owners) != 1 or not getattr(owners[0], "_takes_clips", False):
        return None, gradients
    groups = owners[0].__dict__["param_groups"]
    return (owners[0] if gradients.are_those_of(groups) else None), gradients


def _has(optimizer, param):
    return any(p is param for group in optimizer.__dict__.get("param_groups", ()) for p in group["params"])


def defer(optimizer, clip):
    """Lets the next step of an optimizer carry out a clip. Warns, once each, if the optimizer clips by itself, too, or
    if clips are deferred again and again and no step comes."""
    counts.clips_deferred += 1
    forget(optimizer)
    optimizer._deferred = clip
    _pending.add(optimizer)
    own = [name for name in ("clip_value", *LIMITS) if any(group.get(name) for group in optimizer.param_groups)]
    if own and "two clips" not in optimizer._warned:
        optimizer._warned.add("two clips")
        warnings.warn(
            f"two clips act on these gradients, one after the other: a clip_grad function, and {own[0]} of the "
            "optimizer. Leave one of them out",
            stacklevel=4,
        )


def defer_norm_clip(optimizer, gradients, max_norm, total_norm, patched=False):
    """As `torch.nn.utils.clip_grads_with_norm_`, in the next step, with its coefficient. inf only measures."""
    if max_norm == math.inf:
        counts.clips_deferred += 1
        return
    coefficient = (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0)
    if is_dtensor(coefficient):
        coefficient = coefficient.full_tensor()
    defer(optimizer, Deferred(gradients, factor=coefficient, patched=patched))


def forget(optimizer):
    """Drops a clip that no step has carried out, as after a norm that is not finite."""
    clip = optimizer._deferred
    if clip is None:
        return
    _drop(optimizer)
    optimizer._drops = 0 if clip.carried_out else optimizer._drops + 1
    if optimizer._drops == _DROPS and "drops" not in optimizer._warned:
        optimizer._warned.add("drops")
        warnings.warn(
            f"{_DROPS} deferred clips in a row met no step of their optimizer. Whatever else reads those gradients "
            "sees them unclipped: there, run with --clip fused",
            stacklevel=5,
        )


def _drop(optimizer):
    optimizer._deferred = None
    _pending.discard(optimizer)


def forget_all(parameters):
    """Drops the clips of gradients that are about to be made anew."""
    pending = [*_pending]
    parameters = list(parameters) if pending else []
    for optimizer in pending:
        if optimizer._deferred is not None and optimizer._deferred.is_of_any(parameters):
            forget(optimizer)


def carry_out_earlier(parameters: Iterable[torch.Tensor]) -> None:
    """Carries out the clips of these gradients that are still deferred: somebody else counts on them."""
    _carry_out(lambda clip: clip.is_of_any(parameters))


def carry_out_all() -> None:
    """Carries out all clips that are still deferred, and that no step has carried out."""
    _carry_out(lambda clip: not clip.carried_out)


def _carry_out(is_meant):
    for optimizer in _pending:
        clip = optimizer._deferred
        if clip is not None and is_meant(clip):
            clip.carry_out(optimizer.__dict__["param_groups"])
            _drop(optimizer)
