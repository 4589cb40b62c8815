"""Two trainings side by side: one defers its clip to the step, the other clips at once."""

import math

import torch

import fastclip
from tests.support.cases import SHAPES, assert_same_bits, copy_params, make_params

RULES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01},
    "Lion": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "NovoGrad": {"lr": 0.01},
}


def two(optimizer="SGD", shapes=SHAPES, dtype=torch.float32, device="cpu", **settings):
    """(optimizer, its parameters) twice: ours defers, theirs clips at once."""
    ours = make_params(shapes, dtype, device)
    theirs = copy_params(ours)
    make = getattr(fastclip, optimizer)
    settings = RULES[optimizer] | settings
    return make(ours, **settings), ours, make(theirs, **settings), theirs


def step_alike(opt, ours, plain, theirs):
    """Takes a step of each of what `two` has made: parameters and states have to have the same bits then."""
    opt.step()
    plain.step()
    assert_same_bits(theirs, ours, plain, opt)


def clip(params, kind, defer=False):
    if kind == "value":
        return fastclip.clip_grad_value_(params, (-0.3, 0.4), defer=defer)
    return fastclip.clip_grad_norm_(params, {"tight": 0.5, "loose": 1e6, "zero": 0.0, "inf": 0.2}[kind],
                                    math.inf if kind == "inf" else 2.0, defer=defer)  # fmt: skip
