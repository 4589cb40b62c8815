"""One step: clips, then the rule's update of each parameter. Read this to know what fastclip computes."""

import math

import torch
from torch.optim.optimizer import _get_scalar_dtype

from .._extension import _C
from ..clip_stats import ClipStats
from ..distributed import Reduction, total_measure
from ..settings import LIMITS, SCOPED
from .checks import check
from .deltas import lr_factors as lr_factors_of
from .limits import (
    Decision,
    change_factors,
    counted_params,
    decide,
    decide_by_norm,
    limits_of,
    limits_on_norm,
    measures_of,
    smallest_norm,
    sums_of,
)
from .quantized import Quantized, has_8_bits, keep, new_quantized, stored
from .rounding import SIXTEEN_BIT, Rounding, compute_dtype, has_master, state_dtype
from .segments import Segments
from .values import item_of, number_of, overlap_in_part, values_of


def scaled(grad, factors, in_place=False):
    """Multiplies a gradient by scalar tensors, one after the other."""
    for factor in factors:
        factor = factor.to(grad.device, grad.real.dtype)
        grad = grad.mul_(factor) if in_place else grad * factor
    return grad


def bounds(clip_value, dtype=torch.float64):
    """Returns (low, high) of a value clip, a number or a pair, rounded to the gradients' dtype."""
    return _C.clip_bounds(clip_value, dtype)


def clips_value(group):
    """Returns whether the value clip of a group bounds anything."""
    return any(map(math.isfinite, bounds(group["clip_value"])))


def in_plain_numbers(rule, group):
    """Returns the group with plain numbers, which torch takes, whatever types they were given in."""
    plain = {}
    for name in ("lr", "weight_decay", *LIMITS, *rule.numbers):
        if name == "betas":
            plain[name] = tuple(map(number_of, group[name]))
        elif group[name] is not None and not isinstance(group[name], dict):  # a rule
            plain[name] = number_of(group[name])
    return {**group, **plain}


def widened(grad, param):
    """Returns a gradient in its compute type."""
    return grad.to(compute_dtype(param)) if grad.dtype in SIXTEEN_BIT else grad


def unscaled(param, inverse_scale, grad_factor):
    """Returns the gradient divided by AMP's scale, and times the factor of a deferred clip; `param.grad` itself is left
    alone."""
    grad = param.grad.clone() if overlap_in_part(param, param.grad) else param.grad.resolve_conj()
    factors = [factor for factor in (inverse_scale, grad_factor) if factor is not None]
    if not factors:
        return grad
    wide = widened(grad, param)
    return wide * math.prod(factor.to(grad.device, wide.real.dtype) for factor in factors)


def clamped(grad, clip_value, dtype):
    """Returns `grad` clamped to bounds rounded to `dtype`, as clamp_ does, and the number of changed elements."""
    low, high = bounds(clip_value, dtype)
    return grad.clamp(low, high), ((grad < low) | (grad > high)).detach().sum()


