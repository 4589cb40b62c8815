"""Refuses the cases in which `fastclip.step_in_backward` would be silently wrong."""

import gc
import itertools
import math
import sys

import torch

from .distributed import is_dtensor
from .norm_rules import is_rule
from .optimizer import ClippedOptimizer
from .reasons import name_of, negative, not_a_number
from .settings import of_all_gradients

# The code that calls back a torch.autograd.Function.
_FUNCTION_BACKWARD = {
    torch.autograd.function.BackwardCFunction.__dict__[name].__code__
    for name in ("apply", "apply_boxed")
    if name in torch.autograd.function.BackwardCFunction.__dict__
}


def check_arguments(model, optimizer, bucket_cap_mb):
    """Checks the arguments of `step_in_backward`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, ClippedOptimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(f"optimizer must be one of fastclip's, got {kind}")
    if type(optimizer).step is not ClippedOptimizer.step:
        raise TypeError(f"{type(optimizer).__name__} has a step() of its own, which a backward pass would not run")
    if not isinstance(bucket_cap_mb, (int, float)):
        raise not_a_number("bucket_cap_mb", bucket_cap_mb)
    if math.isnan(bucket_cap_mb) or bucket_cap_mb < 0:
        raise negative("bucket_cap_mb", bucket_cap_mb)
    if optimizer._in_backward is not None:
        raise ValueError("this optimizer steps in the backward pass already")
    if optimizer._beyond:
        raise TypeError("step_in_backward can't wait for other ranks, as norm_process_group asks for")
    check_settings(optimizer)
    check_not_replicated(optimizer)
    check_memory(model, optimizer)
    model_ids = set(map(id, model.parameters()))
    for index, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if id(param) not in model_ids:
                raise ValueError(
                    f"{name_of(group, index, i)} is not a parameter of the model: were the model's replaced after the "
                    "optimizer was made? Several models can be given as a torch.nn.ModuleList"
                )


def check_memory(model, optimizer):
    """Refuses parameters that share memory. Autograd notices an early update, but not one through another parameter."""
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    spans = []  # the memory of each parameter
    for name, param in model.named_parameters():
        if torch.nn.parameter.is_lazy(param) or param.layout != torch.strided or is_dtensor(param):
            continue
        begin, bytes_ = param.data_ptr(), param.numel() * param.element_size()
        if begin and bytes_ and torch.ops.aten.is_non_overlapping_and_dense(param):
            spans.append((begin, begin + bytes_, name, id(param) in stepped))
    spans.sort()
    for (_, end, first, first_is_stepped), (begin, _, second, second_is_stepped) in itertools.pairwise(spans):
        if begin < end and (first_is_stepped or second_is_stepped):
            raise ValueError(
                f"step_in_backward can't step '{first}' and '{second}', which share memory: one would change while the "
                "backward pass needs the other. To tie weights, let both modules have the same torch.nn.Parameter"
            )


def check_settings(optimizer):
    """Refuses settings that need all gradients first. Runs at each pass, as settings can be changed, and loaded."""
    optimizer._complete(optimizer.param_groups)
    for index, group in enumerate(optimizer.param_groups):
        for setting in of_all_gradients(group):
            if setting != "skip_nonfinite":
                raise ValueError(
                    f"step_in_backward can't apply the {setting} of param_groups[{index}]: the norm is that of several "
                    "gradients, and known when all are there; clip_value and max_update_rms, and max_norm, max_change "
                    "and max_relative_change with norm_scope='parameter', are applied to each by itself"
                )
        if group["skip_nonfinite"]:
            hint = "; a rule implies it, if you do not set it to False" if is_rule(group["max_norm"]) else ""
            raise ValueError(
                f"step_in_backward can't apply the skip_nonfinite of param_groups[{index}]: the last gradient may be "
                f"the one to skip the step for, and the others are applied by then{hint}"
            )
        if group["differentiable"]:
            raise ValueError(
                f"step_in_backward can't apply the differentiable of param_groups[{index}]: gradients are freed"
            )


def check_parameter(param, group, group_index, index):
    """Refuses shards: the gradient of a shard is not there, or not whole, when the hook of a parameter runs."""
    if hasattr(param, "_fsdp_flattened") or is_dtensor(param):
        kind = "a DTensor" if is_dtensor(param) else "of FullyShardedDataParallel"
        raise TypeError(
            f"step_in_backward can't step {name_of(group, group_index, index)}: it is {kind}, and its gradient "
            "is reduced after autograd's hooks have run"
        )


def check_not_replicated(optimizer):
    """Refuses DistributedDataParallel. It leaves no mark on the parameters, and may be given the model before or after
    `step_in_backward`. So it is looked for among all objects, if there are several processes at all."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    kind = torch.nn.parallel.DistributedDataParallel
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for replicated in [o for o in gc.get_objects() if issubclass(type(o), kind)]:
        if any(id(p) in stepped for p in replicated.parameters()):
            raise TypeError(
                "step_in_backward can't step the parameters of DistributedDataParallel: it reduces gradients "
                "after the hooks of autograd, so that each rank would step on its own; and it keeps a buffer of all "
                "gradients in any case"
            )


def check_pass(optimizer):
    """Refuses a backward pass whose steps would be wrong, before its first step."""
    check_settings(optimizer)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "step_in_backward can't step in backward(create_graph=True), whose graph needs parameters and gradients "
            "as they are: call it within accumulate(), and optimizer.step() afterwards"
        )
    frame = sys._getframe()
    while frame is not None:
        if any(frame.f_code is code for code in _FUNCTION_BACKWARD):  # torch.compile's code has no hash
            raise RuntimeError(
                "step_in_backward can't step in a backward pass within a backward pass, as the outer one may add to "
                "its gradients: use torch.utils.checkpoint with use_reentrant=False"
            )
        frame = frame.f_back
