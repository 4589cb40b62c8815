"""The ways to clip and step that are compared: three that torch offers, and fastclip's.

Each is a function of (parameters with gradients, clip, rule) that returns the optimizer and its step. A clip is
("value", δ) or ("norm", max_norm).
"""

from torch.nn.utils import clip_grad_norm_, clip_grad_value_

CLIPS = {"value": ("value", 0.01), "norm": ("norm", 1.0)}


def loop(params, clip, rule):
    """The article's: one parameter after the other, clip, then step."""
    kind, limit = clip
    optimizer = rule.of_torch(params, **rule.settings, foreach=False)

    def value_step():
        for p in params:
            p.grad.data.clamp_(-limit, limit)
        optimizer.step()

    def norm_step():
        clip_grad_norm_(params, limit, foreach=False)
        optimizer.step()

    return optimizer, value_step if kind == "value" else norm_step


def foreach(params, clip, rule):
    """torch's multi-tensor operations for both."""
    kind, limit = clip
    optimizer = rule.of_torch(params, **rule.settings, foreach=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit, foreach=True)
        optimizer.step()

    return optimizer, step


def fused(params, clip, rule):
    """torch's fused optimizer after its clip functions with their default settings."""
    kind, limit = clip
    optimizer = rule.of_torch(params, **rule.settings, fused=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit)
        optimizer.step()

    return optimizer, step


def one_pass(params, clip, rule):
    """fastclip: clip and update together."""
    kind, limit = clip
    optimizer = rule.of_fastclip(params, **rule.settings, **{"clip_value" if kind == "value" else "max_norm": limit})
    return optimizer, optimizer.step


CONTENDERS = {"loop": loop, "foreach": foreach, "fused": fused, "fastclip": one_pass}
OF_TORCH = ("loop", "foreach", "fused")


class Contender:
    """A contender at work on copies of its own, so that no one warms another one's cache."""

    def __init__(self, name, copies, clip, rule):
        self.params, self.rule = copies, rule
        self.optimizer, self.step = CONTENDERS[name](copies, clip, rule)

    def results(self):
        """What a step writes: parameters, and their states where there are any."""
        states = [self.optimizer.state[p] for p in self.params]
        written = {"parameter": [p.detach() for p in self.params]}
        return written | {name: [state[name] for state in states if name in state] for name in self.rule.states}
