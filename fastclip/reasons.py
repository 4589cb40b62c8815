"""Why a step is refused, or falls back to plain torch, in words that the kernels and plain torch share.

csrc/host looks at tensors, and asks for the words here by the name of a function; `plain/checks.py` raises the same
errors. `what` is what a message is about, as `named` has it.
"""

import torch

from ._extension import BUILD_INFO
from .plain.values import is_sparse

# ---- what a message is about ---------------------------------------------------------------------


def named(index, group=None, names=None, part=""):
    """A parameter, or a part of it, as 'the step of parameter 3 of group 0', and the parameter's name if it has one."""
    place = f"parameter {index}" if group is None else f"parameter {index} of group {group}"
    if names and index < len(names):
        place += f" ('{names[index]}')"
    return f"the {part} of {place}" if part else place


def name_of(group, group_index, index):
    """The parameter at this place of a group."""
    return named(index, group_index, group.get("param_names"))


# ---- refused: these return the error to raise ----------------------------------------------------


def no_tensor(what, value):
    return TypeError(f"{what} must be a tensor, got {type(value).__name__}")


def no_dict(what, value):
    return TypeError(f"{what} must be a dict, got {type(value).__name__}")


def no_list(what, value):
    return TypeError(f"{what} must be a list, got {type(value).__name__}")


def not_a_number(what, value):
    return TypeError(f"{what} must be a number, got {value!r} of type {type(value).__name__}")


def number_as_text(what, value):
    """YAML 1.1 reads a number with an exponent as one only if it has a point, and its exponent a sign."""
    digits, e, exponent = value.strip().lower().partition("e")
    if e and exponent:
        digits += "" if "." in digits else ".0"
        exponent = exponent if exponent[0] in "+-" else f"+{exponent}"
    return TypeError(f"{what} is the text {value!r}: write {digits}{e}{exponent}, without quotes")


def negative(what, value):
    return ValueError(f"{what} must not be negative or NaN, got {value!r}")


def not_one_element(what, tensor):
    return ValueError(f"{what} must be a 1-element tensor, got one of shape {[*tensor.shape]}")


def other_length(what, tensor, length):
    return ValueError(f"{what} must have {length} numbers, which its group's settings ask for, got {[*tensor.shape]}")


def no_shards(what):
    return TypeError(f"{what} is a DTensor: this optimizer sums over whole parameters, and takes no shards")


def no_dtensor(what):
    return TypeError(f"{what} is no DTensor, and its parameter is one")


def other_shape(what, tensor, param):
    return ValueError(f"{what} has another shape than its parameter: {[*tensor.shape]} instead of {[*param.shape]}")


def other_dtype(what, tensor, param):
    return ValueError(f"{what} has another dtype than its parameter: {tensor.dtype} instead of {param.dtype}")


def other_device(what, tensor, param):
    return ValueError(f"{what} is on another device than its parameter: {tensor.device} instead of {param.device}")


def state_elsewhere(what, tensor, param):
    return ValueError(other_placements(what, tensor, param))


def inference_tensor(what):
    return RuntimeError(f"{what} is an inference tensor, and can't be updated outside InferenceMode: .clone() it")


def expanded(what):
    return ValueError(f"{what} is an expanded view (several elements share one address): .clone() it")


def no_memory(what):
    return RuntimeError(f"{what} has no memory: its storage was resized")


def no_float32(what, tensor):
    return TypeError(f"{what} must be float32, got {tensor.dtype}")


def no_uint8(what, tensor):
    return TypeError(f"{what} must be uint8, as 8-bit states are, got {tensor.dtype}")


def no_count(what, number):
    return ValueError(f"{what} must be a count of steps, got {number.item()}")


def incomplete(what, missing, present):
    return KeyError(f"{what} has no {missing}, but has {present}: keep both, or neither")


