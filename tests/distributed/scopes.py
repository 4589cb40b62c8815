"""Norms of groups and of parameters: over all ranks that hold a part of them, in one message."""

import math
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import fastclip

from .compare import Sharded, assert_same_model, assert_same_on_all_ranks, line, on_ranks

SCOPES = ("group", "parameter")
LIMITS = [
    {"max_norm": 0.5},
    {"max_norm": 0.2, "norm_type": math.inf},
    {"max_norm": fastclip.QuantileNorm(0.5, scale=0.9, window=4, warmup=2)},
    {"max_norm": fastclip.EmaNorm(z=0.5, decay=0.8, warmup=3), "skip_norm": 800.0},
]
HISTORIES = ("clip_history_of_group", "clip_history_of_parameter")


def make_model():
    """A group may have parameters that are sharded, and others that are not; the last one has an element on the first
    rank only."""
    mesh = line()
    return Sharded(
        ((5, 3), mesh, [Shard(0)]),
        ((9000,), mesh, [Shard(0)]),
        ((7,), mesh, [Replicate()]),
        ((4,), None, None),
        ((1,), mesh, [Shard(0)]),
    )


def in_groups(params):
    return [{"params": params[:3]}, {"params": params[3:]}]


@on_ranks(1, 2, 4)
def norms_of_segments_are_those_of_all_ranks():
    for scope in SCOPES:
        for limit in LIMITS:
            model = make_model()
            sharded, alone = (
                fastclip.SGD(in_groups(p), lr=0.1, momentum=0.9, norm_scope=scope, **limit)
                for p in (model.params, model.plain)
            )
            for step in range(8):
                model.give_grads(step, 10.0 if step % 5 == 4 else 1.0)
                for params in (model.params, model.plain):
                    params[step % 3].grad = None
                sharded.step()
                alone.step()
                ours, theirs = sharded.clip_stats(), alone.clip_stats()
                assert ours.skipped == theirs.skipped
                for name in ("total_norm", "clip_coefficient"):
                    pair = getattr(ours, name), getattr(theirs, name)
                    torch.testing.assert_close(*pair, rtol=1e-12, atol=0)
                    assert_same_on_all_ranks(getattr(ours, name))
            assert_same_model(model.params, model.plain)
            for ours, theirs in zip(model.params, model.plain, strict=True):
                for name in HISTORIES:
                    found, expected = (o.state[p].get(name) for o, p in ((sharded, ours), (alone, theirs)))
                    assert (found is None) == (expected is None)
                    if found is not None:
                        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
                        for number in found:
                            assert_same_on_all_ranks(number)


@on_ranks(1, 2, 4)
def novograd_takes_the_norms_of_whole_parameters():
    for limit in ({}, {"max_norm": 0.5}, {"max_norm": 0.1, "norm_scope": "parameter"}, {"skip_nonfinite": True}):
        model = make_model()
        sharded, alone = (fastclip.NovoGrad(p, lr=0.1, weight_decay=0.01, **limit) for p in (model.params, model.plain))
        for step in range(4):
            model.give_grads(step)
            for params in (model.params, model.plain):
                params[step % 3].grad = None
            sharded.step()
            alone.step()
        assert_same_model(model.params, model.plain)
        for ours, theirs in zip(model.params, model.plain, strict=True):
            found, expected = (o.state[p]["exp_avg_sq"] for o, p in ((sharded, ours), (alone, theirs)))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            assert_same_on_all_ranks(found)


@on_ranks(2, 4)
def all_segments_travel_in_one_message():
    counts = {}
    for scope in ("global", *SCOPES):
        model = make_model()
        optimizer = fastclip.SGD(in_groups(model.params), lr=0.1, max_norm=0.5, norm_scope=scope)
        model.give_grads(0)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            optimizer.step()
        counts[scope] = all_reduce.call_count
    assert counts == {"global": 1, "group": 1, "parameter": 1}


@on_ranks(2, 4)
def a_nan_on_one_rank_enters_no_history_of_a_segment():
    for scope, name in zip(SCOPES, HISTORIES, strict=True):
        model = make_model()
        optimizer = fastclip.SGD(in_groups(model.params), lr=0.1, norm_scope=scope, **LIMITS[2])
        for step in range(4):
            model.give_grads(step)
            if step == 2 and dist.get_rank() == 1:
                model.params[0].grad._local_tensor[0] = math.nan
            optimizer.step()
            assert optimizer.clip_stats().skipped == (step == 2)
        seen = [entry[name][0].item() for entry in optimizer.state.values() if name in entry]
        assert seen == [3.0] * (2 if scope == "group" else 5)
