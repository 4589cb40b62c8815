"""Checkpoints of `torch.distributed.checkpoint`: saved on 2 ranks, loaded on 1, 2 and 4, and into torch.optim."""

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fastclip

from .compare import assert_same_model, assert_state_is_placed_as_parameters, line, loop_of, on_ranks, place
from .models import loss_of_all_rows, loss_of_my_rows, make_model

RULE = {"lr": 0.3, "momentum": 0.9}
CLIP = {"clip_value": 0.01, "max_norm": 0.02}
STEPS = 3


def make(optimizer_type, **settings):
    model = fully_shard(make_model(), mesh=line())
    return model, optimizer_type(model.parameters(), **{**RULE, **settings})


def train(model, optimizer, loss_of, steps):
    for step in steps:
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def trained_whole(steps):
    """A whole model after so many steps of the plain loop; the loop."""
    model = make_model()
    loop = loop_of(model.parameters(), CLIP, **RULE)
    train(model, loop, loss_of_all_rows, range(steps))
    return model, loop


def load(model, optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=place.folder / ("flat" if flat else "checkpoint"))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def assert_continues(flat, optimizer_type, **clip):
    """From the checkpoint on as from the third step of a loop that was never interrupted."""
    model, optimizer = make(optimizer_type, **clip)
    load(model, optimizer, flat)
    plain, loop = trained_whole(STEPS)
    assert_same_model(model.parameters(), plain.parameters())
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert_same_model(buffers, [loop.optimizer.state[p]["momentum_buffer"] for p in plain.parameters()])
    assert_state_is_placed_as_parameters(optimizer)
    if optimizer_type is torch.optim.SGD:  # which does not clip: neither does the loop, from here on
        loop.clip = {}
    train(model, optimizer, loss_of_my_rows, [STEPS])
    train(plain, loop, loss_of_all_rows, [STEPS])
    assert_same_model(model.parameters(), plain.parameters())


def save(flat):
    model, optimizer = make(fastclip.SGD, **CLIP)
    train(model, optimizer, loss_of_my_rows, range(STEPS))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=place.folder / ("flat" if flat else "checkpoint"))


@on_ranks(2)
def saves_checkpoints():
    save(flat=False)
    save(flat=True)


@on_ranks(1, 2, 4)
def loads_a_checkpoint():
    assert_continues(False, fastclip.SGD, **CLIP)


@on_ranks(1, 2, 4)
def loads_a_checkpoint_into_torch():
    assert_continues(False, torch.optim.SGD)


@on_ranks(1, 2, 4)
def loads_a_flat_checkpoint():
    assert_continues(True, fastclip.SGD, **CLIP)
