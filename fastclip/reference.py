"""The same step in plain torch: the specification, the oracle of the tests, and the way a step goes where the kernels
do not cover a tensor. Read this to know what fastclip computes."""

import math

import torch
from torch.optim.adam import adam
from torch.optim.optimizer import _get_scalar_dtype
from torch.optim.sgd import sgd

from ._extension import _C
from .checks import check
from .clip_stats import ClipStats
from .distributed import total_measure
from .measure import measure_of, norm_of
from .precision import SIXTEEN_BIT, Rounding, compute_dtype, has_master, state_dtype
from .values import item_of, number_of, overlap_in_part, values_of


def scaling_of(norm, max_norm):
    """What `clip_grad_norm_` multiplies by, as two factors: (unit, coefficient); `max_norm=inf` asks for the norm only.

    The unit is 1, and 2^-100 where the coefficient alone would be subnormal in float32, and lose its digits.
    """
    if max_norm == math.inf:
        return torch.ones_like(norm), torch.ones_like(norm)
    threshold, total = torch.full_like(norm, max_norm), norm + 1e-6  # number / tensor rounds twice
    small = (threshold / total < 2.0**-126) & (max_norm > 0) & (norm < math.inf)
    unit = torch.ones_like(norm).masked_fill(small, 2.0**-100)
    return unit, torch.clamp(threshold / (total * unit), max=1.0)


def scaled(grad, factors, in_place=False):
    """The gradient times scalar tensors, one after the other."""
    for factor in factors:
        factor = factor.to(grad.device, grad.real.dtype)
        grad = grad.mul_(factor) if in_place else grad * factor
    return grad


def bounds(clip_value, dtype=torch.float64):
    """(low, high) of a value clip given as a number or as a pair, rounded to the gradients' dtype."""
    return _C.clip_bounds(clip_value, dtype)


def clips_value(group):
    """Whether the value clip of a group bounds anything."""
    return any(map(math.isfinite, bounds(group["clip_value"])))


NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "eps", "max_norm")


def in_plain_numbers(group):
    """A group whose settings torch takes, whatever its numbers were given as."""
    plain = {name: number_of(group[name]) for name in NUMBERS if group.get(name) is not None}
    if "betas" in group:
        plain["betas"] = tuple(map(number_of, group["betas"]))
    return {**group, **plain}


def widened(grad, param):
    """A gradient in the type that it is computed in."""
    return grad.to(compute_dtype(param)) if grad.dtype in SIXTEEN_BIT else grad


def unscaled(param, inverse_scale):
    """The gradient divided by the scale of AMP; `param.grad` itself is left alone."""
    grad = param.grad.clone() if overlap_in_part(param, param.grad) else param.grad.resolve_conj()
    return grad if inverse_scale is None else widened(grad, param) * inverse_scale.to(grad.device)


def clamped(grad, clip_value, dtype):
    """`grad` clamped to bounds that are rounded to `dtype`, as clamp_ does, and how many elements that moved."""
    low, high = bounds(clip_value, dtype)
    return grad.clamp(low, high), ((grad < low) | (grad > high)).detach().sum()


def step_sgd(groups, state, grad_scale=None, found_inf=None, reductions=None):
    """One step of `fastclip.SGD` over `groups` (a list of dicts) with `state` (a dict of dicts by parameter).

    Returns ClipStats, whose `skipped_steps` counts this step only. Order: unscale, value clip, norm clip, then
    `torch.optim.SGD`, whose own code does the update. `reductions`, of each parameter, are of a sharded model.
    """
    return step(update_sgd, groups, state, grad_scale, found_inf, reductions)


def step_adam(groups, state, grad_scale=None, found_inf=None, reductions=None):
    """One step of `fastclip.Adam` or `fastclip.AdamW`, as `step_sgd`; `torch.optim.Adam`'s own code does the update."""
    return step(update_adam, groups, state, grad_scale, found_inf, reductions)


