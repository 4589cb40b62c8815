"""Notices that somebody clips the gradients before the optimizer does: its norm is then the same in every step."""

import math
import warnings

from .plain.values import item_of
from .settings import LIMITS

_LOOKS, _STEPS = 100, 20  # how many steps are looked at, and how many in a row have to have the same norm


class DoubleClip:
    """Looks at the first steps of an optimizer that limits a norm, on the CPU: reading one waits for a GPU."""

    def __init__(self):
        self._norm, self._same, self._looks = math.nan, 0, 0

    def look(self, optimizer):
        """Looks at the step just taken; returns what looks at the next one, or None."""
        norm = optimizer.total_norm
        if norm is None or not norm.is_cpu:
            return None
        norm = item_of(norm, unknown=math.nan)
        self._same = self._same + 1 if abs(norm - self._norm) <= 1e-4 * norm and 0 < norm < math.inf else 1
        self._norm = norm
        self._looks += 1
        if self._same == _STEPS:
            self._warn(optimizer.param_groups[0])
        return None if self._same == _STEPS or self._looks == _LOOKS else self

    def _warn(self, group):
        own = next((name for name in LIMITS if group.get(name) is not None), "max_norm")
        warnings.warn(
            f"something clips these gradients before the optimizer's {own} does, or they never change, as in a "
            f"benchmark: total_norm was {self._norm:.4g} in each of the last {_STEPS} steps. Switch off one of the two "
            "clips; a trainer's: max_grad_norm, grad_clip",
            stacklevel=5,
        )
