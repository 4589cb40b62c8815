"""Sharded models: over which ranks the sums of the shards have to be added up, and how that is done.

Each rank of FSDP2 (`fully_shard`) or of tensor parallelism holds shards of the parameters, as DTensors. The kernels
step on the shards; what is here makes one norm of their sums.
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
    """The process groups over which sums are added up, one after the other: none where all ranks hold the same."""

    groups: tuple = ()
    device_type: str = "cpu"  # of the tensors that these groups take


def is_dtensor(tensor):
    """Without an import that takes seconds: where nobody has made it, there is no DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # another thread may be importing it
    return kind is not None and isinstance(tensor, kind)


# What shares whole parameters out, each rank making an optimizer for its own: their modules, and their names.
_SHARE_OUT = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "fairscale.optim.oss": "FairScale's OSS",
}


def who_shares_out():
    """The name of what is making an optimizer for this rank's share of the parameters, or None. Nothing that it hands
    over tells, so its frame has to."""
    loaded = {name: vars(sys.modules[module]) for module, name in _SHARE_OUT.items() if module in sys.modules}
    frame = sys._getframe() if loaded else None
    while frame:
        for name, its_globals in loaded.items():
            if frame.f_globals is its_globals:
                return name
        frame = frame.f_back
    return None


def local_of(tensor):
    """The shard of a DTensor that is here; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reduction_of(spec, name):
    """The Reduction of a parameter of this name with this DTensorSpec: the dimensions of its mesh that shard it.

    Raises:
        TypeError: a placement that says nothing about which elements are here.
        ValueError: this rank is not in the mesh.
    """
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
    return Reduction(tuple(groups), spec.mesh.device_type) if groups else Reduction()


@torch.no_grad()
def total_measure(reductions, measures, norm_type, found_inf=None):
    """Adds up what all ranks have measured, and AMP's verdicts.

    Every rank calls the same collectives in the same order, one per process group and with a few numbers each, whatever
    it has measured itself; their order is that of `reductions`, which follows from the parameters alone.

    Args:
        reductions (list of Reduction): each once, as the parameters come.
        measures (list of (Reduction or None, Tensor)): float64 [3] of csrc/rules/clip.h, of what is here.
        norm_type (float): 2 or inf.
        found_inf (Tensor, optional): AMP's; given on all ranks or on none.

    Returns:
        (Tensor, Tensor or None): the measure of all parameters, [3], and whether any rank has found an inf, [1]; the
        same on all ranks.
    """
    of_class = {reduction: [] for reduction in reductions}
    for reduction, measure in measures:
        of_class.setdefault(reduction or Reduction(), []).append(measure)
    rows = {r: _sum(list_, norm_type, _device_of(r, list_)) for r, list_ in of_class.items()}
    flag = torch.zeros(0, device="cpu") if found_inf is None else found_inf.detach().reshape(1)
    for group, device_type in dict.fromkeys((group, r.device_type) for r in reductions for group in r.groups):
        members = [r for r in rows if group in r.groups and r.device_type == device_type]
        own = torch.cat([*(rows[r] for r in members), flag.to(rows[members[0]])])
        *summed, flag = _all_reduced(own, norm_type, group).split([3] * len(members) + [flag.numel()])
        rows.update(zip(members, summed, strict=True))
    device = next(iter(rows.values())).device
    return _sum(list(rows.values()), norm_type, device), None if found_inf is None else flag.to(found_inf)


def _device_of(reduction, measures):
    """Where the sums of a class are added up: its groups may not take tensors of the parameters' device."""
    if reduction.groups and (not measures or measures[0].device.type != reduction.device_type):
        return torch.device(reduction.device_type)
    return measures[0].device


def _sum(measures, norm_type, device):
    """One measure of several: in their order, so that all ranks get the same bits."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for measure in measures:
        total = combined(total, measure.to(device, non_blocking=device.type == "cuda"), norm_type)
    return total


def _all_reduced(numbers, norm_type, group):
    """Over the ranks of `group`: the sum, or the largest. A NaN stays one, which MAX alone does not promise."""
    dist = torch.distributed
    if norm_type != math.inf:
        dist.all_reduce(numbers, group=group)
        return numbers
    nan = numbers.isnan()
    both = torch.stack([numbers.masked_fill(nan, 0), nan.to(numbers.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0].masked_fill(both[1] > 0, torch.nan)


def on_any_rank(flags, params):
    """For each parameter whether its flag, a bool, is set on any rank that has a part of it. All ranks have to call it,
    and wait for each other."""
    flags = list(flags)
    groups_of = [
        [(param.device_mesh.get_group(dim), param.device_mesh.device_type) for dim in range(param.device_mesh.ndim)]
        if is_dtensor(param)
        else []
        for param in params
    ]
    for group, device_type in dict.fromkeys(group for groups in groups_of for group in groups):
        members = [i for i, groups in enumerate(groups_of) if (group, device_type) in groups]
        together = torch.tensor([flags[i] for i in members], dtype=torch.int32, device=device_type)
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX, group=group)
        for i, flag in zip(members, together.tolist(), strict=True):
            flags[i] = bool(flag)
    return flags


@contextmanager
def gradients_placed_as(params):
    """For a `with` block, gradients that are placed as their parameters: Partial ones are summed, say."""
    before = [param.grad for param in params]
    try:
        place_gradients(params)
        yield
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad


def place_gradients(params):
    """Redistributes the gradients of sharded parameters to the parameters' placements. All ranks have to call it."""
    for param in params:
        param.grad = param.grad.redistribute(param.device_mesh, param.placements)


@contextmanager
def local_shards(named_params):
    """For a `with` block over pairs (parameter, name): {parameter: its shard with its gradient, or itself}, and the
    Reductions of these; None where no parameter is a DTensor."""
    sharded = {param: name for param, name in named_params if is_dtensor(param)}
    local = {param: local_of(param) for param, _ in named_params}
    if not sharded:
        yield local, None
        return
    reductions = dict.fromkeys(local.values(), Reduction())
    reductions.update({local[param]: reduction_of(param._spec, name) for param, name in sharded.items()})
    try:
        for param in sharded:
            local[param].grad = local_of(param.grad)
        yield local, reductions
    finally:
        for param in sharded:
            local[param].grad = None


def step_on_shards(step, numbers, groups, state, *amp):
    """A step in plain torch: `step`, on what is here of each parameter, with the norm of all ranks. `numbers` are the
    names of states that are single numbers."""
    if not any(is_dtensor(param) for group in groups for param in group["params"]):
        return step(groups, state, *amp)
    if any(group["differentiable"] for group in groups):
        raise TypeError("a step over DTensors can't be differentiable")
    named = [(param, name_of(group, i, j)) for i, group in enumerate(groups) for j, param in enumerate(group["params"])]
    with local_shards(named) as (local, reductions):
        local_groups = [{**group, "params": [local[param] for param in group["params"]]} for group in groups]
        local_state = defaultdict(dict)
        for param in local.keys() & state.keys():
            local_state[local[param]] = {name: local_of(value) for name, value in state[param].items()}
        stats = step(local_groups, local_state, *amp, reductions)
    for param, shard in local.items():
        for name, value in local_state.get(shard, {}).items():
            if state[param].get(name) is None:
                state[param][name] = value if name in numbers else placed_as(param, value)
    return stats


def placed_as(param, value):
    """A DTensor of `value` on each rank, where the parameter is one."""
    if not is_dtensor(param):
        return value
    whole = {"shape": param.shape, "stride": param.stride()}
    return type(param).from_local(value, param.device_mesh, param.placements, run_check=False, **whole)