@torch.no_grad()
def step(update, groups, state, grad_scale, found_inf, reductions):
    """What the optimizers have in common: clips, then calls update(group, clipped gradients, state, first) for each
    group, `first` being the place of its first parameter among those of all groups."""
    groups = [in_plain_numbers(group) for group in groups]
    check(groups, state)
    stepped = [[p for p in group["params"] if p.grad is not None] for group in groups]
    params = [p for of_group in stepped for p in of_group]
    max_norm, skip_nonfinite = groups[0]["max_norm"], groups[0]["skip_nonfinite"]
    norm_type = math.inf if max_norm is None else float(groups[0]["norm_type"])
    inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal().float()
    moved, looked_at = 0, 0
    with torch.set_grad_enabled(any(group["differentiable"] for group in groups)):
        grads = []
        for group, of_params in zip(groups, stepped, strict=True):
            of_group = [unscaled(p, inverse_scale) for p in of_params]
            if clips_value(group):
                pairs = [
                    clamped(g, group["clip_value"], p.grad.dtype) for g, p in zip(of_group, of_params, strict=True)
                ]
                of_group = [grad for grad, _ in pairs]
                moved = sum((count.to(pairs[0][1].device) for _, count in pairs), start=moved)
                looked_at += sum(g.numel() for g in of_group)
            grads.append(of_group)
        norm = None
        if max_norm is not None or skip_nonfinite:
            flat = [values_of(g) for of_group in grads for g in of_group]
            if skip_nonfinite:  # a value clip would hide what it has to see
                raw = [values_of(p.grad) for p in params]
                flat = flat if all(item_of(g.isfinite().all(), unknown=True) for g in raw) else raw
            of_params = dict(zip(params, flat, strict=True))  # one that is given twice counts once
            measure, found_inf = measure_of_all(of_params, of_params.values(), norm_type, found_inf, reductions)
            norm = norm_of(measure, norm_type)
        if found_inf is not None and item_of(found_inf, unknown=0) != 0:
            return stats_of(groups, math.inf, skipped=True)
        if skip_nonfinite and not item_of(measure.isfinite().all(), unknown=True):
            return stats_of(groups, norm, skipped=True)
        if max_norm is not None:
            factors = scaling_of(norm, max_norm)
            grads = [
                [scaled(widened(g, p), factors) for g, p in zip(*of_group, strict=True)]
                for of_group in zip(grads, stepped, strict=True)
            ]
        first = 0
        for group, of_group in zip(groups, grads, strict=True):
            update(group, of_group, state, first)
            first += len(group["params"])
    return stats_of(groups, norm, moved, looked_at)


def measure_of_all(params, grads, norm_type, found_inf, reductions):
    """The measure of the gradients of a whole model, and AMP's verdict on them: over all ranks of a sharded one."""
    if not reductions:
        return measure_of(grads, norm_type), found_inf
    of_class = {}
    for param, grad in zip(params, grads, strict=True):
        of_class.setdefault(reductions[param], []).append(grad)
    measures = [(reduction, measure_of(of_one, norm_type)) for reduction, of_one in of_class.items()]
    return total_measure([r for r in dict.fromkeys(reductions.values()) if r.groups], measures, norm_type, found_inf)


def stats_of(groups, norm, moved=0, looked_at=0, skipped=False):
    """ClipStats of a step in which the value clip moved so many of the elements that it looked at."""
    max_norm = groups[0]["max_norm"]
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    norm = None if max_norm is None else torch.as_tensor(norm, dtype=torch.float64, device=device).detach()
    fraction = None
    if any(map(clips_value, groups)):
        fraction = torch.as_tensor(moved, dtype=torch.float64, device=device) / max(looked_at, 1)
    return ClipStats(
        total_norm=norm,
        clip_coefficient=None if norm is None else math.prod(scaling_of(norm, max_norm)),
        clamped_fraction=fraction,
        skipped=torch.tensor(skipped, device=device),
        skipped_steps=torch.tensor(int(skipped), device=device),
    )


