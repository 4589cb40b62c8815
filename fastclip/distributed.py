"""Sharded models: over which ranks the sums of the shards have to be added up, and how that is done.

Each rank of FSDP2 (`fully_shard`) or of tensor parallelism holds shards of the parameters, as DTensors. The kernels
step on the shards; what is here makes one norm of their sums.
"""

import math
import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .measure import combined


class Reduction(NamedTuple):
    """The process groups over which sums are added up, one after the other: none where all ranks hold the same."""

    groups: tuple = ()
    device_type: str = "cpu"  # of the tensors that these groups take


def is_dtensor(tensor):
    """Without an import that takes seconds: where nobody has made it, there is no DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor):
    """The shard of a DTensor that is here; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reduction_of(spec):
    """The Reduction of a parameter with this DTensorSpec: over each dimension of its mesh in which it is sharded.

    Raises:
        TypeError: a placement that says nothing about which elements are here.
        ValueError: this rank is not in the mesh.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if spec.mesh.get_coordinate() is None:
        raise ValueError(f"this rank is not in the device mesh of a parameter: {spec.mesh}")
    groups = []
    for dim, placement in enumerate(spec.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise TypeError(f"a parameter can't be placed as {placement}: no rank holds its values")
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
        measures (list of (Reduction, Tensor)): float64 [3] of csrc/clip_rules.h, of what is here.
        norm_type (float): 2 or inf.
        found_inf (Tensor, optional): AMP's; given on all ranks or on none.

    Returns:
        (Tensor, Tensor or None): the measure of all parameters, [3], and whether any rank has found an inf, [1]; the
        same on all ranks.
    """
    of_class = {reduction: [] for reduction in reductions}
    for reduction, measure in measures:
        of_class.setdefault(reduction, []).append(measure)
    rows = {r: _sum(list_, norm_type, _device_of(r, list_)) for r, list_ in of_class.items()}
    flag = torch.zeros(0) if found_inf is None else found_inf.detach().reshape(1)
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


@contextmanager
def gradients_placed_as(params):
    """Redistributes gradients that are placed otherwise than their parameters, say Partial ones, for a `with` block."""
    before = [(p, p.grad) for p in params if is_misplaced(p)]
    try:
        place_gradients(p for p, _ in before)
        yield
    finally:
        for param, grad in before:
            param.grad = grad


def place_gradients(params):
    """Redistributes gradients to the placements of their parameters. A collective: all ranks call it."""
    for param in params:
        if is_misplaced(param):
            param.grad = param.grad.redistribute(param.device_mesh, param.placements)


def is_misplaced(param):
    """Whether a DTensor has a gradient that is placed otherwise."""
    grad = param.grad
    if not (is_dtensor(param) and is_dtensor(grad)) or grad._spec is param._spec:
        return False
    return grad.placements != param.placements or grad.device_mesh != param.device_mesh
