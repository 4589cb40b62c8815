"""Clips that are deferred to the optimizer's step, which carries them out in its own pass over the gradients."""

import math
import warnings
import weakref
from collections.abc import Iterable

import torch

from . import counts
from ._extension import _C
from .distributed import is_dtensor, local_of
from .reasons import changed_since, name_of
from .settings import LIMITS

_optimizers: "weakref.WeakSet" = weakref.WeakSet()


def enlist(optimizer):
    """Makes an optimizer one that clips can be deferred to."""
    _optimizers.add(optimizer)


class Deferred:
    """A clip of gradients, to be carried out later. It is of these tensors with these values: of gradients that replace
    them all it says nothing, and it is an error to change them."""

    def __init__(self, gradients, factor=None, bounds=None):
        self._gradients = gradients  # a _C.Gradients
        self._factor = factor  # a scalar tensor: that of a norm clip
        self._bounds = bounds  # (low, high): those of a value clip
        self.carried_out = False  # by a step; another step on the same gradients does so again

    def in_step(self, groups):
        """Returns what a step needs: the groups, within the bounds, and the factor. RuntimeError: see `is_due`."""
        if not self.is_due(groups):
            return groups, None
        if self._bounds is None:
            return groups, self._factor
        return [{**group, "clip_value": self._within(group["clip_value"])} for group in groups], None

    def _within(self, clip_value):
        """Returns the bounds of two clamps, first the deferred one: they need not overlap."""
        low, high = _C.clip_bounds(clip_value, torch.float64)
        return tuple(min(max(bound, low), high) for bound in self._bounds)

    def is_due(self, groups):
        """Returns whether the gradients are still there.

        Raises:
            RuntimeError: one was changed, or exchanged while others stayed, and no step had come before that.
        """
        change = self._gradients.changed_in(groups)
        if change and not self.carried_out:
            group, index = change
            raise changed_since(name_of(groups[group], group, index))
        return change == ()

    @torch.no_grad()
    def carry_out(self, groups):
        """Clips the gradients in place, as torch does. RuntimeError: see `is_due`."""
        if not self.is_due(groups):
            return
        for grad in (local_of(p.grad) for group in groups for p in group["params"] if p.grad is not None):
            if self._bounds is None:
                grad.mul_(self._factor.to(grad.device, torch.promote_types(grad.real.dtype, torch.float32)))
            else:
                grad.clamp_(*self._bounds)


def owner_of(parameters):
    """Returns the optimizer whose parameters with a gradient are exactly these with one, or None; and the gradients."""
    gradients = _C.Gradients(parameters)
    for optimizer in list(_optimizers):
        if optimizer._in_backward is None and gradients.are_those_of(optimizer.__dict__["param_groups"]):
            return optimizer, gradients
    return None, gradients


def defer(optimizer, clip):
    """Lets the next step of an optimizer carry out a clip. Warns, once, if the optimizer clips by itself, too."""
    counts.clips_deferred += 1
    optimizer._deferred = clip
    own = [name for name in ("clip_value", *LIMITS) if any(group.get(name) for group in optimizer.param_groups)]
    if own and "two clips" not in optimizer._warned:
        optimizer._warned.add("two clips")
        warnings.warn(
            f"two clips act on these gradients, one after the other: a clip_grad function, and {own[0]} of the "
            "optimizer. Leave one of them out",
            stacklevel=4,
        )


def defer_norm_clip(optimizer, gradients, max_norm, total_norm):
    """As `torch.nn.utils.clip_grads_with_norm_`, in the next step, with its coefficient. inf only measures."""
    if max_norm == math.inf:
        counts.clips_deferred += 1
        return
    coefficient = (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0)
    if is_dtensor(coefficient):
        coefficient = coefficient.full_tensor()
    defer(optimizer, Deferred(gradients, factor=coefficient))


def carry_out_earlier(parameters: Iterable[torch.Tensor]) -> None:
    """Carries out the clips of these gradients that are still deferred: another one follows, and counts on them."""
    for optimizer in list(_optimizers):
        deferred = optimizer._deferred
        if deferred is None:
            continue
        groups = optimizer.__dict__["param_groups"]
        clipped = {id(p) for group in groups for p in group["params"]}
        if any(id(p) in clipped for p in parameters):
            deferred.carry_out(groups)
            optimizer._deferred = None
