"""Arguments as configuration files give them: text for numbers, lists for pairs, names for dtypes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .norm_rules import complete_rules
from .reasons import negative, not_a_number, number_as_text

_WORDS = ("params", "param_names", "momentum_dtype")  # settings that are no numbers
_SWITCHES = ("norm_replicated", "skip_nonfinite", "master_weights", "stochastic_rounding")


def complete_settings(settings: dict[str, Any], known: Iterable[str], where: str = "") -> None:
    """Gives settings the types that an optimizer keeps: rules become dicts, other sequences tuples, and names of dtypes
    dtypes. Leaves keys alone that are not among the `known`. `where` is what messages end with, as
    " in param_groups[1]".

    Raises:
        TypeError: a number, or True or False, that is text; ValueError: no dtype of that name, or a bad rule.
    """
    for name in settings.keys() & set(known):
        if name in _SWITCHES and isinstance(settings[name], str):
            raise TypeError(f"{name}{where} must be True or False, got the text {settings[name]!r}")
        if name not in _WORDS:
            settings[name] = complete_value(name + where, settings[name])
    if isinstance(settings.get("momentum_dtype"), str):
        settings["momentum_dtype"] = _dtype_of(settings["momentum_dtype"], where)
    complete_rules(settings, where)


def complete_value(what: str, value: Any) -> Any:
    """Returns a value, a pair as a list or tuple: OmegaConf's ListConfig is neither, and no checkpoint should hold it.
    Refuses text in the place of a number: YAML 1.1 makes text of 1e-3, and torch compares it with 0."""
    if isinstance(value, Sequence) and not isinstance(value, (str, list, tuple)):
        value = tuple(value)
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, str) and not each.isidentifier():  # "inf" is a norm_type
            try:
                float(each)
            except ValueError:
                continue  # a word, or not what torch takes, which says so
            raise number_as_text(what, each)
    return value


def check_not_negative(**numbers: Any) -> None:
    """Refuses arguments of a constructor that are no numbers, negative or NaN; for optimizers that torch has not.

    Raises:
        TypeError, ValueError: which name the argument.
    """
    for name, value in numbers.items():
        if isinstance(complete_value(name, value), str) or value is None:
            raise not_a_number(name, value)
        if not value >= 0:
            raise negative(name, value)


def complete_group(group: Any) -> Any:
    """Takes `named_params` for the `params` of a group, as icefall's groups have them: pairs of a name and a tensor."""
    if isinstance(group, Mapping) and "params" not in group and "named_params" in group:
        return {"params" if name == "named_params" else name: value for name, value in group.items()}
    return group


def complete_params(params: Any) -> Any:
    """Does that for the groups among the parameters of a new optimizer. Leaves all else as it is, to be read once."""
    return [complete_group(group) for group in params] if groups_among(params) else params


def groups_among(params: Any) -> list[Mapping[str, Any]]:
    """Returns the groups among the parameters of a new optimizer; none where these are tensors, or to be read once."""
    return [group for group in params if isinstance(group, Mapping)] if isinstance(params, (list, tuple)) else []


def _dtype_of(name, where):
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"momentum_dtype{where} must be a dtype of torch, or its name, as 'bfloat16', got {name!r}")
    return dtype