@torch.no_grad()
def step(
    rule,
    groups,
    state,
    grad_scale=None,
    found_inf=None,
    grad_factor=None,
    reductions=None,
    numels=None,
    by_parameter=None,
    beyond=(),
):
    """Takes one step by `rule` over `groups` (a list of dicts) with `state` (a dict of dicts by parameter).

    Order: unscale, deferred clip, value clip, norm clip, update.

    Args:
        rule (Rule): a row of `plain.rules`.
        grad_scale, found_inf (Tensor, optional): AMP's.
        grad_factor (Tensor, optional): of a deferred clip: gradients are multiplied by it before all else.
        reductions (dict, optional): the Reduction of each parameter of a sharded model.
        numels (dict, optional): the number of elements on all ranks of each of these.
        by_parameter (dict, optional): gets the measure of each gradient, by the parameter's position among all.
        beyond (sequence, optional): process groups whose ranks hold other parameters, which count in the norm.

    Returns:
        ClipStats: whose `skipped_steps` counts this step only.
    """
    groups = [in_plain_numbers(rule, group) for group in groups]
    check(rule, groups, state)
    replicated = {p for group in groups for p in group["params"] if beyond and group["norm_replicated"]}
    if replicated:
        reductions = {p: (reductions or {}).get(p, Reduction()) for group in groups for p in group["params"]}
        reductions |= {p: reductions[p]._replace(replicated=True) for p in replicated}
    stepped = [[p for p in group["params"] if p.grad is not None] for group in groups]
    params = [p for group_params in stepped for p in group_params]
    limits, skip_nonfinite = limits_of(rule, groups), groups[0]["skip_nonfinite"]
    on_norm, segments = limits_on_norm(rule, groups, state), Segments(rule, groups, state)
    inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal().float()
    moved, looked_at = 0, 0
    with torch.set_grad_enabled(any(group["differentiable"] for group in groups)):
        grads = []
        for group, group_params in zip(groups, stepped, strict=True):
            group_grads = [unscaled(p, inverse_scale, grad_factor) for p in group_params]
            if clips_value(group):
                pairs = [
                    clamped(g, group["clip_value"], p.grad.dtype)
                    for g, p in zip(group_grads, group_params, strict=True)
                ]
                group_grads = [grad for grad, _ in pairs]
                moved = sum((count.to(pairs[0][1].device) for _, count in pairs), start=moved)
                looked_at += sum(g.numel() for g in group_grads)
            grads.append(group_grads)
        decision = Decision(None)
        if limits.any or skip_nonfinite or rule.needs_norm:
            norm_type = 2.0 if rule.needs_norm else limits.norm_type
            flat = [values_of(g) for group_grads in grads for g in group_grads]
            if skip_nonfinite:  # a value clip would hide an inf
                raw = [values_of(p.grad) for p in params]
                flat = flat if all(item_of(g.isfinite().all(), unknown=True) for g in raw) else raw
            measured = measures_of(dict(zip(params, flat, strict=True)), norm_type)  # each parameter once
            if by_parameter is not None:
                by_parameter.update(positions_of(groups, measured))
            factors = change_factors(rule, groups) if limits.of_change else None
            counts_params = limits.max_relative_change is not None or segments.of_params
            counted = counted_params(groups, state) if counts_params else None
            of_all_params = counted if limits.max_relative_change is not None else None

            def sums_among(some):
                of_all = sums_of(measured, factors, of_all_params, norm_type, some)
                return torch.cat([of_all, segments.sums(measured, counted, some, of_all.device)])

            both = [*measured, *(param for param in counted or () if param not in measured)]
            asked = sums_among, both, norm_type, found_inf, reductions, len(segments), beyond
            sums, found_inf = sums_of_all(*asked)
            sums, by_segment = sums.split([len(sums) - len(segments), len(segments)])
            decision = decide(sums, limits, smallest_norm(counted or (), numels, norm_type), on_norm)
            segments.decide(by_segment, counted, numels)
        if found_inf is not None and item_of(found_inf, unknown=0) != 0:
            if by_parameter is not None:  # as the kernels, which have measured nothing
                by_parameter.update({i: torch.full_like(measure, math.nan) for i, measure in by_parameter.items()})
            return stats_of(groups, limits, decide_by_norm(math.inf, on_norm), segments, skipped=True)
        if skip_nonfinite and not item_of(sums[:3].isfinite().all(), unknown=True):
            return stats_of(groups, limits, decision, segments, skipped=True)
        if params or reductions or beyond:
            for limit in on_norm:
                limit.push(decision.norm, stores=not decision.skip)
            if not decision.skip or item_of(decision.norm < math.inf, unknown=False):
                segments.push(stores=not decision.skip)
        if decision.skip:
            return stats_of(groups, limits, decision, segments, skipped=True)
        if rule.weight is not None:
            segments.clip_groups(rule, groups, state, decision)
        if limits.any or rule.needs_norm:
            for index, (group, group_grads) in enumerate(zip(groups, grads, strict=True)):
                places = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
                group_grads[:] = [
                    scaled(widened(g, p), (*decision.factors, *segments.factors(index, i)))
                    for g, (i, p) in zip(group_grads, places, strict=True)
                ]
        lr_factors = {}
        if limits.of_deltas:

            def sums_over_ranks(sums_among, some, of_all):
                of_some = sums_among(some)
                return sums_of_all(sums_among, some, 2.0, None, reductions, len(of_some) - of_all, beyond)[0]

            tensors = [
                tensors_of_group(rule, group, group_grads, state)
                for group, group_grads in zip(groups, grads, strict=True)
            ]
            lr_factors, change = lr_factors_of(rule, groups, state, tensors, sums_over_ranks, numels, replicated)
            decision = decision._replace(change=change)
        first = 0
        for index, (group, group_grads) in enumerate(zip(groups, grads, strict=True)):
            norms = [
                segments.norm_after(index, i, decision) for i, p in enumerate(group["params"]) if p.grad is not None
            ]
            update_group(rule, group, group_grads, state, first, norms, lr_factors)
            first += len(group["params"])
    return stats_of(groups, limits, decision, segments, moved, looked_at)


