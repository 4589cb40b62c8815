"""Sharded models: finds the ranks whose sums must be added up, and adds them up.

Each rank of FSDP2 (`fully_shard`) or of tensor parallelism holds shards of the parameters, as DTensors. The kernels
step on the shards; this module makes one norm of the sums of all ranks.
"""

import math
import sys
from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .plain.measure import combined
from .reasons import name_of


class Reduction(NamedTuple):
    """The process groups over which sums are added up, one after the other. None if all ranks hold the same."""

    groups: tuple = ()
    device_type: str = "cpu"  # the device of the tensors that these groups take
    replicated: bool = False  # a norm_process_group adds up nothing: all its ranks have the same


def is_dtensor(tensor):
    """Returns whether a tensor is a DTensor. Imports nothing: that takes seconds, and without it there is none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # another thread may be importing it
    return kind is not None and isinstance(tensor, kind)


# Wrappers that share whole parameters out: each rank makes an optimizer for its own share. Modules, and names.
_SHARE_OUT = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "fairscale.optim.oss": "FairScale's OSS",
}


def who_shares_out():
    """Names the wrapper that is making an optimizer for this rank's share of the parameters; None if there is none.
    Nothing in the arguments reveals it, so its frame is looked for on the stack."""
    loaded = {name: vars(sys.modules[module]) for module, name in _SHARE_OUT.items() if module in sys.modules}
    frame = sys._getframe() if loaded else None
    while frame:
        for name, its_globals in loaded.items():
            if frame.f_globals is its_globals:
                return name
        frame = frame.f_back
    return None


def local_of(tensor):
    """Returns this rank's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reduction_of(spec, name, replicated=False):
    """Returns the Reduction of a parameter of this name with this DTensorSpec: over the mesh dimensions that shard it.
    None stands for a tensor that is no DTensor. `replicated`: it is so in a norm_process_group.

    Raises:
        TypeError: a placement that does not say which elements are here.
        ValueError: this rank is not in the mesh.
    """
    if spec is None:
        return Reduction(replicated=replicated)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if spec.mesh.get_coordinate() is None:
        raise ValueError(f"{name} is on other ranks only: this one is not in its device mesh, {spec.mesh}")
    groups = []
    for dim, placement in enumerate(spec.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise TypeError(f"{name} is placed as {placement}: no rank holds its values")
        if spec.mesh.size(dim) > 1:
            groups.append(spec.mesh.get_group(dim))
    of_groups = Reduction(tuple(groups), spec.mesh.device_type) if groups else Reduction()
    return of_groups._replace(replicated=replicated)


@torch.no_grad()
def total_measure(reductions, measures, norm_type, found_inf=None, of_all=None, *, beyond=()):
    """Adds up the measures of all ranks, and AMP's verdicts.

    Every rank calls the same collectives in the same order, whatever it has measured itself: one per process group,
    with a few numbers each. Their order is that of `reductions`, which depends on the parameters alone.

    Args:
        reductions (list of Reduction): each once, in the order of the parameters.
        measures (list of (Reduction or None, Tensor)): measures of this rank's elements, as in csrc/rules/measure.h;
            float64, all of the same length, 3 for each measure.
        norm_type (float): 2 or inf.
        found_inf (Tensor, optional): AMP's; given on all ranks or on none.
        of_all (int, optional): the length of what is about all parameters; behind it are the measures of segments.
        beyond (sequence of ProcessGroup): whose ranks hold other parameters, which count in what is about all.

    Returns:
        (Tensor, Tensor or None): the measures of all parameters, and whether any rank has found an inf, [1]. All
        ranks get the same.
    """
    length = len(measures[0][1])
    by_reduction = {reduction: [] for reduction in reductions}
    for reduction, measure in measures:
        by_reduction.setdefault(reduction or Reduction(), []).append(measure)
    rows = {r: _sum(parts, length, norm_type, _device_of(r, parts)) for r, parts in by_reduction.items()}
    flag = torch.zeros(0, device="cpu") if found_inf is None else found_inf.detach().reshape(1)
    for group, device_type in dict.fromkeys((group, r.device_type) for r in reductions for group in r.groups):
        members = [r for r in rows if group in r.groups and r.device_type == device_type]
        own = torch.cat([*(rows[r] for r in members), flag.to(rows[members[0]])])
        *summed, flag = _all_reduced(own, norm_type, group).split([length] * len(members) + [flag.numel()])
        rows.update(zip(members, summed, strict=True))
    device = next(iter(rows.values())).device
    total = _sum([row for r, row in rows.items() if not r.replicated], length, norm_type, device)
    of_all = length if of_all is None else of_all
    for group in beyond:
        own = torch.cat([total[:of_all], flag.to(total)]).to(_taken_by(group, device))
        summed, flag = _all_reduced(own, norm_type, group).split([of_all, flag.numel()])
        total = torch.cat([summed.to(device), total[of_all:]])
    total = _sum([total, *(row for r, row in rows.items() if r.replicated)], length, norm_type, device)
    return total, None if found_inf is None else flag.to(found_inf)


def _taken_by(group, device):
    """Returns the device to which a process group's tensors go: of gloo, the CPU."""
    return torch.device("cpu") if torch.distributed.get_backend(group) == "gloo" else device


def process_groups_in(given):
    """Returns a `norm_process_group`, which is one group, several or None, as a tuple.

    Raises:
        TypeError: something else.
    """
    kind = getattr(getattr(torch, "distributed", None), "ProcessGroup", None)
    groups = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for group in groups:
        if kind is None or not isinstance(group, kind):
            raise TypeError(
                "norm_process_group must be a torch.distributed.ProcessGroup, or several, got "
                f"{group!r} of type {type(group).__name__}"
            )
    return groups


def _device_of(reduction, measures):
    """Returns the device of a reduction's sum: its groups may not take tensors of the parameters' device."""
    if reduction.groups and (not measures or measures[0].device.type != reduction.device_type):
        return torch.device(reduction.device_type)
    return measures[0].device


def _sum(measures, length, norm_type, device):
    """Adds measures up in their order, so that all ranks get the same bits."""
    total = torch.zeros(length, dtype=torch.float64, device=device)
    for measure in measures:
        total = combined(total, measure.to(device, non_blocking=device.type == "cuda"), norm_type)
    return total


def _all_reduced(numbers, norm_type, group):
    """Returns the sum, or the largest, over the ranks of `group`. A NaN stays NaN, which MAX alone does not promise."""
    dist = torch.distributed
    if norm_type != math.inf:
        dist.all_reduce(numbers, group=group)
        return numbers
    nan = numbers.isnan()
    both = torch.stack([numbers.masked_fill(nan, 0), nan.to(numbers.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0].masked_fill(both[1] > 0, torch.nan)


def over_ranks(params, names, measures, norm_type):
    """Returns the measures, float64 [parameters, 3], of whole gradients from those of the shards here. All ranks must
    call it."""
    total = measures.clone()
    by_reduction = defaultdict(list)
    for i, (param, name) in enumerate(zip(params, names, strict=True)):
        if is_dtensor(param):
            by_reduction[reduction_of(param._spec, name)].append(i)
    for reduction, rows in by_reduction.items():
        for group in reduction.groups:
            numbers = total[rows].flatten().to(reduction.device_type)
            total[rows] = _all_reduced(numbers, norm_type, group).cpu().view(-1, 3)
    return total


def on_any_rank(flags, params):
    """Returns for each parameter whether its flag, a bool, is set on any rank that has a part of it. All ranks must
    call it, and wait for each other."""
    flags = list(flags)
    mesh_groups = [
        [(param.device_mesh.get_group(dim), param.device_mesh.device_type) for dim in range(param.device_mesh.ndim)]
        if is_dtensor(param)
        else []
        for param in params
    ]
    for group, device_type in dict.fromkeys(group for groups in mesh_groups for group in groups):
        members = [i for i, groups in enumerate(mesh_groups) if (group, device_type) in groups]
        together = torch.tensor([flags[i] for i in members], dtype=torch.int32, device=device_type)
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX, group=group)
        for i, flag in zip(members, together.tolist(), strict=True):
            flags[i] = bool(flag)
    return flags


@contextmanager
def gradients_placed_as(params):
    """Places gradients as their parameters, for a `with` block. Partial gradients, for example, are summed."""
    before = [param.grad for param in params]
    try:
        place_gradients(params)
        yield
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad


def place_gradients(params):
    """Redistributes the gradients of sharded parameters to the parameters' placements. All ranks must call it."""
    for param in params:
        param.grad = param.grad.redistribute(param.device_mesh, param.placements)


@contextmanager
def local_shards(named_params):
    """Yields, for pairs (parameter, name), {parameter: its shard with the shard's gradient, or itself} and the
    Reductions of these; None in place of the Reductions if no parameter is a DTensor."""
    sharded = {param: name for param, name in named_params if is_dtensor(param)}
    local = {param: local_of(param) for param, _ in named_params}
    if not sharded:
        yield local, None
        return
    reductions = dict.fromkeys(local.values(), Reduction())
    reductions.update({local[param]: reduction_of(param._spec, name) for param, name in sharded.items()})
    trained = {param: local[param].requires_grad for param in sharded}
    try:
        for param in sharded:
            local[param].grad = local_of(param.grad)
            local[param].requires_grad_(param.requires_grad)  # those without a gradient may count in a norm, too
        yield local, reductions
    finally:
        for param in sharded:
            local[param].grad = None
            local[param].requires_grad_(trained[param])


def step_on_shards(step, numbers, groups, state, *asked):
    """Takes `step`, a step in plain torch, on this rank's shards, with the norm of all ranks. `numbers` are the names
    of states that are single numbers."""
    if not any(is_dtensor(param) for group in groups for param in group["params"]):
        return step(groups, state, *asked)
    if any(group["differentiable"] for group in groups):
        raise TypeError("a step over DTensors can't be differentiable")
    named = [(param, name_of(group, i, j)) for i, group in enumerate(groups) for j, param in enumerate(group["params"])]
    with local_shards(named) as (local, reductions):
        wholes = {shard: param for param, shard in local.items()}
        local_groups = [
            {**group, "params": [local[param] for param in group["params"]], "wholes": wholes} for group in groups
        ]
        local_state = defaultdict(dict)
        for param in local.keys() & state.keys():
            local_state[local[param]] = {name: local_of(value) for name, value in state[param].items()}
        numels = {shard: param.numel() for param, shard in local.items()}
        stats = step(local_groups, local_state, *asked, reductions, numels)
    for param, shard in local.items():
        for name, value in local_state.get(shard, {}).items():
            if name in numbers or state[param].get(name) is None:
                state[param][name] = value if name in numbers else placed_as(param, value)
    return stats


def placed_as(param, value):
    """Returns a DTensor of each rank's `value`, placed as the parameter: of its shape, or with as many rows. `value`
    itself if the parameter is no DTensor."""
    if not is_dtensor(param):
        return value
    whole = {"shape": param.shape, "stride": param.stride()}
    if value.shape != local_of(param).shape:
        row = value.shape[1]
        whole = {"shape": torch.Size((param.shape[0], row)), "stride": (row, 1)}
    return type(param).from_local(value, param.device_mesh, param.placements, run_check=False, **whole)
