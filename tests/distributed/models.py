"""Models trained in data parallel, FSDP2 and tensor parallel, as one process trains them on the whole batch."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import fastclip

from .compare import (
    CLIPS,
    assert_same_model,
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

RULES = [
    (fastclip.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, CLIPS),
    (fastclip.AdamW, torch.optim.AdamW, {"lr": 0.03, "amsgrad": True}, [{"max_norm": 0.5}, {"clip_value": 0.01}]),
]


def make_model(dtype=torch.float64):
    """Sizes that no number of ranks divides, and a last layer that leaves ranks without elements."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1))
    return model.to(place.device_type, dtype)


def make_even_model():
    """Sizes that 2 and 4 ranks divide; sequences go through it as [batch, 8, 8]."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 8))
    return model.to(place.device_type, torch.float64)


def train_both(model, plain_model, loss_of, plain_loss_of, steps=3):
    """Steps of a sharded model with fastclip, of the whole one with the plain loop: by each rule, under each clip."""
    start, plain_start = (copy.deepcopy(m.state_dict()) for m in (model, plain_model))
    for ours, theirs, rule, clip in [(*rule, clip) for *rule, clips in RULES for clip in clips]:
        model.load_state_dict(start)
        plain_model.load_state_dict(plain_start)
        optimizer = ours(model.parameters(), **rule, **clip)
        loop = loop_of(plain_model.parameters(), clip, theirs, **rule)
        for step in range(steps):
            model.zero_grad()
            plain_model.zero_grad()
            loss_of(model, step).backward()
            plain_loss_of(plain_model, step).backward()
            optimizer.step()
            assert_same_stats(optimizer, loop.step(), clip)
        assert_same_model(model.parameters(), plain_model.parameters())
        assert_state_is_placed_as_parameters(optimizer)


def loss_of_my_rows(model, step):
    return model(mine(batch(step, 8, 6))).square().mean()


def loss_of_all_rows(model, step):
    return model(batch(step, 8, 6)).square().mean()


def loss_of_sequences(model, step):
    return whole(model(batch(step, 4, 8, 8))).square().mean()


def parallel_layers(sequence_parallel):
    if not sequence_parallel:  # a plain LayerNorm between layers that meet in a whole tensor
        return {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    return {
        "0": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "1": SequenceParallel(),
        "2": RowwiseParallel(input_layouts=Shard(1)),
    }


@on_ranks(1, 2, 4)
def ddp_steps_as_one_process_with_the_whole_batch():
    model = DistributedDataParallel(make_model())
    train_both(model, DistributedDataParallel(make_model()).module, loss_of_my_rows, loss_of_all_rows)


@on_ranks(1, 2, 4)
def fsdp_steps_as_one_process_with_the_whole_model():
    """Shards of different sizes, and on some ranks of none."""
    model = fully_shard(make_model(), mesh=line())
    if dist.get_rank() == 1:
        assert any(p._local_tensor.numel() == 0 for p in model.parameters())
    train_both(model, make_model(), loss_of_my_rows, loss_of_all_rows)


@on_ranks(2, 4)
def hsdp_counts_what_is_replicated_once():
    mesh = init_device_mesh(place.device_type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(make_model(), mesh=mesh)
    train_both(model, make_model(), loss_of_my_rows, loss_of_all_rows)


@on_ranks(1, 2, 4)
def tensor_parallel_layers_beside_plain_ones():
    mesh = line()
    model = parallelize_module(make_even_model(), mesh, parallel_layers(sequence_parallel=False))
    assert len({type(p) for p in model.parameters()}) == 2  # the norm and the last layer are plain
    train_both(model, make_even_model(), loss_of_sequences, loss_of_sequences)


@on_ranks(2, 4)
def sequence_parallel_norms_have_partial_gradients():
    mesh = line()
    model = parallelize_module(make_even_model(), mesh, parallel_layers(sequence_parallel=True))
    loss_of_sequences(model, 0).backward()
    assert any(isinstance(placement, Partial) for placement in model[1].weight.grad.placements)
    train_both(model, make_even_model(), loss_of_sequences, loss_of_sequences)


@on_ranks(4)
def fsdp_over_tensor_parallel_layers():
    mesh = init_device_mesh(place.device_type, (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(make_even_model(), mesh["tp"], parallel_layers(sequence_parallel=True))
    model = fully_shard(model, mesh=mesh["dp"])
    placements = {placement for p in model.parameters() if isinstance(p, DTensor) for placement in p.placements}
    assert any(isinstance(placement, _StridedShard) for placement in placements), placements
    rank = mesh["dp"].get_local_rank()

    def loss_of_half(model, step):
        return whole(model(batch(step, 4, 8, 8).chunk(2)[rank])).square().mean()

    train_both(model, make_even_model(), loss_of_half, loss_of_sequences)
