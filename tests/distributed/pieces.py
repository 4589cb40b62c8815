"""Groups whose parameters were exchanged after the optimizer was made: for flat pieces, as by ZeRO, or the whole."""

import copy
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor

import fastclip

from .compare import assert_same_model, line, loop_of, on_ranks, place, whole

OPTIMIZERS = (fastclip.SGD, fastclip.Adam, fastclip.AdamW)
SETTINGS = (
    {"max_norm": 0.5},
    {"max_norm": 0.5, "skip_nonfinite": True},
    {"skip_nonfinite": True},
    {"max_norm": 0.5, "norm_scope": "parameter"},  # of a piece, it would be the piece's norm
)


def make_groups():
    """Two groups with gradients, the same on all ranks."""
    torch.manual_seed(3)
    shapes = [[(5, 3), (4,)], [(7,)]]
    groups = [{"params": [nn.Parameter(torch.randn(s, device=place.device_type)) for s in of]} for of in shapes]
    for p in params_of(groups):
        p.grad = torch.randn_like(p)
    return groups


def params_of(groups):
    return [p for group in groups for p in group["params"]]


def flat(params, ranks=1, strided=False):
    """All parameters as one flat tensor with its gradient, or this rank's part of it, padded as DeepSpeed pads."""

    def part(tensors):
        joined = torch.cat([t.detach().reshape(-1) for t in tensors])
        padding = joined.new_zeros(-joined.numel() % (2 * ranks) if ranks > 1 else 0)
        return torch.cat([joined, padding]).chunk(ranks)[dist.get_rank() % ranks].clone()

    piece = part(params).requires_grad_()
    grad = part([p.grad for p in params])
    piece.grad = torch.stack([grad, grad], 1)[:, 0] if strided else grad  # a strided one is stepped on in plain torch
    return piece


def exchange(optimizer, which, *how):
    for group in [optimizer.param_groups[i] for i in which]:
        group["params"] = [flat(group["params"], *how)]


def assert_refused(optimizer, setting, way_out="gradient_clipping"):
    params = params_of(optimizer.param_groups)
    before = [p.clone() for p in params]
    states = len(optimizer.state)
    try:
        optimizer.step()
    except TypeError as error:
        assert str(error).startswith(f"{setting} can't be applied") and way_out in str(error), error
    else:
        raise AssertionError("the step was taken")
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) and len(optimizer.state) == states


@on_ranks(2, 4)
def pieces_are_refused():
    """Pieces of all groups or of one, for the kernels and for plain torch."""
    for kind in OPTIMIZERS:
        for settings in SETTINGS:
            for which in ((0, 1), (0,), (1,)):
                for strided in (False, True):
                    optimizer = kind(make_groups(), lr=0.1, **settings)
                    exchange(optimizer, which, dist.get_world_size(), strided)
                    assert_refused(optimizer, next(iter(settings)))


@on_ranks(2)
def pieces_are_refused_where_the_rule_needs_whole_parameters():
    for kind, settings in ((fastclip.NovoGrad, {}), (fastclip.LAMB, {"max_grad_norm": None})):
        optimizer = kind(make_groups(), lr=0.1, **settings)
        exchange(optimizer, (0, 1), 2)
        assert_refused(optimizer, kind.__name__, "whole tensors")


@on_ranks(2)
def pieces_are_refused_whatever_came_before():
    """Steps over the whole, a copy, a checkpoint, a group added, a setting that was set later."""
    for change in ("steps", "copy", "checkpoint", "group", "setting"):
        optimizer = fastclip.SGD(make_groups(), lr=0.1, max_norm=None if change == "setting" else 0.5)
        if change == "steps":
            optimizer.step()
        elif change == "copy":
            optimizer = copy.deepcopy(optimizer)
            for p, q in zip(params_of(optimizer.param_groups), params_of(make_groups()), strict=True):
                p.grad = q.grad
        elif change == "checkpoint":
            optimizer.load_state_dict(fastclip.SGD(make_groups(), lr=0.1, max_norm=0.5).state_dict())
        elif change == "group":
            optimizer.add_param_group(make_groups()[0])
        exchange(optimizer, range(len(optimizer.param_groups)), 2)
        if change == "setting":
            optimizer.step()
            for group in optimizer.param_groups:
                group["max_norm"] = 0.5
        assert_refused(optimizer, "max_norm")