def update_sgd(group, grads, state, first=0):
    """`torch.optim.SGD`'s update of one group by the given gradients.

    One parameter after the other, as torch does it: they may share memory.
    """
    params = [p for p in group["params"] if p.grad is not None]
    buffers = [state[p].get("momentum_buffer") if group["momentum"] != 0 else None for p in params]
    for p, grad, buffer, place in zip(params, grads, buffers, places_of(group, first), strict=True):
        wide, grad = wide_param(group, p, state), widened(grad, p)
        if isinstance(group["weight_decay"], torch.Tensor) and group["weight_decay"].requires_grad:
            grad = grad.clone()  # torch then adds the decay in place
        # A buffer that is wider than the parameter keeps its precision, as in torch.
        narrow = buffer is not None and buffer.dtype in SIXTEEN_BIT
        wide_buffers = [buffer.to(wide.dtype) if narrow else buffer]
        sgd(
            [wide],
            [grad],
            wide_buffers,
            has_sparse_grad=grad.is_sparse,
            foreach=False,
            fused=False,
            **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
        )
        if group["stochastic_rounding"]:
            state[p].setdefault("step", new_count())
            state[p]["step"] += 1
        rounding = store_param(group, p, wide, state, place)
        if group["momentum"] == 0:
            continue
        (wide_buffer,) = wide_buffers
        if buffer is None:
            dtype = dtype_of_first_buffer(group, p)
            same = wide_buffer.dtype == dtype
            buffer = state[p]["momentum_buffer"] = wide_buffer if same else torch.empty_like(wide_buffer, dtype=dtype)
        if wide_buffer is not buffer:
            rounding.store(1, buffer, wide_buffer)


def dtype_of_first_buffer(group, param):
    """That of torch's, where `param.grad_dtype` allows another one than the parameter's; or the one asked for."""
    if has_master(group, param) or group["momentum_dtype"]:
        return state_dtype(group, param, "momentum_buffer")
    dtype = param.grad.dtype
    return torch.promote_types(dtype, param.dtype) if group["weight_decay"] != 0 else dtype


def new_count():
    """On the CPU, where the host reads it; the kernels move it to the parameter's device. Of a literal, whose value is
    known of fake tensors, too."""
    return torch.tensor(0.0, dtype=_get_scalar_dtype(), device="cpu")


STATES_OF_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # the last with amsgrad only


def update_adam(group, grads, state, first=0):
    """`torch.optim.Adam`'s update of one group by the given gradients, as `update_sgd`; AdamW's, with
    `decoupled_weight_decay`."""
    params = [p for p in group["params"] if p.grad is not None]
    names = STATES_OF_ADAM if group["amsgrad"] else STATES_OF_ADAM[:2]
    settings = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "differentiable", "decoupled_weight_decay")
    for p, grad, place in zip(params, grads, places_of(group, first), strict=True):
        own = state[p]
        if "step" not in own:
            own["step"] = new_count()
            own.update({name: torch.zeros_like(p, dtype=state_dtype(group, p, name)) for name in names})
        wide = wide_param(group, p, state)
        wide_states = [own[name].to(wide.dtype) for name in names]
        adam(
            [wide],
            [grad.to(wide.dtype)],  # `p.grad_dtype` allows others
            *([values] for values in wide_states),
            *([] for _ in range(len(STATES_OF_ADAM) - len(names))),
            [own["step"]],
            foreach=False,
            fused=False,
            capturable=False,
            has_complex=p.is_complex(),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{key: group[key] for key in settings},
        )
        rounding = store_param(group, p, wide, state, place)
        for array, (name, values) in enumerate(zip(names, wide_states, strict=True), start=1):
            if values is not own[name]:
                rounding.store(array, own[name], values)


def places_of(group, first):
    """The place, among the parameters of all groups, of each one with a gradient."""
    return [first + i for i, p in enumerate(group["params"]) if p.grad is not None]


def wide_param(group, param, state):
    """What a rule updates: the parameter itself, or in float32 a 16-bit one, or its master weights."""
    if not has_master(group, param):
        return param.to(compute_dtype(param))
    if "master_param" not in state[param]:
        state[param]["master_param"] = param.detach().float()
    return state[param]["master_param"]


def store_param(group, param, wide, state, place):
    """Rounds what a rule has updated to a 16-bit parameter. Returns how its states are to be rounded, too."""
    rounding = Rounding(group, place, state[param].get("step") if param in state else None)
    if wide is not param:
        rounding.store(0, param, wide)
    return rounding
