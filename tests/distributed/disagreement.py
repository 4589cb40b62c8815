"""Ranks that see something else than the others: no gradient, one that is not finite, or not covered, an overflow."""

import math
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

import fastclip

from .compare import (
    CLIPS,
    Sharded,
    assert_same_model,
    assert_same_on_all_ranks,
    assert_same_stats,
    assert_state_is_placed_as_parameters,
    batch,
    line,
    loop_of,
    mine,
    on_ranks,
    place,
    whole,
)
from .models import loss_of_all_rows, loss_of_my_rows, make_model, train_both


@on_ranks(2, 4)
def gradients_that_are_missing():
    """On one rank, on all others, all of them on one, some or all on all: every rank takes part in the norm."""
    first = dist.get_rank() == 0
    for missing in ([0] if first else [], [] if first else [0], [0, 1] if first else [], [0, 1], [0, 1, 2]):
        for clip in ({"max_norm": 0.5}, {"skip_nonfinite": True}, {"clip_value": 0.1}):
            model = Sharded(((5, 3), line(), [Shard(0)]), ((6,), line(), [Shard(0)]), ((4,), None))
            model.give_grads(0)
            for i in missing:
                model.params[i].grad = None
            local = [p.grad._local_tensor for p in model.params[:2] if p.grad is not None]
            square = sum((g.square().sum() for g in local), start=batch(0, 1) * 0)
            dist.all_reduce(square)
            if model.params[2].grad is not None:
                square += model.params[2].grad.square().sum()
            optimizer = fastclip.SGD(model.params, lr=0.1, momentum=0.9, **clip)
            optimizer.step()
            assert_same_stats(optimizer, square[0].sqrt(), clip)
            assert {i for i in range(3) if model.params[i] in optimizer.state} == set(range(3)) - set(missing)


@on_ranks(2, 4)
def frozen_parameters():
    model = fully_shard(make_model(), mesh=line())
    plain = make_model()
    for p in (*model[0].parameters(), *plain[0].parameters()):
        p.requires_grad_(False)
    train_both(model, plain, loss_of_my_rows, loss_of_all_rows)


@on_ranks(2, 4)
def a_nan_on_one_rank_skips_the_step_on_all():
    for value in (math.nan, math.inf, -math.inf):
        for clip in ({}, {"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": math.inf}, {"clip_value": 0.5}):
            model = Sharded(((6, 3), line(), [Shard(0)]), ((5,), line(), [Replicate()]), ((4,), None))
            optimizer = fastclip.SGD(model.params, lr=0.1, momentum=0.9, skip_nonfinite=True, **clip)
            for step in range(3):  # the first two are skipped, and the first leaves no momentum
                model.give_grads(step)
                if step < 2 and dist.get_rank() == 1:
                    model.params[0].grad._local_tensor[0, 0] = value
                before = [whole(p).clone() for p in model.params]
                optimizer.step()
                unchanged = [torch.equal(whole(p), b) for p, b in zip(model.params, before, strict=True)]
                assert unchanged == [step < 2] * 3, (clip, step, unchanged)
                assert bool(optimizer.clip_stats().skipped) == (step < 2)
                assert optimizer.skipped_steps.item() == min(step + 1, 2)
                assert sum(map(bool, optimizer.state.values())) == (0 if step < 2 else 3)
                name = optimizer.first_nonfinite()
                assert name == ("parameter 0 of group 0" if step < 2 else None), name


@on_ranks(2, 4)
def a_nan_on_one_rank_is_in_the_norm_of_all():
    for norm_type in (2.0, math.inf):
        model = Sharded(((6, 3), line(), [Shard(0)]))
        model.give_grads(0)
        if dist.get_rank() == 1:
            model.params[0].grad._local_tensor[0, 0] = math.nan
        optimizer = fastclip.SGD(model.params, lr=0.1, max_norm=1.0, norm_type=norm_type)
        optimizer.step()
        assert optimizer.total_norm.isnan()
        assert whole(model.params[0]).isnan().all()


@on_ranks(2, 4)
def a_shard_that_one_rank_steps_in_plain_torch():
    """The kernels do not cover a gradient of another memory layout; that rank's collectives are the same."""
    for clip in CLIPS:
        model = Sharded(((8, 6), line(), [Shard(0)]), ((5,), line(), [Shard(0)]), ((3,), None))
        optimizer = fastclip.SGD(model.params, lr=0.1, momentum=0.9, **clip)
        loop = loop_of(model.plain, clip, lr=0.1, momentum=0.9)
        for step in range(2):
            model.give_grads(step)
            if dist.get_rank() == 1:
                grad = model.params[0].grad
                grad._local_tensor = grad._local_tensor.t().contiguous().t()
                assert not grad._local_tensor.is_contiguous()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            assert len(caught) == (step == 0 and dist.get_rank() == 1)
            assert_same_stats(optimizer, loop.step(), clip)
        assert_same_model(model.params, model.plain)
        assert_state_is_placed_as_parameters(optimizer)


@on_ranks(2, 4)
def amp_overflow_on_one_rank_skips_the_step_on_all():
    for clip in CLIPS:
        for unscale in (False, True):
            model = fully_shard(make_model(torch.float32), mesh=line())
            plain = make_model(torch.float32)
            optimizer = fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, **clip)
            loop = loop_of(plain.parameters(), clip, lr=0.1, momentum=0.9)
            scaler = torch.amp.GradScaler(place.device_type, init_scale=1024.0, growth_interval=100)
            for step in range(3):
                model.zero_grad()
                plain.zero_grad()
                rows = batch(step, 8, 6).float()
                scaler.scale(model(mine(rows)).square().mean()).backward()
                if step == 0 and dist.get_rank() == 1:
                    next(model.parameters()).grad._local_tensor.fill_(math.inf)
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                assert_same_on_all_ranks(torch.tensor(scaler.get_scale()))
                assert_same_on_all_ranks(optimizer.skipped_steps)
                if step == 0:
                    assert not any(optimizer.state.values())
                    assert scaler.get_scale() == 512
                    continue
                plain(rows).square().mean().backward()
                loop.step()
            assert scaler.get_scale() == 512
            assert_same_model(model.parameters(), plain.parameters(), rtol=1e-5)


@on_ranks(2, 4)
def amp_verdicts_that_differ_between_ranks_are_joined():
    """As where a scaler looked at some of the parameters only: nobody waits for a rank that has skipped by itself."""
    for clip in ({"max_norm": 1.0}, {"skip_nonfinite": True}, {"max_norm": 1.0, "norm_type": math.inf}):
        model = Sharded(((6, 3), line(), [Shard(0)]), ((4,), None))
        optimizer = fastclip.SGD(model.params, lr=0.1, momentum=0.9, **clip)
        for step in range(2):
            model.give_grads(step)
            before = [whole(p).clone() for p in model.params]
            found = float(dist.get_rank() == 1 and step == 0)
            optimizer.grad_scale = torch.full((), 1.0, device=place.device_type)
            optimizer.found_inf = torch.full((), found, device=place.device_type)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            changed = [not torch.equal(whole(p), b) for p, b in zip(model.params, before, strict=True)]
            assert changed == [step == 1] * 2
            assert optimizer.skipped_steps.item() == 1
            assert sum(map(bool, optimizer.state.values())) == (0 if step == 0 else 2)