def changed_since(what):
    return RuntimeError(
        f"the gradient of {what} was changed after its clip, which was deferred to this step: clip last, right before "
        "step(), or at once, without defer (`--clip fused` of fastclip.run)"
    )


def not_shared(groups, index):
    """A setting of a group that differs from the first group's."""
    from .settings import shared_settings  # which import the rules, and these the words

    name = next(name for name in shared_settings(groups[0]) if groups[index][name] != groups[0][name])
    return ValueError(
        f"{name} must be the same in all groups: {groups[index][name]} in param_groups[{index}], "
        f"{groups[0][name]} in param_groups[0]"
    )


# ---- left to plain torch: these return the words -------------------------------------------------

_COVERED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_KERNELS = "which fastclip has no kernels for"


def watched():
    return "a dispatch mode or a functorch transform is active"


def differentiable():
    return "the step is to be differentiable"


def shared_memory():
    return "two of the parameters and states share memory"


def other_placements(what, tensor, param):
    """A part of a DTensor parameter is placed differently. torch sums, or gathers, such gradients."""
    placed, wanted = tensor.placements, param.placements
    if placed == wanted:
        placed, wanted = f"{placed} on {tensor.device_mesh}", f"{wanted} on {param.device_mesh}"
    return f"{what} has other placements than its parameter: {placed} instead of {wanted}"


def no_kernels(what, tensor, param):
    """The kernels do not take `tensor`, which is `param` or a part of it."""
    return f"{what} {_kind(tensor) or _difference(tensor, param)}"


def no_kernels_over_ranks():
    return "what is measured before an update is on several ranks, which the kernels do not add up yet"


def no_kernels_over_devices():
    return "parameters are on several devices, and what this rule measures of each is added up on one alone"


def no_kernels_for_number(what, number, param):
    kind = _kind(number) or f"is {number.dtype} on {number.device}"
    return f"{what} {kind}, and the kernels count in float32 or float64 on {param.device}"


def no_kernels_for_codes(what, tensor, param):
    return f"{what} is {tensor.dtype} on {tensor.device}: the kernels take a parameter's states all in 8 bits, or none"


def no_kernels_for_these_codes():
    return "states in 8 bits have no GPU kernels beside float64, amsgrad, or limits on what a step adds"


def no_kernels_for_lr(lr):
    return f"lr is a {lr.dtype} tensor on {lr.device}, {_NO_KERNELS}"


def other_device_than_lr(what, param, lr):
    return f"{what} is on {param.device}, and lr is on {lr.device}"


def _kind(tensor):
    """Names the kind of a tensor, if that is one without kernels."""
    if tensor.is_nested:
        return "is nested"
    if tensor.layout != torch.strided:
        return "is sparse" if is_sparse(tensor) else f"has the layout {tensor.layout}, {_NO_KERNELS}"
    if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return f"is a tensor subclass, {type(tensor).__name__}"
    if tensor.is_complex():
        return "is complex"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazily negated or conjugated view"
    if tensor.is_cuda and not BUILD_INFO["cuda"]:
        return "is on a GPU, and fastclip was built without CUDA"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"is on device '{tensor.device}', {_NO_KERNELS}"
    return None


def _difference(tensor, param):
    """How an ordinary tensor differs from what the kernels take with its parameter."""
    if tensor.dtype not in _COVERED:
        return f"is {tensor.dtype}, {_NO_KERNELS}"
    if tensor.dtype != param.dtype and torch.float64 in (tensor.dtype, param.dtype):
        return f"is {tensor.dtype}, and its parameter is {param.dtype}"
    if tensor.device != param.device:
        return f"is on {tensor.device}, and its parameter is on {param.device}"
    if tensor.stride() != param.stride():
        return f"has another memory layout than its parameter: strides {tensor.stride()} instead of {param.stride()}"
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return f"has gaps or overlaps in memory: strides {tensor.stride()} for shape {tuple(tensor.shape)}"
    return "is of a kind without kernels"
