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

CLIP = {"clip_value": 0.01, "max_norm": 0.02}
STEPS = 3
# By the folder's name: fastclip's optimizer, torch's, how they are set, and whether the optimizer's state is flattened.
KINDS = {
    "sgd": (fastclip.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}, False),
    "sgd_flat": (fastclip.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}, True),
    "adamw": (fastclip.AdamW, torch.optim.AdamW, {"lr": 0.03}, False),
}


def make(optimizer_type, **settings):
    model = fully_shard(make_model(), mesh=line())
    return model, optimizer_type(model.parameters(), **settings)


def train(model, optimizer, loss_of, steps):
    for step in steps:
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def state_of(model, optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model, optimizer, kind, flat):
    state = state_of(model, optimizer, flat)
    dcp.load(state, checkpoint_id=place.folder / kind)
    set_model_state_dict(model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def assert_continues(kind, into_torch):
    """From the checkpoint on as from the third step of a loop that was never interrupted."""
    ours, theirs, rule, _ = KINDS[kind]
    model, optimizer = make(theirs, **rule) if into_torch else make(ours, **rule, **CLIP)
    load(model, optimizer, kind, KINDS[kind][-1])
    plain = make_model()
    loop = loop_of(plain.parameters(), CLIP, theirs, **rule)
    train(plain, loop, loss_of_all_rows, range(STEPS))
    assert_same_model(model.parameters(), plain.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        of_p, of_q = optimizer.state[p], loop.optimizer.state[q]
        assert of_p.keys() == of_q.keys()
        assert_same_model(of_p.values(), of_q.values())
    assert_state_is_placed_as_parameters(optimizer)
    if into_torch:  # which does not clip: neither does the loop, from here on
        loop.clip = {}
    train(model, optimizer, loss_of_my_rows, [STEPS])
    train(plain, loop, loss_of_all_rows, [STEPS])
    assert_same_model(model.parameters(), plain.parameters())


@on_ranks(2)
def saves_checkpoints():
    for kind, (ours, _, rule, flat) in KINDS.items():
        model, optimizer = make(ours, **rule, **CLIP)
        train(model, optimizer, loss_of_my_rows, range(STEPS))
        dcp.save(state_of(model, optimizer, flat), checkpoint_id=place.folder / kind)


@on_ranks(1, 2, 4)
def loads_checkpoints():
    for kind in KINDS:
        assert_continues(kind, into_torch=False)


@on_ranks(1, 2, 4)
def loads_checkpoints_into_torch():
    for kind in ("sgd", "adamw"):
        assert_continues(kind, into_torch=True)