@on_ranks(1, 2)
def a_group_at_a_time_is_refused():
    """As DeepSpeed's ZeRO steps, on one rank, too: the norm would be that of a group."""
    optimizer = fastclip.SGD(make_groups(), lr=0.1, max_norm=0.5)
    exchange(optimizer, (0, 1))
    optimizer.param_groups = optimizer.param_groups[:1]
    with mock.patch.dict(sys.modules, {"deepspeed": types.ModuleType("deepspeed")}):
        assert_refused(optimizer, "max_norm")


@on_ranks(1)
def a_smaller_layer_on_one_rank_goes_on():
    """A new head of a model, put in by hand: without DeepSpeed, one rank has all there is."""
    optimizer = fastclip.SGD(make_groups(), lr=0.1, max_norm=0.5)
    exchange(optimizer, (0, 1))
    optimizer.step()


def assert_steps(optimizer, clip, rtol):
    """As torch does over the same tensors, as plain ones."""
    params = params_of(optimizer.param_groups)
    copies = [whole(p).detach().clone().requires_grad_() for p in params]
    for p, q in zip(params, copies, strict=True):
        q.grad = whole(p.grad).clone()
    optimizer.step()
    loop_of(copies, clip, lr=0.1, momentum=0.9).step()
    assert_same_model(params, copies, rtol)


@on_ranks(2)
def pieces_are_stepped_on_without_a_norm():
    for clip in ({}, {"clip_value": 0.1}):
        optimizer = fastclip.SGD(make_groups(), lr=0.1, momentum=0.9, **clip)
        exchange(optimizer, (0, 1), 2)
        assert_steps(optimizer, clip, rtol=0)


@on_ranks(1, 2)
def the_whole_is_stepped_on():
    """A flat copy of each group, as FP16_Optimizer makes them; new tensors of the same sizes; fewer of those given."""
    for change in ("flat", "flat of what is not frozen", "new", "fewer", "cleared and given again", "DTensors"):
        groups = make_groups()
        if change == "flat of what is not frozen":
            groups[0]["params"][1].requires_grad_(False)
        optimizer = fastclip.SGD(groups, lr=0.1, momentum=0.9, max_norm=0.5)
        if change.startswith("flat"):
            for group in optimizer.param_groups:
                group["params"] = [flat([p for p in group["params"] if p.requires_grad])]
        elif change == "new":
            for group, others in zip(optimizer.param_groups, make_groups(), strict=True):
                group["params"][:] = others["params"]
        elif change == "fewer":
            del optimizer.param_groups[0]["params"][0]
        elif change == "cleared and given again":
            optimizer.param_groups.clear()
            optimizer.param_groups.append({**optimizer.defaults, "params": []})
            optimizer.add_param_group({"params": [flat(groups[1]["params"])]})
        else:
            for group in optimizer.param_groups:
                group["params"] = [sharded(p) for p in group["params"]]
        assert_steps(optimizer, {"max_norm": 0.5}, rtol=1e-5)


def sharded(param):
    """As `fully_shard` leaves a parameter."""
    made = nn.Parameter(distribute_tensor(param.detach(), line(), [Shard(0)]))
    made.grad = distribute_tensor(param.grad, line(), [Shard(0)])
    return made


@on_ranks(2)
def parameters_that_were_sharded_in_place_are_refused():
    """As FullyShardedDataParallel(use_orig_params=True) leaves the tensors of an optimizer that was made before it."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(place.device_type)
    optimizer = fastclip.SGD(model.parameters(), lr=0.1, max_norm=0.5)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(place.device_type))
    model(torch.ones(2, 6, device=place.device_type)).sum().backward()
    before = [p.clone() for p in model.parameters()]
    assert_refused(optimizer, "max_norm")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
