"""The update rules that are timed: of which optimizers, with which settings, and what a step of them has to move."""

from dataclasses import dataclass, field

import torch

import fastclip

# Elements per parameter that any step moves: the gradient is read, the parameter read and written. The norm reads the
# gradients before.
MOVED = {"value": 3, "norm": 4}


@dataclass(frozen=True)
class Rule:
    """An optimizer of torch's, fastclip's in its place, and the settings of both."""

    title: str
    of_torch: type
    of_fastclip: type
    settings: dict = field(hash=False)
    states: tuple  # the names of what is kept for each parameter, in its shape

    def elements(self, clip):
        """Elements per parameter that a step has to move: each state is read and written."""
        return MOVED[clip] + 2 * len(self.states)

    def in_row(self):
        """What a row of the results says of it."""
        return {"momentum": self.settings["momentum"]} if "momentum" in self.settings else {"rule": self.title}


def sgd(momentum):
    states = ("momentum_buffer",) if momentum else ()
    return Rule(f"momentum {momentum:g}", torch.optim.SGD, fastclip.SGD, {"lr": 0.01, "momentum": momentum}, states)


def adamw(title, amsgrad):
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    settings = {"lr": 0.01, "weight_decay": 0.01, "amsgrad": amsgrad}
    return Rule(title, torch.optim.AdamW, fastclip.AdamW, settings, states)


# What --cases names, each to be timed on its own.
CASES = {
    "sgd": (sgd(0.0), sgd(0.9)),
    "adamw": (adamw("AdamW", amsgrad=False),),
    "amsgrad": (adamw("AdamW amsgrad", amsgrad=True),),
}


def of_row(row):
    """The rule of a row of the results."""
    return next(rule for rules in CASES.values() for rule in rules if rule.in_row().items() <= row.items())
