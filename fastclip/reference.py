"""The same step in plain torch: the specification, the oracle of the tests, and the way a step goes where the kernels
do not cover a tensor. Read this to know what fastclip computes."""

import math

import torch
from torch.optim.sgd import sgd

from .checks import check

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def total_norm(grads, norm_type=2.0):
    """The norm of all `grads` taken together, as a float64 scalar on the first one's device.

    Unlike `torch.nn.utils.get_total_norm` it is right for every finite input: gradients of 1e20 do not overflow, those
    of 1e-25 do not vanish, and a million of them do not lose the sixth digit.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    device = grads[0].device
    flat = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads if g.numel() > 0]
    if not flat:
        return torch.zeros((), dtype=torch.float64, device=device)
    if norm_type == math.inf:
        magnitudes = [g.abs().amax() for g in grads if g.numel() > 0]
        return torch.stack([m.double().to(device) for m in magnitudes]).amax()
    largest = torch.stack([g.abs().amax().double().to(device) for g in flat]).amax()
    ordinary = largest.isfinite() & (largest > 0)
    scale = torch.where(ordinary, largest, 1.0)
    squares = [(g.double() / scale.to(g.device)).square().sum().to(device) for g in flat]
    return torch.where(ordinary, scale * torch.stack(squares).sum().sqrt(), largest)


def clip_coefficient(norm, max_norm):
    """What `clip_grad_norm_` multiplies by; `max_norm=inf` asks for the norm only."""
    if max_norm == math.inf:
        return torch.ones_like(norm)
    return torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)  # number / tensor rounds twice


@torch.no_grad()
def scale_(grads, coefficient):
    """Multiplies gradients in place by a scalar tensor."""
    for grad in grads:
        grad.mul_(coefficient.to(grad.device, grad.real.dtype))


def bounds(clip_value):
    """(low, high) of a value clip given as a number or as a pair."""
    return tuple(clip_value) if isinstance(clip_value, (tuple, list)) else (-clip_value, clip_value)


def clipped(grad, clip_value=None, inverse_scale=None, dtype=None):
    """`grad` unscaled and value-clipped, in the type it is computed in; `grad` itself is left alone."""
    limits = None
    if clip_value is not None:  # clamp_ rounds its bounds to the gradient's dtype
        exact = torch.tensor(bounds(clip_value), dtype=torch.float64, device="cpu")
        limits = exact.to(grad.dtype).double().tolist()
    if dtype is not None:
        grad = grad.to(dtype)
    if inverse_scale is not None:
        grad = grad * inverse_scale.to(grad.device)
    if limits is not None:
        grad = grad.clamp(*limits)
    return grad


def values_of(grad):
    """The values that a gradient holds: of a sparse one, those it stores."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def compute_dtype(param):
    """16-bit parameters are computed in float32 and rounded once, when they are stored."""
    return torch.float32 if param.dtype in SIXTEEN_BIT else param.dtype


@torch.no_grad()
def step_sgd(groups, state, grad_scale=None, found_inf=None):
    """One step of `fastclip.SGD` over `groups` (a list of dicts) with `state` (a dict of dicts by parameter).

    Returns the norm before the norm clip, or None if no `max_norm` is set, and whether the step was skipped. Order:
    unscale, value clip, norm clip, then `torch.optim.SGD`, whose own code does the update.
    """
    check(groups, state)
    wants_norm = groups[0]["max_norm"] is not None
    if found_inf is not None and found_inf.item() != 0:
        return (torch.tensor(math.inf, dtype=torch.float64) if wants_norm else None), True
    raw = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if groups[0]["skip_nonfinite"] and not all(values_of(g).isfinite().all() for g in raw):
        return (total_norm(raw, float(groups[0]["norm_type"])) if wants_norm else None), True
    inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal().float()
    with torch.set_grad_enabled(any(group["differentiable"] for group in groups)):
        grads = [
            [
                clipped(p.grad, group["clip_value"], inverse_scale, compute_dtype(p))
                for p in group["params"]
                if p.grad is not None
            ]
            for group in groups
        ]
        norm = None
        if wants_norm:
            norm = total_norm([g for of_group in grads for g in of_group], float(groups[0]["norm_type"]))
            coefficient = clip_coefficient(norm, groups[0]["max_norm"])
            grads = [[g * coefficient.to(g.device, g.real.dtype) for g in of_group] for of_group in grads]
        for group, of_group in zip(groups, grads, strict=True):
            update_sgd(group, of_group, state)
    if norm is None and wants_norm:
        norm = torch.zeros((), dtype=torch.float64)
    return norm, False


def update_sgd(group, grads, state):
    """`torch.optim.SGD`'s update of one group by the given gradients."""
    params = [p for p in group["params"] if p.grad is not None]
    buffers = [state[p].get("momentum_buffer") if group["momentum"] != 0 else None for p in params]
    if isinstance(group["weight_decay"], torch.Tensor) and group["weight_decay"].requires_grad:
        grads = [g.clone() for g in grads]  # torch then adds the decay in place
    wide = [p.to(compute_dtype(p)) for p in params]  # the parameter itself, but for 16-bit ones
    # One that is wider than the parameter keeps its precision, as in torch.
    wide_buffers = [b.float() if b is not None and b.dtype in SIXTEEN_BIT else b for b in buffers]
    sgd(
        wide,
        grads,
        wide_buffers,
        has_sparse_grad=any(g.is_sparse for g in grads),
        foreach=False,
        fused=False,
        **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
    )
    for p, w, b, wb in zip(params, wide, buffers, wide_buffers, strict=True):
        if w is not p:
            p.copy_(w)
        if group["momentum"] == 0:
            continue
        if b is None:  # of the type that torch's has where `p.grad_dtype` allows another one than the parameter's
            dtype = torch.promote_types(p.grad.dtype, p.dtype) if group["weight_decay"] != 0 else p.grad.dtype
            state[p]["momentum_buffer"] = wb.to(dtype)
        elif wb is not b:
            b.copy_(wb)
