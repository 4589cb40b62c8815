"""Micro-batches whose gradients are clipped before they are added up: of a sharded model, and on each rank alone."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import fastclip

from .compare import Sharded, assert_same_on_all_ranks, batch, line, mine, on_ranks, place, whole


def micro_batches_of(params, **clip):
    return fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), **clip)


@on_ranks(1, 2, 4)
def accumulation_clips_by_the_norm_of_all_shards():
    mesh = line()
    sharded = Sharded(((6, 5), mesh, [Shard(0)]), ((7,), mesh, [Shard(0)]), ((3,), mesh, [Replicate()]))
    for clip in ({"max_norm": 0.5}, {"max_norm": 0.5, "clip_value": 0.3}, {"max_norm": 1.0, "skip_nonfinite": True}):
        ours, theirs = micro_batches_of(sharded.params, **clip), micro_batches_of(sharded.plain, **clip)
        for p in [*sharded.params, *sharded.plain]:
            p.grad = None
        for k in range(3):
            with ours, theirs:
                sharded.give_grads(k, scale=10.0**-k)
            torch.testing.assert_close(ours.total_norm, theirs.total_norm, rtol=1e-12, atol=0)
            assert_same_on_all_ranks(ours.total_norm)
            for p, q in zip(sharded.params, sharded.plain, strict=True):
                assert p.grad.placements == p.placements
                torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-12, atol=1e-12)


@on_ranks(2, 4)
def accumulation_by_rank_is_averaged_afterwards():
    """As documented for DDP: no_sync in all micro-batches, then an all-reduce of the sums."""

    def make():
        torch.manual_seed(1)
        return nn.Linear(6, 3).to(place.device_type, torch.float64)

    model, ranks = DistributedDataParallel(make()), dist.get_world_size()
    params = [*model.parameters()]
    micro_batch = micro_batches_of(params, max_norm=0.1)
    with model.no_sync():
        for k in range(3):
            with micro_batch:
                model(mine(batch(k, 4 * ranks, 6))).square().mean().backward()
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= ranks

    total = [torch.zeros_like(p) for p in params]
    for rank in range(ranks):
        alone = make()
        own = micro_batches_of(alone.parameters(), max_norm=0.1)
        for k in range(3):
            with own:
                alone(batch(k, 4 * ranks, 6).chunk(ranks)[rank]).square().mean().backward()
        total = [t + p.grad / ranks for t, p in zip(total, alone.parameters(), strict=True)]
    for p, expected in zip(params, total, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
