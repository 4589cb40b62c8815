"""Checks for the fallback: they raise before the first write, where torch would fail in the middle of a step.

The kernels' own checks are in csrc/host; these are for the tensors that they do not cover. What both refuse is worded
in `reasons.py`.
"""

import math

import torch
from torch.optim.optimizer import _device_dtype_check_for_fused

from ..distributed import is_dtensor
from ..reasons import (
    expanded,
    incomplete,
    inference_tensor,
    name_of,
    named,
    no_count,
    no_dict,
    no_float32,
    no_tensor,
    no_uint8,
    not_one_element,
    other_device,
    other_dtype,
    other_length,
    other_shape,
)
from ..settings import LIMITS, of_all_gradients
from .quantized import BLOCK, CODES, names_of
from .rounding import has_master
from .values import KNOWN_DTYPES, KNOWN_LAYOUTS, is_sparse, item_of


def check(rule, groups, state):
    """Raises for what a step over `groups` with `state` can't be taken with, and names the parameter."""
    of_all = any(map(of_all_gradients, groups))
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
                raise expanded(where)


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
        raise not_applied("momentum_dtype", f"{where}, which is complex: give it a group with momentum_dtype=None")


def not_applied(setting, what):
    return TypeError(f"{setting} can't be applied to {what}")


def other_kind(what, kind):
    return TypeError(f"{what} is {kind}, and the parameter is not")


def check_gradient(rule, group, param, where):
    """Clips and weight decay, which not every kind of gradient has."""
    grad = param.grad
    clips = [name for name in ("clip_value", *LIMITS) if group[name] is not None]
    if is_dtensor(grad):  # of a DTensor parameter, a step in plain torch sees the shard
        raise other_kind(f"the gradient of {where}", "a DTensor")
    sparse, sparse_gradient = is_sparse(grad), f"the sparse gradient of {where}"
    if grad.is_nested and not rule.takes_nested:
        raise RuntimeError(f"{rule.title} does not support nested gradients, as that of {where}: SGD does")
    if sparse and not rule.takes_sparse:
        raise RuntimeError(f"{rule.title} does not support sparse gradients, as that of {where}: SparseAdam does")
    if param.is_complex() and not rule.takes_complex:
        raise TypeError(f"{rule.title} does not support complex parameters, as {where}")
    if sparse and (isinstance(group["weight_decay"], torch.Tensor) or group["weight_decay"] != 0):
        raise not_applied("weight_decay", sparse_gradient)
    if sparse and group["stochastic_rounding"] and rule.states(group):
        raise not_applied("stochastic_rounding", f"the sparse momentum of {where}")
    if sparse and clips:
        raise not_applied(clips[0], sparse_gradient)
    if grad.is_complex() and not param.is_complex():
        raise other_kind(f"the gradient of {where}", "complex")
    if grad.is_complex() and "clip_value" in clips:
        raise not_applied("clip_value", f"the complex gradient of {where}")


def check_states(rule, group, param, state, where):
    """Checks the states that the step would write to, as far as they are there yet."""
    entry = state.get(param, {})
    arrays = rule.states(group)
    numbers = rule.number_states if rule.counts_steps or group["stochastic_rounding"] else rule.number_states[1:]
    masters = ("master_param",) if has_master(group, param) else ()
    if not (arrays or numbers or masters):
        return
    if not isinstance(entry, dict):
        raise no_dict(f"the state of {where}", entry)
    arrays = [in_state(rule, entry, param, name, where) for name in arrays]
    there = {name: entry[name] for name in (*numbers, *arrays, *masters) if entry.get(name) is not None}
    for name, tensor in there.items():
        if not isinstance(tensor, torch.Tensor):
            raise no_tensor(f"the {name} of {where}", tensor)
    together = [name for name in (*numbers, *arrays) if name != "step" or rule.counts_steps]
    missing, present = ([name for name in together if (name in there) is has] for has in (False, True))
    if missing and present:
        raise incomplete(f"the state of {where}", missing[0], present[0])
    for name in (*arrays, *masters):
        if name in there:
            check_state(group, param, there[name], name, where)
    for name in numbers:
        if name in there:
            check_numbers(there[name], name, where, 1 if name == "step" else rule.length_of_row(group))


def in_state(rule, entry, param, name, where):
    """Returns the name under which a state is in a parameter's dict: that of its codes, where it has 8 bits. Checks the
    scales of these."""
    codes, scales = names_of(name)
    if not rule.quantizes_states or entry.get(name) is not None:
        return name
    if entry.get(codes) is None and entry.get(scales) is None:
        return name
    for missing, present in ((codes, scales), (scales, codes)):
        if entry.get(missing) is None:
            raise incomplete(f"the state of {where}", missing, present)
    what, found, blocks = f"the {scales} of {where}", entry[scales], -(-param.numel() // BLOCK)
    if not isinstance(found, torch.Tensor):
        raise no_tensor(what, found)
    check_inference(found, what)
    if found.dtype != torch.float32:
        raise no_float32(what, found)
    if found.numel() != blocks:
        raise other_length(what, found, blocks)
    return codes


def check_numbers(number, name, where, length):
    what = f"the {name} of {where}"
    if number.numel() != length:
        raise not_one_element(what, number) if length == 1 else other_length(what, number, length)
    check_inference(number, what)
    if name == "step" and not 0 <= item_of(number, unknown=0) < math.inf:  # Adam would divide by 0 at step 0
        raise no_count(what, number)


def check_inference(tensor, what):
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise inference_tensor(what)


def check_state(group, param, tensor, name, where):
    what = f"the {name} of {where}"
    if name == "master_param" and tensor.dtype != torch.float32:
        raise no_float32(what, tensor)
    is_codes = name.endswith(CODES)
    if is_codes and tensor.dtype != torch.uint8:
        raise no_uint8(what, tensor)
    check_inference(tensor, what)
    if tensor.shape != param.shape:
        raise other_shape(what, tensor, param)
    if tensor.device != param.device:
        raise other_device(what, tensor, param)
    if not is_codes and not (torch.can_cast(param.dtype, tensor.dtype) and torch.can_cast(tensor.dtype, param.dtype)):
        raise other_dtype(what, tensor, param)
    sparse_tensor, sparse_grad = map(is_sparse, (tensor, param.grad))
    if sparse_tensor and not sparse_grad:
        raise TypeError(f"{what} is sparse, and its gradient is not")
    if group.get("nesterov") and sparse_grad and not sparse_tensor:
        raise not_applied("nesterov", f"the sparse gradient of {where}: its {name} is dense")
    if overlaps(tensor):
        raise expanded(what)


def check_clip(name, parameters):
    """Checks the gradients for `fastclip.clip_grad_*`, before the first one is clipped."""
    for i, param in enumerate(parameters):
        grad = param.grad
        if grad is None:
            continue
        what = named(i, part="gradient")
        known = grad.layout == torch.strided and grad.dtype in KNOWN_DTYPES
        if not known or (grad.is_complex() and name == "clip_value"):
            raise not_applied(name, f"{what}: {grad.dtype}, {grad.layout}")
        if overlaps(grad):
            raise RuntimeError(f"{name} can't be applied in place: {expanded(what)}")


def overlaps(tensor):
    """Whether it is an expanded one, which torch refuses to write to."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
