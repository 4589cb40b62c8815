"""The contenders: update rules, and for each the ways to clip and step. Three ways are torch's, one is fastclip's."""

from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import fastclip

try:
    from lion_pytorch import Lion as TheirLion
except ImportError:  # then Lion has no peer to be timed against
    TheirLion = None

CLIPS = {"value": ("value", 0.01), "norm": ("norm", 1.0)}  # kind and threshold

# Elements per parameter that any step moves: the gradient is read, the parameter read and written. The norm reads the
# gradients before.
MOVED = {"value": 3, "norm": 4}


@dataclass(frozen=True)
class Rule:
    """An optimizer of torch, or of PyPI's lion-pytorch; fastclip's optimizer in its place; the settings of both."""

    title: str
    torch_class: type
    fastclip_class: type
    settings: dict = field(hash=False)
    states: tuple  # names of the states, each in the shape of its parameter
    others: tuple = ("loop", "foreach", "fused")  # what there is besides fastclip
    rounded: tuple = ()  # the results whose last bits may differ: torch takes square roots from MKL

    @property
    def contenders(self):
        return (*self.others, "fastclip")

    def elements(self, clip):
        """Elements per parameter that a step has to move: each state is read and written."""
        return MOVED[clip] + 2 * len(self.states)

    def in_row(self):
        """Returns the entry of this rule in a row of the results."""
        return {"momentum": self.settings["momentum"]} if "momentum" in self.settings else {"rule": self.title}


def sgd(momentum):
    states = ("momentum_buffer",) if momentum else ()
    return Rule(f"momentum {momentum:g}", torch.optim.SGD, fastclip.SGD, {"lr": 0.01, "momentum": momentum}, states)


def adamw(title, amsgrad):
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    settings = {"lr": 0.01, "weight_decay": 0.01, "amsgrad": amsgrad}
    return Rule(title, torch.optim.AdamW, fastclip.AdamW, settings, states, rounded=("parameter",))


def rarer(name, states, others=("loop", "foreach"), rounded=("parameter",), **settings):
    """torch has a fused Adagrad; of the others it has none."""
    return Rule(name, getattr(torch.optim, name), getattr(fastclip, name), settings, states, others, rounded)


def lion():
    settings = {"lr": 1e-3, "weight_decay": 0.01}
    return Rule("Lion", TheirLion, fastclip.Lion, settings, ("exp_avg",), others=("loop",))


# The choices of --cases, each timed on its own.
RULES = {
    "sgd": (sgd(0.0), sgd(0.9)),
    "adamw": (adamw("AdamW", amsgrad=False),),
    "amsgrad": (adamw("AdamW amsgrad", amsgrad=True),),
    "adadelta": (rarer("Adadelta", ("square_avg", "acc_delta"), rounded=("parameter", "acc_delta")),),
    "adagrad": (rarer("Adagrad", ("sum",), others=("loop", "foreach", "fused")),),
    "nadam": (rarer("NAdam", ("exp_avg", "exp_avg_sq")),),
    "radam": (rarer("RAdam", ("exp_avg", "exp_avg_sq")),),
    "rmsprop": (rarer("RMSprop", ("square_avg",), lr=1e-3),),
}
if TheirLion:
    RULES["lion"] = (lion(),)


def rule_of(row):
    """Returns the rule of a row of the results."""
    return next(rule for rules in RULES.values() for rule in rules if rule.in_row().items() <= row.items())


def loop(params, clip, rule):
    """Makes the article's loop: one parameter after the other, clip, then step. As all, returns optimizer and step."""
    kind, limit = clip
    one_by_one = {"foreach": False} if "foreach" in rule.others else {}
    optimizer = rule.torch_class(params, **rule.settings, **one_by_one)

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
    optimizer = rule.torch_class(params, **rule.settings, foreach=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit, foreach=True)
        optimizer.step()

    return optimizer, step


def fused(params, clip, rule):
    """torch's fused optimizer after its clip functions with their default settings."""
    kind, limit = clip
    optimizer = rule.torch_class(params, **rule.settings, fused=True)
    clip_gradients = clip_grad_value_ if kind == "value" else clip_grad_norm_

    def step():
        clip_gradients(params, limit)
        optimizer.step()

    return optimizer, step


def one_pass(params, clip, rule):
    """Makes fastclip's optimizer: clip and update together."""
    kind, limit = clip
    optimizer = rule.fastclip_class(params, **rule.settings, **{"clip_value" if kind == "value" else "max_norm": limit})
    return optimizer, optimizer.step


def with_norm_clip(optimizer, params, limit):
    """Returns the step of an optimizer that does not clip, after torch's norm clip."""

    def step():
        clip_grad_norm_(params, limit)
        optimizer.step()

    return step


CONTENDERS = {"loop": loop, "foreach": foreach, "fused": fused, "fastclip": one_pass}
OF_TORCH = ("loop", "foreach", "fused")


class Contender:
    """A contender at work on copies of its own, so that no one warms another one's cache."""

    def __init__(self, name, copies, clip, rule):
        self.params, self.rule = copies, rule
        self.optimizer, self.step = CONTENDERS[name](copies, clip, rule)

    def results(self):
        """Returns all tensors that a step writes: parameters, and their states if there are any."""
        states = [self.optimizer.state[p] for p in self.params]
        written = {"parameter": [p.detach() for p in self.params]}
        return written | {name: [state[name] for state in states if name in state] for name in self.rule.states}
