"""The settings that fastclip adds to an optimizer's groups: named once, here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict, TypeVar

import torch

from .norm_rules import EmaNorm, QuantileNorm, is_rule

# Each setting, with the value that means torch's own step.
OWN_SETTINGS = {
    "clip_value": None,
    "max_norm": None,
    "skip_norm": None,
    "norm_type": 2.0,
    "norm_scope": "global",
    "norm_replicated": False,
    "max_change": None,
    "max_relative_change": None,
    "max_update_rms": None,
    "skip_nonfinite": False,
    "master_weights": False,
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "momentum_dtype": None,
    "state_bits": 32,
}
LIMITS = ("max_norm", "skip_norm", "max_change", "max_relative_change")  # each on a norm
SCOPES = ("global", "group", "parameter")  # over which SCOPED take norms
SCOPED = ("max_norm", "max_change", "max_relative_change")
# The same in all groups; but for SCOPED, unless the scope is "global".
SHARED_SETTINGS = ("norm_scope", *LIMITS, "norm_type", "skip_nonfinite")


# A limit on the norm: a number, or a rule, see `fastclip.QuantileNorm` and `fastclip.EmaNorm`.
NormLimit: TypeAlias = float | QuantileNorm | EmaNorm | Mapping[str, Any] | str | None


class ClipSettings(TypedDict, total=False):
    """The keywords that each optimizer of fastclip takes besides torch's; see `fastclip.SGD` for what they mean."""

    clip_value: float | tuple[float, float] | None
    max_norm: NormLimit
    skip_norm: NormLimit
    norm_type: float
    norm_scope: str
    norm_replicated: bool
    max_change: float | None
    max_relative_change: float | None
    max_update_rms: float | None
    skip_nonfinite: bool
    master_weights: bool
    stochastic_rounding: bool
    rounding_seed: int
    momentum_dtype: torch.dtype | str | None
    state_bits: int
    norm_process_group: Any  # of the optimizer, and no setting of its groups


def set_limits(group):
    """Names the limits of a group that are set. A limit of 0 is one, too."""
    return [name for name in (*LIMITS, "max_update_rms") if group.get(name) is not None]


def of_whole_gradients(group):
    """Names the settings of a group that look at whole gradients, and not at their elements alone."""
    limits = set_limits(group)
    return [*limits, "skip_nonfinite"] if group.get("skip_nonfinite") else limits


def of_all_gradients(group):
    """Names those of them that look at more than one gradient."""
    own = ("max_update_rms", *(SCOPED if group.get("norm_scope") == "parameter" else ()))
    return [name for name in of_whole_gradients(group) if name not in own]


def needs_skip_nonfinite(group):
    """Returns whether a rule among a group's limits needs `skip_nonfinite`: a step that is not left out would go on
    without the norm that it looks at. The norm of one parameter concerns no other."""
    return is_rule(group["skip_norm"]) or (is_rule(group["max_norm"]) and group["norm_scope"] != "parameter")


def shared_settings(group):
    """Names the settings that this group and all others have in common."""
    own = () if group.get("norm_scope") == "global" else SCOPED
    return [name for name in SHARED_SETTINGS if name not in own]


_KEYWORDS = {**OWN_SETTINGS, "norm_process_group": None}
Init = TypeVar("Init", bound=Callable[..., Any])


def lists_clip_settings(init: Init) -> Init:
    """Makes `help()`, `inspect.signature` and type hints list the settings by name in place of `**clip`."""
    signature = inspect.signature(init)
    own = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=ClipSettings.__annotations__[name]
        )
        for name, value in _KEYWORDS.items()
    ]
    others = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    init.__signature__ = signature.replace(parameters=[*others, *own])  # type: ignore[attr-defined]
    init.__annotations__ = {name: hint for name, hint in init.__annotations__.items() if name != "clip"}
    hints = {name: ClipSettings.__annotations__[name] for name in _KEYWORDS}
    init.__annotations__ |= {**hints, "return": None}
    return init
