"""Rules that stand for a limit on the norm: they derive it from the norms of past steps.

A rule is a plain dict in an optimizer's groups, and in checkpoints: `torch.load(weights_only=True)` refuses classes
that it does not know.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .reasons import not_a_number

LARGEST_WINDOW = 1024
_NOT_NEGATIVE, _POSITIVE = "0 or more, and finite", "above 0, and finite"


@dataclass(frozen=True)
class QuantileNorm:
    """A limit on the norm: a multiple of a quantile of the last norms. By default, twice the median of the last 128.

    Give it as `max_norm`, to scale gradients down to it, or as `skip_norm`, to leave out steps above it. The limit of a
    step is `scale` times the quantile of the last `window` norms *before* the step, interpolated as `numpy.quantile`
    does, and not below `floor` or above `ceiling`. Before `warmup` norms are there, it is `ceiling`.

    Norms enter as they are, before any clip; 0, inf and NaN never enter, and a step with an inf or NaN is left out. Up
    to a fraction of 1 - q of the last norms can be spikes before the limit follows them. After a lasting rise, it has
    followed within (1 - q) * window + 1 steps.

    Args:
        q (float): from 0 to 1. 0.5 resists clusters of spikes; 0.75 leaves rare kinds of batches alone, say those of
            long utterances.
        scale (float): above 0; of a `skip_norm`, 1 or more.
        window (int): number of norms, from 2 to 1024.
        warmup (int): number of norms, from 1 to `window`.
        floor, ceiling (float): bounds of the limit, in the gradients' units.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.

    Sources: icefall's ScaledAdam, `QuantileNorm(0.5, scale=2, window=100)`; AutoClip (Seetharaman et al., 2020),
    https://arxiv.org/abs/2007.14469, `QuantileNorm(0.1, scale=1, window=1024)`.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.AdamW(model.parameters(), max_norm=fastclip.QuantileNorm(0.75, scale=2.0))
        >>> opt.param_groups[0]["max_norm"]["scale"] = 3.0  # from the next step on
    """

    q: float = 0.5
    scale: float = 2.0
    window: int = 128
    warmup: int = 10
    floor: float = 0.0
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        _set_number(self, "q", 0 <= _number(self, "q") <= 1, "from 0 to 1")
        _set_number(self, "scale", 0 < _number(self, "scale") < math.inf, _POSITIVE)
        _check_count(self, "window", 2, LARGEST_WINDOW)
        _check_count(self, "warmup", 1, self.window)
        _check_bounds(self)


@dataclass(frozen=True)
class EmaNorm:
    """A limit on the norm: so many standard deviations above the mean of past norms, both moving averages.

    Give it as `max_norm`, to scale gradients down to it, or as `skip_norm`, to leave out steps above it. The limit of a
    step is `ratio` * mean + `z` * deviation of the norms *before* the step, and not below `floor` or above `ceiling`.
    Before `warmup` norms are there, it is `ceiling`.

    Mean and variance are those of the first `warmup` norms, then moving averages. What enters is the norm, cut at the
    limit without `floor` and `ceiling`; at twice the mean, if the limit is below the mean, or is a `skip_norm` below
    that, so that after a lasting rise it follows. 0, inf and NaN never enter, and a step with an inf or NaN is left
    out. In float64, norms below 1e-150 or above 1e150 are beyond the range of a variance.

    Args:
        z (float): 0 or more. With 0, a `ratio` of 1 lets the limit sink: what enters is cut at the mean itself.
        ratio (float): above 0; of a `skip_norm`, 1 or more, and above 1 if `z` is 0.
        decay (float): of the moving averages, at least 0 and below 1.
        warmup (int): number of norms, 1 or more.
        above (str): "threshold"; or "reciprocal": a norm that is more than `z` deviations above the mean, s of them, is
            limited to `ratio` * mean + `z` * deviation * `z` / s. The larger the spike, the closer to the mean;
            so the limit hardly follows a lasting rise.
        floor, ceiling (float): bounds of the limit, in the gradients' units.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.

    Sources: ZClip (Kumar et al., 2025), https://arxiv.org/abs/2504.02507, `EmaNorm(above="reciprocal", ceiling=1.0)`;
    AdaGC (Wang et al., 2025), https://arxiv.org/abs/2502.11034, about `EmaNorm(z=0, ratio=1.04, decay=0.99)`.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.AdamW(model.parameters(), max_norm=1.0, skip_norm=fastclip.EmaNorm(z=6, decay=0.99))
    """

    z: float = 2.5
    ratio: float = 1.0
    decay: float = 0.97
    warmup: int = 25
    above: str = "threshold"
    floor: float = 0.0
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        _set_number(self, "z", 0 <= _number(self, "z") < math.inf, _NOT_NEGATIVE)
        _set_number(self, "ratio", 0 < _number(self, "ratio") < math.inf, _POSITIVE)
        _set_number(self, "decay", 0 <= _number(self, "decay") < 1, "0 or more, and below 1")
        _check_count(self, "warmup", 1, 2**31 - 1)
        if self.above not in ("threshold", "reciprocal"):
            raise ValueError(f"above must be 'threshold' or 'reciprocal', got {self.above!r}")
        _check_bounds(self)


_RULED = ("max_norm", "skip_norm")  # the settings that may be a rule
RULES: dict[str, Any] = {"quantile": QuantileNorm, "ema": EmaNorm}


def _number(rule, name):
    value = getattr(rule, name)
    if isinstance(value, (str, bool)):
        raise not_a_number(name, value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise not_a_number(name, value) from None


def _set_number(rule, name, good, expected):
    if not good:
        raise ValueError(f"{name} must be {expected}, got {getattr(rule, name)!r}")
    object.__setattr__(rule, name, _number(rule, name))  # what YAML reads as an int is a float


def _check_count(rule, name, lowest, highest):
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be from {lowest} to {highest}, got {value!r}")


def _check_bounds(rule):
    _set_number(rule, "floor", 0 <= _number(rule, "floor") < math.inf, _NOT_NEGATIVE)
    _set_number(rule, "ceiling", _number(rule, "ceiling") >= rule.floor, f"{rule.floor} or more, which is its floor")


def is_rule(value: Any) -> bool:
    """Returns whether a setting is, or is meant to be, a rule, and not a number or None."""
    return isinstance(value, (Mapping, QuantileNorm, EmaNorm)) or (isinstance(value, str) and value.isidentifier())


def complete_rule(value: Any, what: str, leaves_out: bool = False) -> dict[str, Any]:
    """Returns a rule as a plain dict, with all its keys.

    Args:
        value (QuantileNorm, EmaNorm, Mapping or str): {"rule": "quantile", "q": 0.75}, say; or "quantile" alone.
        what (str): what messages are about, as "max_norm in param_groups[1]".
        leaves_out (bool): it is a `skip_norm`, which must not leave out every step.

    Raises:
        ValueError, TypeError: an unknown rule or key, or a value out of its range.
    """
    names = " or ".join(map(repr, RULES))
    if isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("rule", None)
        if not isinstance(name, str) or name not in RULES:
            raise ValueError(f"the rule of {what} must be {names}, got {name!r}")
        unknown = [key for key in settings if key not in RULES[name].__dataclass_fields__]
        if unknown:
            keys = ", ".join(RULES[name].__dataclass_fields__)
            raise ValueError(f"{what}: the rule {name!r} has no {unknown[0]!r}; it has {keys}")
    elif isinstance(value, str) and value in RULES:
        name, settings = value, {}
    elif isinstance(value, (QuantileNorm, EmaNorm)):
        name = next(name for name, kind in RULES.items() if isinstance(value, kind))
        settings = asdict(value)
    elif isinstance(value, str) and value.isidentifier():
        raise ValueError(f"{what} must be a number, or a rule: {names}, got {value!r}")
    else:
        raise not_a_number(what, value)
    try:
        rule = RULES[name](**settings)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from None
    if leaves_out:
        _check_skip(rule, what)
    return {"rule": name, **asdict(rule)}


def has_rule(settings: Mapping[str, Any]) -> bool:
    """Returns whether a limit on the norm among these settings is a rule."""
    return any(is_rule(settings.get(name)) for name in _RULED)


def complete_rules(settings: dict[str, Any], where: str) -> None:
    """Makes plain dicts of the rules among settings that somebody gives."""
    for name in _RULED:
        if is_rule(settings.get(name)):
            settings[name] = complete_rule(settings[name], name + where, leaves_out=name == "skip_norm")


def _check_skip(rule, what):
    """Refuses a skip_norm that would leave out steps as they always are."""
    name = "scale" if isinstance(rule, QuantileNorm) else "ratio"
    factor = getattr(rule, name)
    if factor < 1 or (isinstance(rule, EmaNorm) and rule.z == 0 and factor == 1):
        above = "more than 1, or a z above 0" if factor == 1 else "1 or more"
        raise ValueError(f"{what} would leave out ordinary steps: it needs a {name} of {above}, got {factor!r}")
