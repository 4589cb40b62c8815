"""States in 8 bits as the numbers that they stand for, under torch's names."""

from typing import Any

import torch

from .plain import rules
from .plain.quantized import CODES, SCALES, Quantized, dequantized_state

_WITH_SIGN = {rule.momentum for rule in (rules.SGD, rules.ADAM, rules.LION)}


def dequantized(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of an optimizer's `state_dict` with float32 states in place of those in 8 bits.

    torch's optimizer loads it, and so does another toolkit. The tensors of other states are not copied.

    Args:
        state_dict (dict): of `fastclip.SGD`, `Adam`, `AdamW` or `Lion` with `state_bits=8`, also from a file, or by
            `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`.

    Raises:
        KeyError: a state has codes and no scales.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.AdamW(model.parameters(), state_bits=8)
        >>> torch.optim.AdamW(model.parameters()).load_state_dict(fastclip.dequantized(opt.state_dict()))
    """
    groups = [{**group, "state_bits": 32} for group in state_dict["param_groups"]]
    states = {key: _numbers_of(entry) for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": states, "param_groups": groups}


@torch.no_grad()
def _numbers_of(entry):
    numbers = {}
    for name, value in entry.items():
        state = name.removesuffix(CODES)
        if state != name:
            numbers[state] = dequantized_state(Quantized(value, entry[state + SCALES], state in _WITH_SIGN))
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + CODES in entry):
            numbers[name] = value
    return numbers
