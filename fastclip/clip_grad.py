"""torch.nn.utils.clip_grad_value_ and clip_grad_norm_ through the kernels, for trainers that clip by themselves."""

import functools
import math

import torch

from . import reference
from ._extension import _C
from .checks import check_clip
from .measure import total_norm


def _as_list(parameters):
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _unique_grads(parameters):
    """Each gradient once, also of a parameter that is given twice."""
    return list({id(p.grad): p.grad for p in parameters if p.grad is not None}.values())


def clip_grad_value_(parameters, clip_value, foreach=None):
    """Clamps the gradients of `parameters` to [-clip_value, clip_value], in place.

    Equivalent to `torch.nn.utils.clip_grad_value_`, in one pass instead of two. Differs: parameters without gradients
    are fine, `clip_value` may be a pair (low, high), and a negative one is refused.

    Args:
        parameters (Iterable[Tensor] or Tensor): of any shapes; those without a gradient are left out.
        clip_value (float or (float, float)): in the gradients' units.
        foreach (bool, optional): accepted, and not needed.

    Raises:
        ValueError, TypeError: a bad `clip_value`, or a gradient that can't be clipped: sparse, complex, or an expanded
            one (RuntimeError, as in torch). No gradient was changed.

    Example:
        >>> fastclip.clip_grad_value_(model.parameters(), 0.01)
    """
    parameters = _as_list(parameters)
    if _C.Plan().clip_grad_value_(parameters, clip_value) is not None:
        check_clip("clip_value", parameters)
        with torch.no_grad():
            for grad in _unique_grads(parameters):
                grad.clamp_(*reference.bounds(clip_value))


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    """Scales the gradients of `parameters` so that their total norm is at most `max_norm`, in place; returns the norm.

    Equivalent to `torch.nn.utils.clip_grad_norm_`. Differs: the norm is right to 1e-6 for every finite input, on the
    parameters' device also where there are no gradients, and never in a 16-bit type; a gradient that is given twice
    counts once; a negative or NaN `max_norm` is refused.

    Args:
        parameters (Iterable[Tensor] or Tensor): of any shapes; those without a gradient are left out.
        max_norm (float): in the gradients' units; inf only measures.
        norm_type (float): 2 and inf run in the kernels, other norms in plain torch.
        error_if_nonfinite (bool): raise where the norm is NaN or infinite; this waits for the device.
        foreach (bool, optional): used where plain torch takes the norm.

    Returns:
        Tensor: the total norm before clipping, a scalar of the gradients' dtype, float32 at least.

    Raises:
        ValueError, TypeError: a bad `max_norm`, or a sparse gradient; RuntimeError: a non-finite norm, if asked for, or
            an expanded gradient. No gradient was changed.

    Example:
        >>> grad_norm = fastclip.clip_grad_norm_(model.parameters(), 5.0)
    """
    parameters = _as_list(parameters)
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must not be negative or NaN, got {max_norm}")
    if error_if_nonfinite:
        norm = clip_grad_norm_(parameters, math.inf, norm_type)
        if not norm.isfinite():
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {norm.item()}")
    grads = _unique_grads(parameters)
    plan = _C.Plan()
    if norm_type in (2.0, math.inf) and plan.clip_grad_norm_(parameters, max_norm, norm_type) is None:
        norm = plan.total_norm()
    else:
        check_clip("max_norm", parameters)
        with torch.no_grad():
            if norm_type in (2.0, math.inf):
                norm = total_norm(grads, norm_type)
            else:
                norm = torch.nn.utils.get_total_norm(grads, norm_type, foreach=foreach)
            reference.scale_(grads, reference.clip_coefficient(norm, max_norm))
    if norm is None:  # not one parameter
        return torch.zeros(())
    return norm.to(functools.reduce(torch.promote_types, (g.real.dtype for g in grads), torch.float32))
