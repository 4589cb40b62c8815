"""The settings that fastclip adds to an optimizer's groups: named once, here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict, TypeVar

import torch

from .norm_rules import EmaNorm, QuantileNorm

# Each setting, with the value that means torch's own step.
OWN_SETTINGS = {
    "clip_value": None,
    "max_norm": None,
    "skip_norm": None,
    "norm_type": 2.0,
    "max_change": None,
    "max_relative_change": None,
    "skip_nonfinite": False,
    "master_weights": False,
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "momentum_dtype": None,
}
LIMITS = ("max_norm", "skip_norm", "max_change", "max_relative_change")  # each on a norm over all gradients
SHARED_SETTINGS = (*LIMITS, "norm_type", "skip_nonfinite")  # the same in all groups


# A limit on the norm: a number, or a rule, see `fastclip.QuantileNorm` and `fastclip.EmaNorm`.
NormLimit: TypeAlias = float | QuantileNorm | EmaNorm | Mapping[str, Any] | str | None


class ClipSettings(TypedDict, total=False):
    """The keywords that each optimizer of fastclip takes besides torch's; see `fastclip.SGD` for what they mean."""

    clip_value: float | tuple[float, float] | None
    max_norm: NormLimit
    skip_norm: NormLimit
    norm_type: float
    max_change: float | None
    max_relative_change: float | None
    skip_nonfinite: bool
    master_weights: bool
    stochastic_rounding: bool
    rounding_seed: int
    momentum_dtype: torch.dtype | str | None


def of_all_gradients(group):
    """Names the settings of a group that look at all gradients. A limit of 0 is one, too."""
    limits = [name for name in LIMITS if group.get(name) is not None]
    return [*limits, "skip_nonfinite"] if group.get("skip_nonfinite") else limits


Init = TypeVar("Init", bound=Callable[..., Any])


def lists_clip_settings(init: Init) -> Init:
    """Makes `help()`, `inspect.signature` and type hints list the settings by name in place of `**clip`."""
    signature = inspect.signature(init)
    own = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=ClipSettings.__annotations__[name]
        )
        for name, value in OWN_SETTINGS.items()
    ]
    others = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    init.__signature__ = signature.replace(parameters=[*others, *own])  # type: ignore[attr-defined]
    init.__annotations__ = {name: hint for name, hint in init.__annotations__.items() if name != "clip"}
    hints = {name: ClipSettings.__annotations__[name] for name in OWN_SETTINGS}
    init.__annotations__ |= {**hints, "return": None}
    return init
