"""What plain torch would find out in the middle of a step: refused before anything is changed.

The kernels' own checks are in csrc; these are for the tensors that they do not cover.
"""

import math

import torch
from torch.optim.optimizer import _device_dtype_check_for_fused

from .names import name_of
from .values import KNOWN_DTYPES, KNOWN_LAYOUTS, is_sparse, item_of


def check(rule, groups, state):
    """Raises for what a step over `groups` with `state` can't be taken with, and names the parameter."""
    of_all = any(group["max_norm"] is not None or group["skip_nonfinite"] for group in groups)
    kinds = {}  # of devices: with values, and without
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            where = name_of(group, index, i)
            kinds.setdefault(param.is_meta, where)
            if of_all and len(kinds) > 1:
                raise TypeError(f"{kinds[True]} is on meta, and {kinds[False]} is not: they have no norm together")
            check_dtypes(rule, group, param, where)
            check_gradient(rule, group, param, where)
            check_states(rule, group, param, state, where)
            if overlaps(param):
                raise ValueError(f"{where} holds several elements at one address")


def check_dtypes(rule, group, param, where):
    """Which tensors an optimizer steps on at all."""
    if group.get("fused"):
        _device_dtype_check_for_fused(param)
    for tensor, what in ((param, where), (param.grad, f"the gradient of {where}")):
        if tensor.layout not in KNOWN_LAYOUTS:
            raise TypeError(f"{what} has the layout {tensor.layout}, which no step is made for")
        if tensor.dtype not in KNOWN_DTYPES:
            raise TypeError(
                f"{what} is {tensor.dtype}: a step needs floating-point or complex numbers of 16 bits or more"
            )
    if group["momentum_dtype"] and rule.states(group) and param.is_complex():
        raise TypeError(
            f"momentum_dtype can't be applied to {where}, which is complex: give it a group with momentum_dtype=None"
        )


def check_gradient(rule, group, param, where):
    """Clips and weight decay, which not every kind of gradient has."""
    grad = param.grad
    clips = [name for name in ("clip_value", "max_norm") if group[name] is not None]
    if hasattr(grad, "full_tensor"):  # of a DTensor parameter, a step in plain torch sees the shard
        raise TypeError(f"the gradient of {where} is a DTensor, and the parameter is not")
    sparse = is_sparse(grad)
    if grad.is_nested and not rule.takes_nested:
        raise RuntimeError(f"{rule.title} does not support nested gradients, as that of {where}; SGD does")
    if sparse and not rule.takes_sparse:
        raise RuntimeError(f"{rule.title} does not support sparse gradients, as that of {where}: SparseAdam does")
    if param.is_complex() and not rule.takes_complex:
        raise TypeError(f"{rule.title} does not support complex parameters, as {where}")
    if sparse and (isinstance(group["weight_decay"], torch.Tensor) or group["weight_decay"] != 0):
        raise TypeError(f"weight_decay can't be applied to the sparse gradient of {where}")
    if sparse and group["stochastic_rounding"] and rule.states(group):
        raise TypeError(f"stochastic_rounding can't be applied to the sparse momentum of {where}")
    if sparse and clips:
        raise TypeError(f"{clips[0]} can't be applied to the sparse gradient of {where}")
    if grad.is_complex() and not param.is_complex():
        raise TypeError(f"the gradient of {where} is complex, and the parameter is not")
    if grad.is_complex() and "clip_value" in clips:
        raise TypeError(f"clip_value can't be applied to the complex gradient of {where}")


def check_states(rule, group, param, state, where):
    """What the step would write to besides the parameter, as far as it is there yet."""
    entry = state.get(param, {})
    names = rule.states(group)
    if (names or rule.counts_steps) and not isinstance(entry, dict):
        raise TypeError(f"the state of {where} must be a dict, got {type(entry).__name__}")
    numbers = rule.number_states if rule.counts_steps else ()
    there = [name for name in (*numbers, *names) if entry.get(name) is not None]
    for name in (*numbers, *names):
        if name not in there:
            if there:
                raise KeyError(f"the state of {where} has no {name}, but others that belong to it")
        elif name in numbers:
            check_number(entry[name], name, where)
        else:
            check_state(group, param, entry[name], name, where)


def check_number(number, name, where):
    if not isinstance(number, torch.Tensor):
        raise TypeError(f"the {name} of {where} must be a tensor, got {type(number).__name__}")
    if number.numel() != 1:
        raise ValueError(f"the {name} of {where} must be a 1-element tensor, got {[*number.shape]}")
    if name == "step" and not 0 <= item_of(number, unknown=0) < math.inf:  # Adam would divide by 0 at step 0
        raise ValueError(f"the step of {where} must be a count of steps, and is negative, infinite or NaN")


def check_state(group, param, tensor, name, where):
    what = f"the {name} of {where}"
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != param.shape:
        raise ValueError(f"{what} has another shape than the parameter: {[*tensor.shape]}, {[*param.shape]}")
    if tensor.device != param.device:
        raise ValueError(f"{what} is on another device than the parameter: {tensor.device}, {param.device}")
    if not (torch.can_cast(param.dtype, tensor.dtype) and torch.can_cast(tensor.dtype, param.dtype)):
        raise ValueError(f"{what} has another dtype than the parameter: {tensor.dtype}, {param.dtype}")
    sparse_tensor, sparse_grad = map(is_sparse, (tensor, param.grad))
    if sparse_tensor and not sparse_grad:
        raise TypeError(f"{what} is sparse, and its gradient is not")
    if group.get("nesterov") and sparse_grad and not sparse_tensor:
        raise TypeError(f"nesterov can't be applied to the sparse gradient of {where}: its {name} is dense")
    if overlaps(tensor):
        raise ValueError(f"{what} holds several elements at one address")


def check_clip(name, parameters):
    """What `fastclip.clip_grad_*` would find out when some gradients are clipped already."""
    for i, param in enumerate(parameters):
        grad = param.grad
        if grad is None:
            continue
        known = grad.layout == torch.strided and grad.dtype in KNOWN_DTYPES
        if not known or (grad.is_complex() and name == "clip_value"):
            raise TypeError(f"{name} can't be applied to the gradient of parameter {i}: {grad.dtype}, {grad.layout}")
        if overlaps(grad):
            raise RuntimeError(
                f"{name} can't be applied in place: the gradient of parameter {i} holds several elements at one address"
            )


def overlaps(tensor):
    """Whether it is an expanded one, which torch refuses to write to."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
