"""The same step in plain torch: the specification, the oracle of the tests, and the way a step goes where the kernels
do not cover a tensor. Read this to know what fastclip computes."""

import math

import torch
from torch.optim.adam import adam
from torch.optim.optimizer import _get_scalar_dtype
from torch.optim.sgd import sgd

from .checks import check
from .clip_stats import ClipStats, values_of

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


def clips_value(group):
    """Whether the value clip of a group bounds anything."""
    return group["clip_value"] is not None and any(math.isfinite(bound) for bound in bounds(group["clip_value"]))


def unscaled(grad, inverse_scale, dtype):
    """`grad` in the type it is computed in, divided by the scale of AMP; `grad` itself is left alone."""
    grad = grad.to(dtype) if grad.dtype in SIXTEEN_BIT else grad
    return grad if inverse_scale is None else grad * inverse_scale.to(grad.device)


def clamped(grad, clip_value, dtype):
    """`grad` clamped to bounds that are rounded to `dtype`, as clamp_ does, and how many elements that moved."""
    low, high = torch.tensor(bounds(clip_value), dtype=torch.float64, device="cpu").to(dtype).double().tolist()
    return grad.clamp(low, high), ((grad < low) | (grad > high)).detach().sum()


def compute_dtype(param):
    """16-bit parameters are computed in float32 and rounded once, when they are stored."""
    return torch.float32 if param.dtype in SIXTEEN_BIT else param.dtype


def step_sgd(groups, state, grad_scale=None, found_inf=None):
    """One step of `fastclip.SGD` over `groups` (a list of dicts) with `state` (a dict of dicts by parameter).

    Returns ClipStats, whose `skipped_steps` counts this step only. Order: unscale, value clip, norm clip, then
    `torch.optim.SGD`, whose own code does the update.
    """
    return step(update_sgd, groups, state, grad_scale, found_inf)


def step_adam(groups, state, grad_scale=None, found_inf=None):
    """One step of `fastclip.Adam` or `fastclip.AdamW`, as `step_sgd`; `torch.optim.Adam`'s own code does the update."""
    return step(update_adam, groups, state, grad_scale, found_inf)


@torch.no_grad()
def step(update, groups, state, grad_scale, found_inf):
    """What the optimizers have in common: clips, then calls update(group, clipped gradients, state) for each group."""
    check(groups, state)
    raw = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if found_inf is not None and found_inf.item() != 0:
        return stats_of(groups, torch.tensor(math.inf, dtype=torch.float64), skipped=True)
    if groups[0]["skip_nonfinite"] and not all(values_of(g).isfinite().all() for g in raw):
        return stats_of(groups, norm_of(groups, raw), skipped=True)
    inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal().float()
    moved, looked_at = 0, 0
    with torch.set_grad_enabled(any(group["differentiable"] for group in groups)):
        grads = []
        for group in groups:
            of_group = [
                unscaled(p.grad, inverse_scale, compute_dtype(p)) for p in group["params"] if p.grad is not None
            ]
            if clips_value(group):
                dtypes = [p.grad.dtype for p in group["params"] if p.grad is not None]
                pairs = [clamped(g, group["clip_value"], dtype) for g, dtype in zip(of_group, dtypes, strict=True)]
                of_group = [grad for grad, _ in pairs]
                moved = sum((count.to(pairs[0][1].device) for _, count in pairs), start=moved)
                looked_at += sum(g.numel() for g in of_group)
            grads.append(of_group)
        norm = norm_of(groups, [g for of_group in grads for g in of_group])
        if norm is not None:
            coefficient = clip_coefficient(norm, groups[0]["max_norm"])
            grads = [[g * coefficient.to(g.device, g.real.dtype) for g in of_group] for of_group in grads]
        for group, of_group in zip(groups, grads, strict=True):
            update(group, of_group, state)
    return stats_of(groups, norm, moved, looked_at)


def norm_of(groups, grads):
    """What the norm clip of `groups` measures, or None if there is none."""
    return None if groups[0]["max_norm"] is None else total_norm(grads, float(groups[0]["norm_type"]))


def stats_of(groups, norm, moved=0, looked_at=0, skipped=False):
    """ClipStats of a step in which the value clip moved so many of the elements that it looked at."""
    max_norm = groups[0]["max_norm"]
    device = next((p.device for group in groups for p in group["params"]), None)
    fraction = None
    if any(map(clips_value, groups)):
        fraction = torch.as_tensor(moved, dtype=torch.float64, device=device) / max(looked_at, 1)
    return ClipStats(
        total_norm=None if max_norm is None else norm.detach(),
        clip_coefficient=None if max_norm is None else clip_coefficient(norm.detach(), max_norm),
        clamped_fraction=fraction,
        skipped=torch.tensor(skipped, device=device),
        skipped_steps=torch.tensor(int(skipped), device=device),
    )


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


STATES_OF_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # the last with amsgrad only


def update_adam(group, grads, state):
    """`torch.optim.Adam`'s update of one group by the given gradients; AdamW's, with `decoupled_weight_decay`."""
    params = [p for p in group["params"] if p.grad is not None]
    names = STATES_OF_ADAM if group["amsgrad"] else STATES_OF_ADAM[:2]
    for p in params:
        if not state[p]:
            state[p]["step"] = torch.zeros((), dtype=_get_scalar_dtype(), device=p.device)
            state[p].update({name: torch.zeros_like(p) for name in names})
    kept = {name: [state[p][name] for p in params] for name in names}
    wide = [p.to(compute_dtype(p)) for p in params]  # the parameter itself, but for 16-bit ones
    grads = [g.to(w.dtype) for g, w in zip(grads, wide, strict=True)]  # `p.grad_dtype` allows others
    wide_kept = {name: [t.float() if t.dtype in SIXTEEN_BIT else t for t in kept[name]] for name in names}
    adam(
        wide,
        grads,
        *(wide_kept.get(name, []) for name in STATES_OF_ADAM),
        [state[p]["step"] for p in params],
        foreach=False,
        fused=False,
        capturable=False,
        has_complex=any(p.is_complex() for p in params),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        **{
            key: group[key]
            for key in (
                "amsgrad",
                "lr",
                "weight_decay",
                "eps",
                "maximize",
                "differentiable",
                "decoupled_weight_decay",
            )
        },
    )
    for narrow, computed in [(params, wide), *((kept[name], wide_kept[name]) for name in names)]:
        for to, value in zip(narrow, computed, strict=True):
            if value is not to:
                to.copy_(value)
