"""What a step decides by the norms that it has measured: csrc/rules/decision.h in plain torch."""

import math
from typing import NamedTuple

import torch

from ..settings import LIMITS, SCOPED
from .history import CLIP_HISTORIES, SKIP_HISTORY, NormLimit
from .measure import combined, measure_of, multiplied, norm_of
from .rounding import has_master
from .values import item_of, values_of

# A model whose parameters have a smaller root mean square than this is limited as one that has it: a model of zeros has
# to move, too.
SMALLEST_RMS = 1e-3


class Limits(NamedTuple):
    """The limits that the groups have in common. None: not set; inf: only measured. With a `norm_scope` other than
    "global", those of SCOPED are not among them, see `segments.py`; nor is a limit on what the rule adds to the
    parameters, see `deltas.py`."""

    max_norm: float | dict | None
    skip_norm: float | dict | None
    max_change: float | None
    max_relative_change: float | None
    norm_type: float
    of_segments: bool  # some segment has a limit
    of_deltas: bool  # what the rule adds is measured

    @property
    def of_change(self):
        return self.max_change is not None or self.max_relative_change is not None

    @property
    def any(self):
        return (
            self.max_norm is not None
            or self.skip_norm is not None
            or self.of_change
            or self.of_segments
            or self.of_deltas
        )


class Decision(NamedTuple):
    """The norm of the gradients, the factors by which they are scaled, the change that they make in the end, whether
    the step is left out for its norm, and the values of `max_norm` and `skip_norm`."""

    norm: torch.Tensor | None
    factors: tuple = ()
    change: torch.Tensor | None = None
    skip: bool = False
    max_norm: float | None = None
    skip_norm: float | None = None


def limits_of(rule, groups):
    own = {name: groups[0][name] for name in LIMITS}
    scoped = groups[0]["norm_scope"] != "global"
    of_gradients = SCOPED if rule.change is not None else ("max_norm",)
    if rule.change is None:
        own["max_change"] = own["max_relative_change"] = None
    of_segments = scoped and any(group[name] is not None for group in groups for name in of_gradients)
    if scoped:
        own |= dict.fromkeys(SCOPED)
    of_deltas = any(measures_deltas(rule, group) for group in groups)
    limits = Limits(**own, norm_type=float(groups[0]["norm_type"]), of_segments=of_segments, of_deltas=of_deltas)
    return limits if limits.any else limits._replace(norm_type=math.inf)  # to look for inf and NaN


def measures_deltas(rule, group):
    """Returns whether the rule measures what it adds to the parameters of a group."""
    if rule.delta is None:
        return False
    limits_change = group["max_change"] is not None or group["max_relative_change"] is not None
    return limits_change or limits_rms(group) or rule.is_scaled(group)


def limits_rms(group):
    return group["max_update_rms"] is not None and group["max_update_rms"] < math.inf


def limits_on_norm(rule, groups, state):
    """Returns the limits on the norm of all gradients: `max_norm` and `skip_norm`."""
    params = [param for group in groups for param in group["params"]]
    limits = limits_of(rule, groups)
    max_norm = NormLimit(limits.max_norm, CLIP_HISTORIES["global"], state, params, anywhere=True)
    skip_norm = NormLimit(limits.skip_norm, SKIP_HISTORY, state, params, anywhere=True, leaves_out=True)
    return max_norm, skip_norm


def scaling_to(limit, size):
    """Returns min(1, limit / size), NaN if the size is NaN, as two factors: (unit, coefficient). A limit of inf only
    measures.

    The unit is 1, or 2^-100 where the coefficient alone would be subnormal in float32, and lose its digits.
    """
    limit = torch.as_tensor(limit, dtype=size.dtype, device=size.device)  # number / tensor rounds twice
    leaves_alone = (limit == math.inf) | (size <= limit)
    small = ~leaves_alone & (limit / size < 2.0**-126) & (limit > 0) & (size < math.inf)
    unit = torch.ones_like(size).masked_fill(small, 2.0**-100)
    return unit, torch.where(leaves_alone, 1.0, limit / torch.where(leaves_alone, 1.0, size * unit))


def scaling_of(norm, max_norm):
    """Returns the factor of `clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)), as `scaling_to` does."""
    return scaling_to(max_norm, norm + 1e-6)


