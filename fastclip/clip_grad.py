"""torch.nn.utils.clip_grad_value_ and clip_grad_norm_ through the kernels, for trainers that clip by themselves."""

import functools
import math
from collections.abc import Iterable

import torch

from . import deferred
from ._extension import _C
from .deferred import Deferred
from .distributed import is_dtensor, local_shards, place_gradients, reduction_of, total_measure
from .eager import eager
from .plain.checks import check_clip
from .plain.limits import measures_of, scaling_of, sums_of
from .plain.measure import norm_of
from .plain.step import bounds, scaled, sums_of_all
from .reasons import named, negative, not_a_number


def _as_list(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _with_unique_grads(parameters):
    """Returns one parameter for each gradient: a gradient that is given twice counts once."""
    return list({id(p.grad): p for p in parameters if p.grad is not None}.values())


def _named(parameters):
    return [(p, named(i)) for i, p in enumerate(parameters)]


def _as_number(value, name):
    """Converts a threshold as torch's functions do: also from text, which YAML makes of 1e-3."""
    try:
        return float(value)
    except ValueError:
        raise ValueError(str(not_a_number(name, value))) from None
    except TypeError:
        raise not_a_number(name, value) from None


def _engine():
    return _C.Engine("clip_grad", reduction_of, total_measure)


def _in_kernels(clip, *arguments):
    """Clips in the kernels, and returns whether they could. First moves gradients to their parameters' placements."""
    not_covered = clip(*arguments)
    if not_covered is not None and not_covered.misplaced:
        place_gradients(not_covered.misplaced)
        not_covered = clip(*arguments)
        if not_covered is not None and not_covered.misplaced:
            raise TypeError(not_covered.reason)
    return not_covered is None


@eager
def clip_grad_value_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    clip_value: float | tuple[float, float],
    foreach: bool | None = None,
    *,
    defer: bool = False,
) -> None:
    """Clamps the gradients of `parameters` to [-clip_value, clip_value], in place.

    Equivalent to `torch.nn.utils.clip_grad_value_`, in one pass instead of two. Differences: all parameters may lack
    gradients, and `clip_value` may be a pair (low, high), but must not be negative.

    Args:
        parameters (Iterable[Tensor] or Tensor): of any shapes; those without a gradient are left out.
        clip_value (float or (float, float)): in the gradients' units.
        foreach (bool, optional): accepted, and not needed.
        defer (bool): leaves the gradients as they are, and lets the step of their optimizer clamp them, see
            `clip_grad_norm_`.

    Raises:
        ValueError, TypeError: a bad `clip_value`, or a gradient that cannot be clipped: sparse, complex, or an expanded
            one (RuntimeError, as in torch). No gradient was changed.

    Example:
        >>> fastclip.clip_grad_value_(model.parameters(), 0.01)
    """
    parameters = _as_list(parameters)
    if isinstance(clip_value, str):
        clip_value = _as_number(clip_value, "clip_value")
    deferred.carry_out_earlier(parameters)
    owner, gradients = deferred.owner_of(parameters) if defer else (None, None)
    if owner is not None:
        deferred.defer(owner, Deferred(gradients, bounds=bounds(clip_value)))
        return
    if _in_kernels(_engine().clip_grad_value_, parameters, clip_value):
        return
    with torch.no_grad(), local_shards(_named(parameters)) as (local, _):
        shards = [local[p] for p in parameters]
        check_clip("clip_value", shards)
        for p in _with_unique_grads(shards):
            p.grad.clamp_(*bounds(clip_value))


@eager
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    defer: bool = False,
) -> torch.Tensor:
    """Scales the gradients of `parameters` so that their total norm is at most `max_norm`, in place; returns the norm.

    Equivalent to `torch.nn.utils.clip_grad_norm_`. Differences: the norm is right to 1e-6 for every finite input. It
    lies on the parameters' device even without gradients, and never has a 16-bit type. A gradient that is given twice
    counts once. `max_norm` must not be negative or NaN.

    Args:
        parameters (Iterable[Tensor] or Tensor): of any shapes; those without a gradient are left out.
        max_norm (float): in the gradients' units; inf only measures.
        norm_type (float): 2 and inf run in the kernels, other norms in plain torch.
        error_if_nonfinite (bool): raise where the norm is NaN or infinite; this waits for the device.
        foreach (bool, optional): used where plain torch takes the norm.
        defer (bool): only measures, and lets the next step of the optimizer scale the gradients in its own pass. That
            has the same bits, but for gradients of 16 bits, which are not rounded in between. Clips at once where these
            are not all gradients of one optimizer of fastclip. Gradients that are computed anew (`zero_grad`) are not
            clipped by an earlier call. The optimizer's own clips come after this one.

    Returns:
        Tensor: the total norm before clipping, a scalar of the gradients' dtype, float32 at least.

    Raises:
        ValueError, TypeError: a bad `max_norm`, or a sparse gradient; RuntimeError: a non-finite norm, if asked for, or
            an expanded gradient. No gradient was changed. With `defer`, the step raises RuntimeError where a gradient
            was changed in between.

    Example:
        >>> grad_norm = fastclip.clip_grad_norm_(model.parameters(), 5.0)
    """
    parameters = _as_list(parameters)
    max_norm, norm_type = _as_number(max_norm, "max_norm"), _as_number(norm_type, "norm_type")
    if not max_norm >= 0:
        raise negative("max_norm", max_norm)
    deferred.carry_out_earlier(parameters)
    owner = deferred.owner_of(parameters)[0] if defer else None
    if error_if_nonfinite:
        measured = _clipped_norm(parameters, math.inf, norm_type, foreach)
        if measured is not None and not measured.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                f"`error_if_nonfinite=False`. The norm is {measured.item()}"
            )
    norm = _clipped_norm(parameters, max_norm if owner is None else math.inf, norm_type, foreach)
    if owner is not None:
        gradients = _C.Gradients(parameters)  # the measure has counted up their versions
        deferred.defer_norm_clip(owner, gradients, max_norm, norm)
    if norm is None:  # no parameters at all
        return torch.zeros(())
    dtypes = {p.grad.dtype for p in parameters if p.grad is not None}
    return norm.to(functools.reduce(torch.promote_types, (dtype.to_real() for dtype in dtypes), torch.float32))


def _clipped_norm(parameters, max_norm, norm_type, foreach):
    """Clips in the kernels, or in plain torch. Returns the norm before that: of float64 from the kernels, None without
    parameters."""
    engine = _engine()
    if norm_type in (2.0, math.inf) and _in_kernels(engine.clip_grad_norm_, parameters, max_norm, norm_type):
        return engine.total_norm()
    with torch.no_grad(), local_shards(_named(parameters)) as (local, reductions):
        check_clip("max_norm", [local[p] for p in parameters])
        clipped = _with_unique_grads([local[p] for p in parameters])
        grads = [p.grad for p in clipped]
        if norm_type in (2.0, math.inf):
            measure_among = functools.partial(
                sums_of, measures_of(dict(zip(clipped, grads, strict=True)), norm_type), None, None, norm_type
            )
            measure, _ = sums_of_all(measure_among, clipped, norm_type, None, reductions)
            norm = norm_of(measure, norm_type)
        else:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in _with_unique_grads(parameters)], norm_type, foreach=foreach
            )
            norm = norm.full_tensor() if is_dtensor(norm) else norm  # type: ignore[attr-defined]
            norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
        factors = scaling_of(norm, max_norm)
        for grad in grads:
            scaled(grad, factors, in_place=True)
    return norm