def positions_of(groups, measures):
    """Returns measures by their parameters' first positions among the parameters of all groups."""
    params = [p for group in groups for p in group["params"]]
    first = {p: position for position, p in reversed([*enumerate(params)])}
    return {first[p]: measure.detach() for p, measure in measures.items()}


def sums_of_all(sums_among, params, norm_type, found_inf, reductions, of_segments=0, beyond=()):
    """Returns the sums over a model, and AMP's verdict on its gradients; over all ranks if it is sharded, or has other
    parameters there. `sums_among(params)` are those over some parameters; the last `of_segments` numbers of them are
    about segments."""
    if not reductions and not beyond:
        return sums_among(params), found_inf
    by_reduction = {}
    for param in params:
        by_reduction.setdefault(reductions[param] if reductions else Reduction(), []).append(param)
    by_reduction = by_reduction or {Reduction(): []}
    rows = [(reduction, sums_among(some)) for reduction, some in by_reduction.items()]
    over_ranks = [r for r in dict.fromkeys((reductions or {}).values()) if r.groups or r.replicated]
    of_all = len(rows[0][1]) - of_segments
    return total_measure(over_ranks, rows, norm_type, found_inf, of_all, beyond=beyond)


def stats_of(groups, limits, decision, segments, moved=0, looked_at=0, skipped=False):
    """Returns the ClipStats of a step whose value clip looked at `looked_at` elements, and changed `moved` of them."""
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))

    def number(value):
        return torch.as_tensor(value, dtype=torch.float64, device=device).detach()

    change = decision.change
    if segments.limits_change:
        change = segments.change()
    elif change is None and any(group[name] is not None for group in groups for name in SCOPED[1:]):
        change = 0.0  # skipped, before it was measured
    norm = number(decision.norm) if limits.any or segments.weighted else None
    coefficient = math.prod(decision.factors)
    scoped = groups[0]["norm_scope"] != "global" and any(group[name] is not None for group in groups for name in SCOPED)
    if scoped or segments.weighted:
        coefficient = 0.0 if skipped else segments.smallest_coefficient()
    return ClipStats(
        total_norm=norm,
        clip_coefficient=None if norm is None else number(coefficient),
        clamped_fraction=number(moved) / max(looked_at, 1) if any(map(clips_value, groups)) else None,
        skipped=torch.tensor(skipped, device=device),
        skipped_steps=torch.tensor(int(skipped), device=device),
        change=None if change is None else number(0.0 if skipped else change),
        threshold=None if decision.max_norm is None else number(decision.max_norm),
        skip_threshold=None if decision.skip_norm is None else number(decision.skip_norm),
    )


def states_of_group(rule, group, state):
    """Returns the entries of the state of a group's parameters with a gradient; makes those of a first step."""
    names = rule.states(group)
    counts = rule.counts_steps or group["stochastic_rounding"]
    own_states = []
    for p in group["params"]:
        if p.grad is not None:
            own = state[p] if names or counts or rule.scalar or has_master(group, p) else {}
            make_states(rule, group, p, own, names, counts)
            own_states.append(own)
    return own_states


def tensors_of_group(rule, group, grads, state):
    """Returns what an update of each parameter gets, see `deltas.measured_by`."""
    tensors = {}
    params = [p for p in group["params"] if p.grad is not None]
    for p, grad, own in zip(params, grads, states_of_group(rule, group, state), strict=True):
        wide = wide_param(group, p, own)
        states = {name: widened_state(rule, stored(rule, own, name), wide) for name in rule.states(group)}
        tensors[p] = wide, grad.to(wide.dtype), states, own["step"]
    return tensors


