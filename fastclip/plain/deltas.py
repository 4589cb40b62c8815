"""What a step would add to each parameter, and the factors of learning rates that follow: csrc/rules/delta.h in plain
torch."""

import math

import torch

from .limits import counted_params, limits_rms, scaling_of_change, scaling_to, smallest_norm
from .measure import measure_of, multiplied, norm_of
from .values import item_of, values_of

PARTS = 3  # measures of each parameter: of what is added, of relative gradients, of the parameter


def measured_by(rule, group, tensors):
    """Returns the measures of one parameter, float64 [9].

    Args:
        tensors (tuple): the parameter, its gradient after all clips, its states and count of steps, as its update gets
            them; they stay as they are.
    """
    param, grad, states, step = tensors
    copies = {name: None if state is None else state.clone() for name, state in states.items()}
    added, relative = rule.delta(group, param, grad, copies, step.clone())
    return torch.cat([measure_of([values_of(tensor)], device=param.device) for tensor in (added, relative, param)])


def measured_values(values):
    """Returns the measures of a parameter that is not stepped, and counts in the norm of the parameters."""
    nothing = torch.zeros(3, dtype=torch.float64, device=values.device)
    return torch.cat([nothing, nothing, measure_of([values])])


def lr_factors(rule, groups, state, tensors, sums_over_ranks, numels, replicated):
    """Returns the factors of learning rates, a dict by parameter, and the norm of what is added after that, None where
    it is not limited.

    Args:
        tensors (list of dict): for each group, the tensors of each parameter, see `measured_by`.
        sums_over_ranks (Callable): sums_over_ranks(sums_among, params, of_all) adds up over all ranks.
        numels (dict or None): the sizes of sharded parameters.
        replicated (set): the parameters that all ranks of a norm_process_group have.
    """
    counted = counted_params(groups, state)
    measures = {}
    for group, of_group in zip(groups, tensors, strict=True):
        measures |= {param: measured_by(rule, group, own) for param, own in of_group.items()}
    measures |= {param: measured_values(values) for param, values in counted.items() if param not in measures}
    params = [*dict.fromkeys(param for group in groups for param in group["params"])]  # in one order on all ranks

    def sums_among(some):
        there = dict.fromkeys(some)
        device = next((param.device for param in some), torch.device("cpu"))
        nothing = torch.zeros(3 * PARTS, dtype=torch.float64, device=device)
        return torch.cat(
            [nothing[:0], *(measures[p].to(device) if p in there and p in measures else nothing for p in params)]
        )

    sums = dict(zip(params, sums_over_ranks(sums_among, params, 0).view(-1, PARTS, 3), strict=True))
    factors = {  # also of those that have a gradient on other ranks alone
        param: factor_of(rule, group, sums[param], (numels or {}).get(param, param.numel()))
        for group in groups
        for param in group["params"]
    }
    changes = []
    for limits, segment in segments_of(groups, counted):
        own = sum_of([p for p in segment if p not in replicated], sums, factors)
        if groups[0]["norm_scope"] == "global":
            own = sums_over_ranks(lambda _, own=own: own, [], 6)
        both = own + sum_of([p for p in segment if p in replicated], sums, factors).to(own.device)
        change, size = map(norm_of, both.split(3))
        factor = math.prod(scaling_of_change(limits, change, size, smallest_norm(segment, numels, 2.0)))
        factors |= {p: factors[p] * factor for p in segment}
        changes.append(change * factor)
    change = torch.linalg.vector_norm(torch.stack(changes)) if changes else None
    return {param: item_of(factor, unknown=1.0) for param, factor in factors.items()}, change


def sum_of(params, sums, factors):
    """Returns the measures of what is added to some parameters, and of these, float64 [6]."""
    total = torch.zeros(6, dtype=torch.float64)
    for p in params:
        added, _, size = sums[p]
        after = multiplied(added, factors[p], 2.0)
        total = total.to(added.device) + torch.cat([after, size])
    return total


def factor_of(rule, group, sums, numel):
    """Returns the factor of a parameter's learning rate that its own measures ask for."""
    added, relative, size = map(norm_of, sums)
    factor = torch.ones_like(added)
    if rule.is_scaled(group) and group["lr"] != 0:
        factor = torch.where((added == 0) | (size == 0), 1.0, size / (added / abs(group["lr"])))
    if limits_rms(group):
        factor = factor * math.prod(scaling_to(group["max_update_rms"], relative / max(numel, 1) ** 0.5))
    return factor


def segments_of(groups, counted):
    """Yields the parts of the model whose change is limited: the group whose limits hold, and the parameters."""
    scope = groups[0]["norm_scope"]
    limited = [g for g in groups if g["max_change"] is not None or g["max_relative_change"] is not None]
    if limited and scope == "global":
        yield limited[0], [*counted]
    elif scope != "global":
        for group in limited:
            params = [param for param in dict.fromkeys(group["params"]) if param in counted]
            yield from ((group, part) for part in ([params] if scope == "group" else [[param] for param in params]))
