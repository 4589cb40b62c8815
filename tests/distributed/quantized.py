"""States in 8 bits of sharded parameters: the blocks of a shard are those of the whole, on any number of ranks."""

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastclip

from .compare import Sharded, line, on_ranks, place, whole

FOLDER = "eight_bits"


def placed():
    """Shapes and placements, and whether the states are in 8 bits: not where a shard has other blocks."""
    mesh, alone = line(), dist.get_world_size() == 1
    return [
        ((40, 512), mesh, [Shard(0)], True),
        ((37, 4, 64), mesh, [Shard(0)], True),  # uneven
        ((3, 2048), mesh, [Shard(0)], True),  # none on some ranks
        ((64, 300), mesh, [Shard(0)], False),
        ((64, 512), mesh, [Shard(1)], alone),
        ((16, 256), mesh, [Replicate()], True),
        ((5000,), None, None, True),
        ((10, 10), mesh, [Shard(0)], False),
    ]


def both(make, **settings):
    """An optimizer of shards, and one of whole parameters with the same bits of states."""
    cases = placed()
    model = Sharded(*(case[:3] for case in cases), dtype=torch.float32)
    groups = [{"params": [p], "state_bits": 8 if case[3] else 32} for p, case in zip(model.plain, cases, strict=True)]
    return model, make(model.params, state_bits=8, **settings), make(groups, **settings)


def assert_same(model, optimizer, other, tolerance=0.0):
    for index, (p, q) in enumerate(zip(model.params, model.plain, strict=True)):
        torch.testing.assert_close(whole(p), q, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"{i}: {m}")
        of_p, of_q = optimizer.state[p], other.state[q]
        assert of_p.keys() == of_q.keys(), index
        for name, value in of_p.items():
            found = whole(value)
            assert found.shape == of_q[name].shape and found.dtype == of_q[name].dtype, (index, name)
            if tolerance == 0:
                assert torch.equal(found, of_q[name]), (index, name)
            if isinstance(p, DTensor) and value.dim() > 0:
                assert isinstance(value, DTensor) and value.placements == p.placements


@on_ranks(1, 2, 4)
def eight_bit_states_of_shards():
    for make, settings in (
        (fastclip.AdamW, {"lr": 0.01}),
        (fastclip.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
        (fastclip.Lion, {"lr": 0.01}),
    ):
        model, optimizer, other = both(make, **settings)
        for step in range(3):
            model.give_grads(step)
            optimizer.step()
            other.step()
        assert_same(model, optimizer, other)


@on_ranks(1, 2, 4)
def eight_bit_states_of_shards_in_plain_torch():
    model, optimizer, other = both(fastclip.AdamW, lr=0.01, max_update_rms=0.5)
    for step in range(3):
        model.give_grads(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastclip falls back to plain torch")
            optimizer.step()
        other.step()
    assert_same(model, optimizer, other, tolerance=1e-4)


def make_sharded():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 37), nn.Linear(37, 512))  # rows of 256, and of 37
    model = fully_shard(model.to(place.device_type), mesh=line())
    return model, fastclip.AdamW(model.parameters(), lr=0.01, state_bits=8)


def give_grads(model, step):
    torch.manual_seed(50 + step)
    for p in model.parameters():
        grad = torch.randn(p.shape, device=place.device_type)
        p.grad = torch.distributed.tensor.distribute_tensor(grad, p.device_mesh, p.placements)


@on_ranks(2)
def saves_eight_bit_states():
    model, optimizer = make_sharded()
    for step in range(2):
        give_grads(model, step)
        optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=place.folder / FOLDER)


@on_ranks(1, 2, 4)
def loads_eight_bit_states():
    model, optimizer = make_sharded()
    expected = make_sharded()
    for step in range(2):
        give_grads(expected[0], step)
        expected[1].step()
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=place.folder / FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    names = [sorted(optimizer.state[p]) for p in model.parameters()]
    assert sum("exp_avg_codes" in name for name in names) == 1
    for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
        for name, value in expected[1].state[q].items():
            assert torch.equal(whole(optimizer.state[p][name]), whole(value)), name


@on_ranks(2)
def dequantizes_the_states_of_shards():
    model, optimizer = make_sharded()
    give_grads(model, 0)
    optimizer.step()
    numbers = fastclip.dequantized(get_optimizer_state_dict(model, optimizer))
    for name, p in model.named_parameters():
        value = numbers["state"][name]["exp_avg"]
        assert isinstance(value, DTensor) and (value.shape, value.placements) == (p.shape, p.placements)
        error = (whole(value) - 0.1 * whole(p.grad)).abs().max()
        assert error <= 0.0071 * 0.1 * whole(p.grad).abs().max()
