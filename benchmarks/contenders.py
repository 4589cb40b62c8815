"""The ways to clip and step that are compared: three that torch offers, and fastclip's.

Each is a function of (parameters with gradients, clip, momentum) that returns the optimizer and its step. A clip is
("value", δ) or ("norm", max_norm).
"""

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import fastclip

LR = 0.01
MOMENTA = (0.0, 0.9)
CLIPS = {"value": ("value", 0.01), "norm": ("norm", 1.0)}


def loop(params, clip, momentum):
    """The article's: one parameter after the other, clip, then step."""
    kind, limit = clip
    optimizer = torch.optim.SGD(params, LR, momentum, foreach=False)

    def value_step():
        for p in params:
            p.grad.data.clamp_(-limit, limit)
        optimizer.step()

    def norm_step():
        clip_grad_norm_(params, limit, foreach=False)
        optimizer.step()

    return optimizer, value_step if kind == "value" else norm_step


def foreach(params, clip, momentum):
    """torch's multi-tensor operations for both."""
    kind, limit = clip
    optimizer = torch.optim.SGD(params, LR, momentum, foreach=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit, foreach=True)
        optimizer.step()

    return optimizer, step


def fused(params, clip, momentum):
    """torch's fused SGD after its clip functions with their default settings."""
    kind, limit = clip
    optimizer = torch.optim.SGD(params, LR, momentum, fused=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit)
        optimizer.step()

    return optimizer, step


def one_pass(params, clip, momentum):
    """fastclip: clip and update together."""
    kind, limit = clip
    optimizer = fastclip.SGD(params, LR, momentum, **{"clip_value" if kind == "value" else "max_norm": limit})
    return optimizer, optimizer.step


CONTENDERS = {"loop": loop, "foreach": foreach, "fused": fused, "fastclip": one_pass}
OF_TORCH = ("loop", "foreach", "fused")


class Contender:
    """A contender at work on copies of its own, so that no one warms another one's cache."""

    def __init__(self, name, copies, clip, momentum):
        self.params = copies
        self.optimizer, self.step = CONTENDERS[name](copies, clip, momentum)

    def results(self):
        """What a step writes: parameters, and momentum buffers where there are any."""
        states = (self.optimizer.state[p] for p in self.params)
        return {
            "parameter": [p.detach() for p in self.params],
            "momentum": [state["momentum_buffer"] for state in states if "momentum_buffer" in state],
        }
