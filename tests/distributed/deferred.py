"""Clips that are deferred to the step: of a sharded model, by the norm of all ranks; and of one that each rank has."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import fastclip

from .compare import Sharded, assert_same_model, assert_same_on_all_ranks, batch, line, mine, on_ranks, place, whole

RULE = {"lr": 0.1, "momentum": 0.9}


def both_ways(params, max_norm, norm_type):
    """fastclip's function, and torch's name under the patch."""
    yield lambda: fastclip.clip_grad_norm_(params, max_norm, norm_type, defer=True)
    yield lambda: torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)


@on_ranks(1, 2, 4)
def deferred_clips_go_by_the_norm_of_all_shards():
    mesh = line()
    for norm_type in (2.0, math.inf):
        for way in (0, 1):
            sharded = Sharded(((8, 5), mesh, [Shard(0)]), ((7,), mesh, [Shard(0)]), ((3,), mesh, [Replicate()]))
            ours, plain = fastclip.SGD(sharded.params, **RULE), torch.optim.SGD(sharded.plain, **RULE)
            for step in range(3):
                sharded.give_grads(step)
                before = [whole(p.grad).clone() for p in sharded.params]
                expected = torch.nn.utils.clip_grad_norm_(sharded.plain, 0.5, norm_type)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "fastclip.patch came too late")
                    with fastclip.patch():
                        norm = whole([*both_ways(sharded.params, 0.5, norm_type)][way]())
                torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
                assert_same_on_all_ranks(norm)
                assert ours._deferred is not None
                for p, grad in zip(sharded.params, before, strict=True):
                    assert torch.equal(whole(p.grad), grad)
                ours.step()
                plain.step()
                assert_same_model(sharded.params, sharded.plain)
            fastclip.clip_grad_value_(sharded.params, 0.01, defer=True)
            torch.nn.utils.clip_grad_value_(sharded.plain, 0.01)
            ours.step()
            plain.step()
            assert_same_model(sharded.params, sharded.plain)


@on_ranks(2)
def deferred_clips_of_gradients_that_are_placed_differently():
    """Partial sums are no gradients yet: they are added up first, as at once."""
    mesh = line()
    model = Sharded(((6, 4), mesh, [Replicate()]), ((4, 4), mesh, [Shard(0)]))
    ours, plain = fastclip.SGD(model.params, **RULE), torch.optim.SGD(model.plain, **RULE)
    model.give_grads(0)
    grad = model.params[0].grad.redistribute(mesh, [Replicate()]).to_local()
    model.params[0].grad = type(model.params[0].data).from_local(grad / dist.get_world_size(), mesh, [Partial()])
    norm = fastclip.clip_grad_norm_(model.params, 0.5, defer=True)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(model.plain, 0.5), rtol=1e-12, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.step()
    plain.step()
    assert_same_model(model.params, model.plain)


@on_ranks(2, 4)
def deferred_clips_under_ddp_have_the_bits_of_clips_at_once():
    """Also where only one rank's data has an inf: the averaged gradients have it on all."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(DistributedDataParallel(nn.Linear(6, 3).to(place.device_type), gradient_as_bucket_view=True))
    ours, plain = (fastclip.SGD(model.parameters(), **RULE, skip_nonfinite=True) for model in models)
    for step in range(4):
        x = batch(step, 4 * dist.get_world_size(), 6).float()
        if step == 2:
            x[0] = math.inf
        for model, defer in zip(models, (True, False), strict=True):
            with model.no_sync():
                model(mine(x) / 2).square().mean().backward()
            model(mine(x)).square().mean().backward()
            norm = fastclip.clip_grad_norm_(model.parameters(), 0.1, defer=defer)
            assert norm.isfinite() == (step != 2)
            optimizer = ours if defer else plain
            assert (optimizer._deferred is not None) == defer
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q) and p.isfinite().all()
    assert ours.skipped_steps == plain.skipped_steps == 1
