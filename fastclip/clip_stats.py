"""Results of a clip: numbers to log, and the first gradient that was not finite."""

import math
from typing import NamedTuple

import torch

from .distributed import local_of, on_any_rank, over_ranks
from .plain.measure import norm_of
from .plain.values import values_of
from .reasons import name_of
from .settings import set_limits


class ClipStats(NamedTuple):
    """Statistics of the last step, from `optimizer.clip_stats()`.

    All are scalar tensors on the parameters' device, computed without waiting for it. None stands for a clip that is
    not set.

    Attributes:
        total_norm (float64): norm of all gradients, after a value clip and before the norm clip; None without
            `max_norm`, `skip_norm`, `max_change`, `max_relative_change` and `max_update_rms`.
        clip_coefficient (float64): factor of the norm clip, min(1, max_norm / (total_norm + 1e-6)) as in
            `torch.nn.utils.clip_grad_norm_`, or that of a limit on the change, if it is smaller; 1 if the gradients
            were left alone. With a `norm_scope`, that of the group or parameter that is scaled down the most, and 0 in
            a skipped step. None where `total_norm` is.
        clamped_fraction (float64): fraction of the elements under a `clip_value` that were outside its bounds, from 0
            to 1. A NaN, which `clamp_` leaves alone, does not count. 0 in a skipped step; None if no group has a
            `clip_value`, or only infinite ones.
        skipped (bool): whether the step was skipped, by `skip_nonfinite`, `skip_norm` or AMP.
        skipped_steps (int64): number of skipped steps, see `optimizer.skipped_steps`.
        change (float64): norm of the change that the gradients, after all clips, make in the end, see `max_change` of
            `fastclip.SGD`; in the parameters' units. Of Adam and LAMB, the norm of what the step has added; with a
            `norm_scope`, of all segments together. 0 in a skipped step; None without `max_change` and
            `max_relative_change`.
        threshold (float64): the value of `max_norm` in this step; of a rule, it follows from the norms of the steps
            before. None without `max_norm`, and with a `norm_scope`, where there are several.
        skip_threshold (float64): the same of `skip_norm`.

    Example:
        >>> opt = fastclip.SGD(model.parameters(), lr=0.1, max_norm=5.0)
        >>> model(x).sum().backward(); opt.step()
        >>> stats = opt.clip_stats()  # nothing waits
        >>> log({"grad_norm": stats.total_norm, "clipped": stats.clip_coefficient < 1})
    """

    total_norm: torch.Tensor | None
    clip_coefficient: torch.Tensor | None
    clamped_fraction: torch.Tensor | None
    skipped: torch.Tensor
    skipped_steps: torch.Tensor
    change: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    skip_threshold: torch.Tensor | None = None


def table_of(measures, groups, needs_norm):
    """Returns measures by position, of a step in plain torch, as `Engine.measures_by_parameter` does. `needs_norm`: the
    rule measures in any case."""
    limits = any(map(set_limits, groups))
    if not limits and not needs_norm and not (groups and groups[0]["skip_nonfinite"]):
        return None, 2.0
    count = sum(len(group["params"]) for group in groups)
    rows = torch.zeros(count, 3, dtype=torch.float64, device="cpu")
    for position, measure in measures.items():
        rows[position] = measure.detach()
    if needs_norm:
        return rows, 2.0
    return rows, float(groups[0]["norm_type"]) if limits else math.inf


@torch.no_grad()
def norms_by_parameter(groups, measures, norm_type):
    """Returns the names of all parameters, and the norms of these measures of their gradients, over all ranks."""
    if measures is None:
        raise RuntimeError(
            "the last step took no norm, raised, or there was none: norms_by_parameter needs a limit on the norm, and "
            "max_norm=inf measures without a clip"
        )
    params = [param for group in groups for param in group["params"]]
    if len(params) != len(measures):
        raise RuntimeError("the optimizer's groups have changed since its last step: norms_by_parameter tells of that")
    names = []
    for index, group in enumerate(groups):
        by_place = [name_of(group, index, i) for i in range(len(group["params"]))]
        names += group.get("param_names") or by_place
    return names, norm_of(over_ranks(params, names, measures, norm_type).T, norm_type)


@torch.no_grad()
def first_nonfinite(groups):
    """Names the first parameter with an inf or NaN in its gradient; or returns None. Waits for each device once."""
    places = [(i, j, param) for i, group in enumerate(groups) for j, param in enumerate(group["params"])]
    flags = [
        None if param.grad is None else values_of(local_of(param.grad.detach())).isfinite().all().logical_not()
        for *_, param in places
    ]
    nonfinite = [False] * len(flags)
    for device in {flag.device for flag in flags if flag is not None}:
        there = [i for i, flag in enumerate(flags) if flag is not None and flag.device == device]
        for i, flag in zip(there, torch.stack([flags[i] for i in there]).tolist(), strict=True):
            nonfinite[i] = flag
    nonfinite = on_any_rank(nonfinite, [param for *_, param in places])
    bad = next((place for place, flag in zip(places, nonfinite, strict=True) if flag), None)
    return None if bad is None else name_of(groups[bad[0]], *bad[:2])
