"""Parameters placed in every way, dtypes and ranges of gradients, and the functions that clip them in place."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastclip

from .compare import (
    CLIPS,
    Sharded,
    assert_same_model,
    assert_same_on_all_ranks,
    assert_same_stats,
    assert_state_is_placed_as_parameters,
    line,
    loop_of,
    on_ranks,
    place,
    square,
    whole,
)


@on_ranks(1, 2, 4)
def every_placement_on_one_mesh_beside_plain_tensors():
    mesh = line()
    Sharded(
        ((5, 3), mesh, [Shard(0)]),
        ((4,), None),
        ((3, 5), mesh, [Shard(1)]),
        ((7,), mesh, [Replicate()]),
        ((1,), mesh, [Shard(0)]),
        ((), mesh, [Replicate()]),
        ((0, 3), mesh, [Shard(0)]),
        ((9000,), mesh, [Shard(0)]),
    ).assert_steps_agree()


@on_ranks(2, 4)
def groups_on_different_meshes():
    mesh = square()
    model = Sharded(
        ((5, 3), line(), [Shard(0)]),
        ((6, 6), mesh, [Shard(0), Shard(1)]),
        ((6, 5), mesh, [Shard(0), Shard(0)]),
        ((6, 4), mesh, [Shard(0), Replicate()]),
        ((6, 3), mesh, [Replicate(), Shard(0)]),
        ((6, 2), mesh["dp"], [Shard(0)]),
        ((6, 1), mesh["tp"], [Shard(0)]),
        ((2, 2), None),
    )
    model.assert_steps_agree()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.params)]
    plain = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.plain)]
    optimizer, loop = fastclip.SGD(groups, max_norm=0.5), torch.optim.SGD(plain)
    model.give_grads(0)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(model.plain, 0.5)
    loop.step()
    assert_same_model(model.params, model.plain)


@on_ranks(1, 2, 4)
def a_value_clip_has_the_bits_of_one_process():
    for dtype in (torch.float32, torch.float64):
        model = Sharded(((5, 3), line(), [Shard(0)]), ((3, 9), line(), [Shard(1)]), ((4,), None), dtype=dtype)
        model.assert_steps_agree([{"clip_value": 0.5}], rtol=0, weight_decay=0.1)


@on_ranks(2, 4)
def dtypes_are_mixed_in_one_norm():
    mesh = line()
    model = Sharded(((5, 3), mesh, [Shard(0)]), ((6,), mesh, [Replicate()]), ((4,), None))
    narrow = Sharded(((5, 4), mesh, [Shard(0)]), dtype=torch.bfloat16)
    model.give_grads(0)
    narrow.give_grads(1)
    optimizer = fastclip.SGD(model.params + narrow.params, lr=0.1, max_norm=math.inf)
    optimizer.step()
    grads = [p.grad.double() for p in model.plain + narrow.plain]
    assert_same_stats(optimizer, torch.nn.utils.get_total_norm(grads), {"max_norm": math.inf})


@on_ranks(2, 4)
def master_weights_are_shards():
    for ours in (fastclip.SGD, fastclip.AdamW):
        model = Sharded(((6, 3), line(), [Shard(0)]), ((5,), line(), [Replicate()]), ((2,), None), dtype=torch.bfloat16)
        rule = {"lr": 0.1, "master_weights": True, "max_norm": 0.5}
        sharded, alone = ours(model.params, **rule), ours(model.plain, **rule)
        for step in range(3):
            model.give_grads(step)
            sharded.step()
            alone.step()
        assert_state_is_placed_as_parameters(sharded)
        for p, q in zip(model.params, model.plain, strict=True):
            assert sharded.state[p].keys() == alone.state[q].keys() >= {"master_param"}
            assert_same_model(sharded.state[p].values(), alone.state[q].values(), rtol=1e-6)


@on_ranks(1, 2, 4)
def a_limit_on_the_change_counts_all_ranks():
    """Both norms of the whole model, of shards, replicas and plain tensors; one parameter without a gradient."""
    mesh = line()
    model = Sharded(
        ((5, 3), mesh, [Shard(0)]), ((9000,), mesh, [Shard(0)]), ((7,), mesh, [Replicate()]), ((3, 1), mesh, [Shard(0)])
    )
    for limits in ({"max_change": 0.05}, {"max_relative_change": 0.01}, {"max_relative_change": 0.01, "max_norm": 1.0}):
        for norm_type in (2.0, math.inf):
            settings = {"lr": 0.1, "momentum": 0.9, "norm_type": norm_type, **limits}
            sharded, alone = fastclip.SGD(model.params, **settings), fastclip.SGD(model.plain, **settings)
            for step in range(4):
                model.give_grads(step, 10.0)
                for params in (model.params, model.plain):
                    params[step % 3].grad = None
                if step == 2:
                    with torch.no_grad():
                        for params in (model.params, model.plain):
                            params[step % 3].mul_(2)
                sharded.step()
                alone.step()
                assert_same_model(model.params, model.plain)
                stats, expected = sharded.clip_stats(), alone.clip_stats()
                assert expected.clip_coefficient < 1
                torch.testing.assert_close(stats.change, expected.change, rtol=1e-12, atol=0)
                assert_same_on_all_ranks(stats.change)
                assert_same_on_all_ranks(stats.clip_coefficient)


@on_ranks(2, 4)
def norms_of_extreme_gradients():
    """Squares that would overflow or vanish are summed apart, over ranks, too."""
    model = Sharded(((5, 3), line(), [Shard(0)]), ((6,), line(), [Replicate()]))
    for scale in (1e200, 1e-200, 1e20):
        model.give_grads(0, scale)
        optimizer = fastclip.SGD(model.params, lr=0.1, max_norm=math.inf)
        optimizer.step()
        exact = scale * torch.cat([p.grad.flatten() / scale for p in model.plain]).norm()
        assert_same_stats(optimizer, exact, {"max_norm": math.inf})


@on_ranks(1, 2, 4)
def clip_grad_functions_take_all_shards():
    mesh = line()
    for norm_type in (2.0, math.inf, 3.0):
        model = Sharded(((5, 3), mesh, [Shard(0)]), ((6,), mesh, [Replicate()]), ((1,), mesh, [Shard(0)]), ((4,), None))
        model.give_grads(0)
        if norm_type == 3.0:  # torch does not take plain tensors with DTensors
            model.params, model.plain = model.params[:3], model.plain[:3]
        norm = fastclip.clip_grad_norm_(model.params, 0.5, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(model.plain, 0.5, norm_type)
        torch.testing.assert_close(whole(norm), expected, rtol=1e-12, atol=0)
        assert_same_on_all_ranks(whole(norm))
        assert_same_model([p.grad for p in model.params], [p.grad for p in model.plain])
        fastclip.clip_grad_value_(model.params, 0.01)
        torch.nn.utils.clip_grad_value_(model.plain, 0.01)
        assert_same_model([p.grad for p in model.params], [p.grad for p in model.plain])


@on_ranks(2, 4)
def clip_grad_functions_sum_partial_gradients():
    mesh = line()
    model = Sharded(((6, 3), mesh, [Replicate()]), ((8,), mesh, [Shard(0)]))
    model.give_grads(0)
    for p, q in zip(model.params, model.plain, strict=True):
        p.grad = DTensor.from_local(q.grad / dist.get_world_size(), mesh, [Partial()])
    norm = fastclip.clip_grad_norm_(model.params, 0.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(model.plain, 0.5), rtol=1e-12, atol=0)
    assert_same_model([p.grad for p in model.params], [p.grad for p in model.plain])


@on_ranks(2, 4)
def partial_gradients_are_summed_and_stay_as_they_were():
    mesh = line()
    for clip in CLIPS:
        model = Sharded(((6, 3), mesh, [Replicate()]), ((8,), mesh, [Shard(0)]))
        optimizer = fastclip.SGD(model.params, lr=0.1, momentum=0.9, **clip)
        loop = loop_of(model.plain, clip, lr=0.1, momentum=0.9)
        for step in range(2):
            model.give_grads(step)
            for p, q in zip(model.params, model.plain, strict=True):
                p.grad = DTensor.from_local(q.grad / dist.get_world_size(), mesh, [Partial()])
            partial = [p.grad for p in model.params]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(model.params, partial, strict=True))
            assert_same_stats(optimizer, loop.step(), clip)
        assert_same_model(model.params, model.plain)
        assert_state_is_placed_as_parameters(optimizer)


def _raises(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"{error} was expected")


def _in_plain_torch(optimizer):
    """Its step, where it is known that it leaves the kernels."""

    def step():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()

    return step


@on_ranks(2, 4)
def what_can_not_be_handled_is_refused():
    mesh = line()
    p = nn.Parameter(DTensor.from_local(torch.ones(3, device=place.device_type), mesh, [Partial()]))
    _raises(TypeError, "parameter 0 of group 0", lambda: fastclip.SGD([p], lr=0.1, max_norm=1.0))
    some = DeviceMesh(place.device_type, [0])
    q = nn.Parameter(distribute_tensor(torch.ones(3, device=place.device_type), some, [Shard(0)]))
    if dist.get_rank() > 0:
        _raises(ValueError, "not in its device mesh", lambda: fastclip.SGD([q], lr=0.1, max_norm=1.0))
    r = nn.Parameter(distribute_tensor(torch.ones(4, device=place.device_type), mesh, [Shard(0)]))
    r.grad = distribute_tensor(torch.ones(4, device=place.device_type), mesh, [Shard(0)])
    optimizer = fastclip.SGD([r], lr=0.1, momentum=0.9, max_norm=1.0)
    optimizer.state[r]["momentum_buffer"] = torch.zeros(4, device=place.device_type)
    _raises((TypeError, ValueError), "momentum_buffer of parameter 0 of group 0", optimizer.step)
    _raises(TypeError, "can't be differentiable", fastclip.SGD([r], lr=0.1, differentiable=True).step)
    r.grad = distribute_tensor(torch.ones(4, device=place.device_type), square()["dp"], [Shard(0)])
    _raises((NotImplementedError, TypeError), "has other placements", fastclip.SGD([r], lr=0.1, max_norm=1.0).step)
    assert torch.equal(whole(r), torch.ones(4, device=place.device_type))
    s = nn.Parameter(torch.ones(4, device=place.device_type))
    s.grad = distribute_tensor(torch.ones(4, device=place.device_type), mesh, [Replicate()])
    for clip in ({}, {"max_norm": 1.0}):
        _raises(TypeError, "is a DTensor, and the parameter is not", _in_plain_torch(fastclip.SGD([s], lr=0.1, **clip)))
    assert s.tolist() == [1.0] * 4