def smaller(a, b):
    """Returns the pair of factors with the smaller product, or with one that is NaN."""
    takes_b = (math.prod(b) < math.prod(a)) | b[1].isnan()
    return tuple(torch.where(takes_b, of_b, of_a) for of_a, of_b in zip(a, b, strict=True))


def change_factors(rule, groups):
    """Returns, for each parameter, the change that a gradient of norm 1 makes in the end."""
    return {param: rule.change(group) for group in groups for param in group["params"]}


def counted_params(groups, state):
    """Returns the parameters whose norm counts, each with the values that are updated: its own, or its master weights.
    Frozen parameters without a gradient do not count."""
    values = {}
    for group in groups:
        for param in group["params"]:
            if param.requires_grad or param.grad is not None:
                master = state.get(param, {}).get("master_param") if has_master(group, param) else None
                values[param] = values_of((param if master is None else master).detach())
    return values


def measures_of(grads, norm_type):
    """Returns the measure of each gradient; `grads` has the values of each parameter's, clamped."""
    return {param: measure_of([grad], norm_type) for param, grad in grads.items()}


def sums_of(measures, factors, params, norm_type, among):
    """Returns the measures of some gradients, of the change that they make, and of parameters, float64 [3], [6] or [9].

    Args:
        measures (dict): see `measures_of`.
        factors (dict or None): see `change_factors`; None where the change is not limited.
        params (dict or None): see `counted_params`; None where no limit is relative to them.
        among (list): the parameters that count here, in order.
    """
    device = next((param.device for param in among), torch.device("cpu"))
    grads = changes = torch.zeros(3, dtype=torch.float64, device=device)
    for param in (param for param in among if param in measures):
        measure = measures[param].to(device)
        grads = combined(grads, measure, norm_type)
        if factors is not None:
            changes = combined(changes, multiplied(measure, factors[param], norm_type), norm_type)
    parts = [grads] if factors is None else [grads, changes]
    if params is not None:
        parts.append(measure_of([params[param] for param in among if param in params], norm_type, device))
    return torch.cat(parts)


def scaling_of_change(limits, change, of_params, smallest_norm):
    """Returns the factor of a change, as `scaling_to` does.

    Args:
        limits (dict): `max_change` and `max_relative_change`, each a number or None.
        change (Tensor): its norm.
        of_params (Tensor or None): the norm of the parameters. Parameters that are not finite limit nothing.
        smallest_norm (float): stands for the norm of smaller parameters.
    """
    factors = scaling_to(math.inf if limits["max_change"] is None else limits["max_change"], change)
    if limits["max_relative_change"] is None:
        return factors
    size = of_params.clamp(min=smallest_norm)
    limit = torch.where(size < math.inf, limits["max_relative_change"] * size, math.inf)
    return smaller(factors, scaling_to(limit, change))


def decide_by_norm(norm, on_norm):
    """Returns the Decision that follows from the norm of the gradients alone, by the limits on it."""
    if not isinstance(norm, torch.Tensor):
        norm = torch.tensor(norm, dtype=torch.float64, device="cpu")
    max_norm, skip_norm = (limit.value(norm) for limit in on_norm)
    skip = skip_norm is not None and skip_norm < math.inf and not item_of(norm <= skip_norm, unknown=True)
    factors = scaling_of(norm, math.inf if max_norm is None else max_norm)
    return Decision(norm, factors, None, skip, max_norm, skip_norm)


def decide(sums, limits, smallest_norm, on_norm):
    """Returns the Decision that follows from the measures of all gradients and parameters."""
    norm, *others = (norm_of(measure, limits.norm_type) for measure in sums.split(3))
    decision = decide_by_norm(norm, on_norm)
    if not limits.of_change:
        return decision
    factors, change = decision.factors, others[0]
    of_params = others[1] if limits.max_relative_change is not None else None
    factors = smaller(factors, scaling_of_change(limits._asdict(), change, of_params, smallest_norm))
    return decision._replace(factors=factors, change=change * math.prod(factors))


def smallest_norm(params, numels, norm_type):
    """Returns the norm that stands for that of smaller parameters. `numels` has the sizes of sharded ones."""
    numel = sum((numels or {}).get(param, param.numel()) for param in params)
    return SMALLEST_RMS if norm_type == math.inf else SMALLEST_RMS * math.sqrt(max(numel, 1))
