"""Limits on what a step adds, and LAMB: over shards and stages, in plain torch, with the sums of whole parameters."""

import math
import warnings

import torch
import torch.distributed as dist

import fastclip

from .compare import assert_same_model, assert_same_on_all_ranks, on_ranks
from .scopes import in_groups, make_model
from .stages import give_grads, make_params, my_pipeline, my_stage

LIMITS = [
    {"max_change": 0.05},
    {"max_relative_change": 1e-3, "max_norm": 0.5},
    {"max_update_rms": 0.3, "skip_nonfinite": True},
    {"max_change": 0.01, "max_relative_change": 1e-3, "norm_scope": "parameter", "max_update_rms": 0.5},
    {"max_relative_change": 1e-3, "norm_scope": "group"},
]
OPTIMIZERS = [(fastclip.AdamW, {}), (fastclip.LAMB, {"max_grad_norm": None})]


def step_both(sharded, alone):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastclip falls back to plain torch")
        sharded.step()
        alone.step()
    ours, theirs = sharded.clip_stats(), alone.clip_stats()
    for name in ("total_norm", "clip_coefficient", "change"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (expected is None), name
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
            assert_same_on_all_ranks(found)


@on_ranks(1, 2, 4)
def limits_on_what_is_added_are_those_of_all_ranks():
    for kind, own in OPTIMIZERS:
        for limit in ({}, *LIMITS):
            model = make_model()
            sharded, alone = (kind(in_groups(p), lr=0.1, **own, **limit) for p in (model.params, model.plain))
            for step in range(4):
                model.give_grads(step, 10.0 if step == 3 else 1.0)
                for params in (model.params, model.plain):
                    params[step % 3].grad = None
                step_both(sharded, alone)
            assert_same_model(model.params, model.plain)


@on_ranks(2, 4)
def a_gradient_that_one_rank_lacks_counts_as_none():
    """Of a shard; the others' sums stay with their own parameters."""
    for limit in ({"max_change": 0.05}, {"max_change": 0.01, "norm_scope": "parameter", "max_update_rms": 0.5}):
        model = make_model()
        settings = {"lr": 0.1, "weight_decay": 0.0, **limit}
        sharded, alone = (fastclip.AdamW(in_groups(p), **settings) for p in (model.params, model.plain))
        model.give_grads(0)
        last = dist.get_world_size() - 1
        model.plain[1].grad.chunk(last + 1)[last].zero_()  # a first step by zeros adds nothing
        if dist.get_rank() == last:
            model.params[1].grad = None
        step_both(sharded, alone)
        assert_same_model(model.params, model.plain)


@on_ranks(1, 2, 4)
def limits_on_a_change_of_segments_are_those_of_all_ranks():
    for scope in ("group", "parameter"):
        for limit in ({"max_change": 0.05}, {"max_relative_change": 1e-3, "max_norm": 0.5}):
            model = make_model()
            settings = {"lr": 0.1, "momentum": 0.9, "norm_scope": scope, **limit}
            sharded, alone = (fastclip.SGD(in_groups(p), **settings) for p in (model.params, model.plain))
            for step in range(4):
                model.give_grads(step)
                for params in (model.params, model.plain):
                    params[step % 3].grad = None
                step_both(sharded, alone)
            assert_same_model(model.params, model.plain)


@on_ranks(2, 4)
def limits_on_what_is_added_are_those_of_all_stages():
    limits = [{"max_change": 0.05}, {"max_change": 0.05, "max_norm": 0.5, "max_update_rms": 0.3}]
    for kind, own in OPTIMIZERS:
        for limit in limits:
            whole, mine = make_params()
            alone = kind([p for params in whole for p in params], lr=0.1, **own, **limit)
            optimizer = kind(mine, lr=0.1, norm_process_group=my_pipeline(), **own, **limit)
            for step in range(4):
                give_grads(whole, mine, step, without=(step % 2,) if step == 2 else ())
                step_both(optimizer, alone)
                assert not math.isnan(optimizer.clip_stats().change)
            for p, q in zip(mine, whole[my_stage()], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
