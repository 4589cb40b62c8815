"""Statistics of a backward pass that took several steps, put together from those of each."""

import math
from typing import NamedTuple

import torch

from .clip_stats import ClipStats
from .plain.step import clips_value


class Clips(NamedTuple):
    """The clips of one step: the number of elements under a value clip, and the norm_type of a norm clip, or None."""

    clampable: int
    norm_type: float | None


class StepStats(NamedTuple):
    stats: ClipStats
    clips: Clips


def clips_of(groups, placed):
    """Returns the Clips of a step over `placed`, each (index of the group, place, parameter); None if it had none."""
    clips = [clips_value(group) for group in groups]
    clampable = sum(param.numel() for group_index, _, param in placed if clips[group_index])
    takes_norm = any(group["max_norm"] is not None for group in groups)
    norm_type = float(groups[0]["norm_type"]) if takes_norm else None
    return Clips(clampable, norm_type) if clampable or takes_norm else None


def together(steps, last):
    """Returns the ClipStats of all `steps`, for what they do not tell with the values of the `last`."""
    device = last.skipped.device
    clamped = [(stats.clamped_fraction.to(device), clips.clampable) for stats, clips in steps if clips.clampable]
    if clamped:
        moved = sum((fraction * count).round() for fraction, count in clamped)
        last = last._replace(clamped_fraction=moved / sum(count for _, count in clamped))
    normed = [(stats, clips.norm_type) for stats, clips in steps if clips.norm_type is not None]
    if normed:
        norm, coefficient = normed[0][0].total_norm.to(device), normed[0][0].clip_coefficient.to(device)
        for stats, norm_type in normed[1:]:
            add = torch.maximum if norm_type == math.inf else torch.hypot
            norm = add(norm, stats.total_norm.to(device))
            coefficient = torch.minimum(coefficient, stats.clip_coefficient.to(device))
        last = last._replace(total_norm=norm, clip_coefficient=coefficient)
    return last
