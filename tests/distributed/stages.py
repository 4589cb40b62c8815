"""Ranks that hold different parameters, as the stages of a pipeline do, and one norm over all of them."""

import copy
import math
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastclip

from .compare import assert_same_on_all_ranks, on_ranks, place, whole

SHAPES = [[(5, 3), (4,), ()], [(7,), (30, 20), (2,)]]  # of each stage
LIMITS = [
    {"max_norm": 0.5},
    {"max_norm": 0.2, "norm_type": math.inf},
    {"max_norm": fastclip.QuantileNorm(0.5, scale=0.9, window=4, warmup=2)},
    {"max_norm": 0.3, "skip_norm": fastclip.EmaNorm(z=2, decay=0.8, warmup=3)},
    {"max_norm": 0.3, "norm_scope": "parameter", "skip_norm": 200.0},
    {"skip_nonfinite": True},
]


def my_stage():
    """Stages are replicated: ranks 0 and 2 have the first, 1 and 3 the second."""
    return dist.get_rank() % 2


def my_pipeline():
    """The process group of the ranks that together have the whole model."""
    pipelines = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
    return pipelines[dist.get_rank() // 2]


def make_params():
    torch.manual_seed(4)
    whole = [[nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes] for shapes in SHAPES]
    whole = [[nn.Parameter(p.detach().to(place.device_type)) for p in params] for params in whole]
    return whole, copy.deepcopy(whole[my_stage()])


def give_grads(stages, mine, step, without=()):
    """The same of the whole model on all ranks; a stage in `without` has none."""
    torch.manual_seed(50 + step)
    for stage, params in enumerate(stages):
        for p in params:
            grad = torch.randn(p.shape, dtype=torch.float64) * (10.0 if step % 5 == 4 else 1.0)
            p.grad = None if stage in without else grad.to(p.device)
    for p, q in zip(mine, stages[my_stage()] if mine else [], strict=True):
        p.grad = None if q.grad is None else q.grad.clone()


def assert_agree(optimizer, alone, stages, mine):
    assert_same_stats(optimizer, alone)
    for p, q in zip(mine, stages[my_stage()], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def assert_same_stats(optimizer, alone):
    ours, theirs = optimizer.clip_stats(), alone.clip_stats()
    assert ours.skipped == theirs.skipped
    for name in ("total_norm", "threshold", "skip_threshold"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            assert_same_on_all_ranks(found)


@on_ranks(2, 4)
def stages_step_as_one_process_with_the_whole_model():
    for limit in LIMITS:
        for kind in (fastclip.SGD, fastclip.AdamW):
            whole, mine = make_params()
            alone = kind([p for params in whole for p in params], lr=0.1, **limit)
            optimizer = kind(mine, lr=0.1, norm_process_group=my_pipeline(), **limit)
            for step in range(8):
                give_grads(whole, mine, step, without=(step % 2,) if step in (2, 5) else ())
                optimizer.step()
                alone.step()
                assert_agree(optimizer, alone, whole, mine)


@on_ranks(2, 4)
def experts_are_added_up_beside_layers_that_all_ranks_have():
    """The first stage's parameters are on all ranks, as whole tensors or as shards over all; the second's are experts,
    one on each rank of a pair."""
    everybody = dist.device_mesh.init_device_mesh(place.device_type, (dist.get_world_size(),))
    for limit in (*LIMITS, {"max_norm": 0.5, "norm_scope": "parameter"}):
        for kind in (fastclip.SGD, fastclip.AdamW):
            for sharded in (False, True):
                (common, experts), _ = make_params()
                experts = experts[:2]  # as many on each rank
                shared = [nn.Parameter(p.detach().clone()) for p in common]
                if sharded:
                    shared = [nn.Parameter(distribute_tensor(p.detach(), everybody, [Replicate()])) for p in shared]
                    shared[0] = nn.Parameter(distribute_tensor(common[0].detach(), everybody, [Shard(0)]))
                own = [nn.Parameter(p.detach().clone()) for p in experts[my_stage() :: 2]]
                alone = kind([*common, *experts], lr=0.1, **limit)
                groups = [{"params": shared, "norm_replicated": True}, {"params": own}]
                optimizer = kind(groups, lr=0.1, norm_process_group=my_pipeline(), **limit)
                for step in range(6):
                    give_grads([common, experts], [], step, without=(1,) if step == 2 else ())
                    for p, q in zip([*shared, *own], [*common, *experts[my_stage() :: 2]], strict=True):
                        p.grad = None if q.grad is None else placed_as(p, q.grad.clone())
                    optimizer.step()
                    alone.step()
                    assert_same_stats(optimizer, alone)
                for p, q in zip([*shared, *own], [*common, *experts[my_stage() :: 2]], strict=True):
                    torch.testing.assert_close(whole(p), q, rtol=1e-12, atol=1e-12)


def placed_as(param, grad):
    return distribute_tensor(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad


@on_ranks(2, 4)
def torchs_pipelines_train_as_the_whole_model():
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)]
    whole = nn.Sequential(*copy.deepcopy(layers)).to(place.device_type)
    mine, pipeline, device = layers[my_stage()].to(place.device_type), my_pipeline(), torch.device(place.device_type)
    stage = PipelineStage(mine, my_stage(), 2, device, group=pipeline)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    optimizer = fastclip.AdamW(mine.parameters(), lr=0.1, max_norm=0.05, norm_process_group=pipeline)
    alone = fastclip.AdamW(whole.parameters(), lr=0.1, max_norm=0.05)
    for step in range(4):
        torch.manual_seed(60 + step)
        x, y = torch.randn(4, 6, device=device), torch.randn(4, 3, device=device)
        for opt in (optimizer, alone):
            opt.zero_grad()
        schedule.step(x) if my_stage() == 0 else schedule.step(target=y)
        (nn.functional.mse_loss(whole(x[:2]), y[:2]) / 2 + nn.functional.mse_loss(whole(x[2:]), y[2:]) / 2).backward()
        optimizer.step()
        alone.step()
        torch.testing.assert_close(optimizer.total_norm, alone.total_norm, rtol=1e-5, atol=0)
        assert_same_on_all_ranks(optimizer.total_norm)
        assert optimizer.clip_stats().clip_coefficient < 1
    for p, q in zip(mine.parameters(), whole[my_stage()].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@on_ranks(2)
def a_nan_in_one_stage_skips_the_step_in_all():
    whole, mine = make_params()
    optimizer = fastclip.SGD(mine, lr=0.1, norm_process_group=[my_pipeline()], skip_nonfinite=True)
    for step in range(3):
        give_grads(whole, mine, step)
        if step == 1 and my_stage() == 0:
            mine[0].grad[0] = math.nan
        optimizer.step()
        assert optimizer.clip_stats().skipped == (step == 1)
    assert optimizer.skipped_steps == 1


@on_ranks(2)
def an_overflow_that_amp_finds_in_one_stage_skips_the_step_in_all():
    whole, mine = make_params()
    optimizer = fastclip.SGD(mine, lr=0.1, norm_process_group=my_pipeline(), max_norm=0.5)
    optimizer.grad_scale = torch.ones((), device=place.device_type)
    for step in range(3):
        give_grads(whole, mine, step)
        optimizer.found_inf = torch.tensor(float(step == 1 and my_stage() == 1), device=place.device_type)
        optimizer.step()
        assert optimizer.clip_stats().skipped == (step == 1)


@on_ranks(2)
def a_stage_that_is_left_to_plain_torch_counts_alike():
    whole, mine = make_params()
    alone = fastclip.SGD([p for params in whole for p in params], lr=0.1, **LIMITS[2])
    optimizer = fastclip.SGD(mine, lr=0.1, norm_process_group=my_pipeline(), **LIMITS[2])
    for step in range(6):
        give_grads(whole, mine, step)
        if step % 2 and my_stage() == 0:
            mine[0].grad = mine[0].grad.t().contiguous().t()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        alone.step()
        assert_agree(optimizer, alone, whole, mine)


@on_ranks(2)
def it_takes_one_message_and_none_without_a_norm():
    whole, mine = make_params()
    group = my_pipeline()
    for limit, messages in (({"max_norm": 0.5}, 1), ({"max_norm": 0.5, "norm_scope": "parameter"}, 1), ({}, 0)):
        optimizer = fastclip.SGD(mine, lr=0.1, norm_process_group=group, **limit)
        give_grads(whole, mine, 0)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            optimizer.step()
        assert all_reduce.call_count == messages


@on_ranks(2)
def what_a_process_group_refuses():
    whole, mine = make_params()
    group = my_pipeline()

    def refused(error, text, action):
        try:
            action()
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"{text}: not refused")

    def make(**settings):
        return fastclip.SGD(mine, lr=0.1, norm_process_group=group, **settings)

    refused(ValueError, "norm_scope='group' in param_groups[0]", lambda: make(max_norm=1.0, norm_scope="group"))
    refused(ValueError, "max_relative_change in param_groups[0]", lambda: make(max_relative_change=0.1))
    refused(TypeError, "can't be copied or pickled", lambda: copy.deepcopy(make(max_norm=1.0)))
    refused(TypeError, "norm_process_group must be", lambda: fastclip.SGD(mine, lr=0.1, norm_process_group="world"))
    model = nn.ParameterList(mine)
    refused(TypeError, "step_in_backward can't wait", lambda: fastclip.step_in_backward(model, make()))
    optimizer = make(max_norm=1.0)
    optimizer.param_groups[0]["norm_scope"] = "group"
    give_grads(whole, mine, 0)
    refused(ValueError, "norm_scope='group' in param_groups[0]", optimizer.step)