def update_group(rule, group, grads, state, first, norms, lr_factors):
    """Updates the parameters of one group by the given gradients. `first` is the place of its first parameter among the
    parameters of all groups; `norms` are those of the gradients, where the rule needs them; `lr_factors` are those of
    the learning rate, by parameter, where they are not 1.

    Updates one parameter after the other, as torch does: they may share memory.
    """
    params = [p for p in group["params"] if p.grad is not None]
    names = rule.states(group)
    counts = rule.counts_steps or group["stochastic_rounding"]
    own_states = states_of_group(rule, group, state)
    # Kept from before the first update: a parameter may be in the group twice.
    kept = [{name: stored(rule, own, name) for name in names} for own in own_states]
    together = zip(params, grads, own_states, kept, places_of(group, first), norms, strict=True)
    for p, grad, own, before, place, norm in together:
        wide = wide_param(group, p, own)
        states = {name: widened_state(rule, before[name], wide) for name in names}
        if rule.scalar:
            states[rule.scalar[0]] = own[rule.scalar[0]]
        if rule.needs_norm:
            states["grad_norm"] = norm
        # A buffer that SGD's first step fills has the gradient's dtype, which may not be the parameter's
        # (`p.grad_dtype`).
        grad = widened(grad, p) if rule.filled_by_first_step else grad.to(wide.dtype)
        own_group = {**group, "lr": group["lr"] * lr_factors[p]} if p in lr_factors else group
        rule.update(own_group, wide, grad, states, own.get("step"))
        if counts and not rule.counts_steps:
            own["step"] += 1
        rounding = Rounding(group, place, own.get("step"))
        if wide is not p:
            rounding.store(0, p, wide)
        for name in names:
            to = before[name]
            if to is None:
                to = first_state(rule, group, p, name, states[name])
                keep(own, name, to)
            if isinstance(to, Quantized):
                to.store(states[name])
            elif states[name] is not to:
                rounding.store(1 + rule.arrays.index(name), to, states[name])


def make_states(rule, group, param, own, names, counts):
    """Makes the states that a parameter's first step needs."""
    if counts and "step" not in own:
        own["step"] = new_number(0.0)
    if rule.scalar:
        length = rule.length_of_row(group)
        own.setdefault(rule.scalar[0], new_number(rule.scalar[1] if length == 1 else [rule.scalar[1]] * length))
    if not rule.filled_by_first_step:
        for name in names:
            if stored(rule, own, name) is None:
                keep(own, name, new_state(rule, group, param, name))


def new_state(rule, group, param, name):
    """Returns a state as it begins."""
    if has_8_bits(rule, group, param):
        return new_quantized(rule, group, param, name, param)
    dtype, value = state_dtype(rule, group, param, name), rule.new_value(group)
    return torch.full_like(param, complex(value, value) if dtype.is_complex else value, dtype=dtype)


def first_state(rule, group, param, name, filled):
    """Returns the state that a first step has filled, in its own dtype: the one asked for, or torch's, which depends on
    the gradient's."""
    if has_8_bits(rule, group, param) and filled.layout == torch.strided:
        return new_quantized(rule, group, param, name, filled)
    if has_master(group, param) or group["momentum_dtype"]:
        dtype = state_dtype(rule, group, param, name)
    else:
        dtype = param.grad.dtype
        dtype = torch.promote_types(dtype, param.dtype) if group["weight_decay"] != 0 else dtype
    return filled if filled.dtype == dtype else torch.empty_like(filled, dtype=dtype)


def widened_state(rule, state, wide):
    """Returns a state in its compute type. A wider buffer of SGD keeps its precision, as in torch."""
    if isinstance(state, Quantized):
        return state.values()
    if state is None or (rule.filled_by_first_step and state.dtype not in SIXTEEN_BIT):
        return state
    return state.to(wide.dtype)


def new_number(value):
    """Makes a number, or a row of them, on the CPU, where the host reads it; the kernels move it to the parameter's
    device. It is made of a literal, whose value is known even for a fake tensor."""
    return torch.tensor(value, dtype=_get_scalar_dtype(), device="cpu")


def places_of(group, first):
    """Returns the place of each parameter with a gradient, among the parameters of all groups."""
    return [first + i for i, p in enumerate(group["params"]) if p.grad is not None]


def wide_param(group, param, own):
    """Returns the tensor that a rule updates: the parameter, a 16-bit parameter in float32, or its master weights."""
    if not has_master(group, param):
        return param.to(compute_dtype(param))
    if "master_param" not in own:
        own["master_param"] = param.detach().float()
    return own["master_param"]
