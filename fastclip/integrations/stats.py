"""What integrations log of a step."""

from typing import Any

from ..optimizer import ClippedOptimizer
from ..settings import set_limits


def stats_to_log(optimizer: Any) -> dict[str, float]:
    """Returns numbers of the last step of an optimizer, for a log: those that its clips have. Waits for the device.

    Args:
        optimizer: of fastclip, or wrapped in others that keep it in `.optimizer`; {} for any other.

    Returns:
        dict: `grad_norm`, `clip_coefficient`, `clamped_fraction`, `change`, `skipped_steps`, each where there is one.

    Example:
        >>> opt = fastclip.SGD(model.parameters(), lr=0.1, max_norm=5.0)
        >>> model(x).sum().backward(); opt.step()
        >>> log(fastclip.integrations.stats.stats_to_log(opt))
    """
    own = unwrapped(optimizer)
    if own is None:
        return {}
    stats = own.clip_stats()
    found = {
        "grad_norm": stats.total_norm,
        "clip_coefficient": stats.clip_coefficient,
        "clamped_fraction": stats.clamped_fraction,
        "change": stats.change,
        "skipped_steps": stats.skipped_steps,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def unwrapped(optimizer: Any) -> ClippedOptimizer | None:
    """Returns the optimizer of fastclip that this one is, or keeps in `.optimizer` as wrappers do; None for others."""
    while not isinstance(optimizer, ClippedOptimizer):
        if not hasattr(optimizer, "optimizer"):
            return None
        optimizer = optimizer.optimizer
    return optimizer


def measures_norm(optimizer: Any) -> bool:
    """Returns whether its step will take the norm of all gradients, and have `grad_norm` to log."""
    own = unwrapped(optimizer)
    groups = own.param_groups if own is not None else []
    return any(map(set_limits, groups))
