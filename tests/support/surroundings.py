"""What a step may have around it in the property tests: wrappers, hooks, profilers, gradient scalers, modes, and the
forms in which numbers and parameters are given."""

import dataclasses
import decimal
import fractions
import functools
import math
import os
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .cases import flush_denormal


@dataclasses.dataclass(frozen=True)
class Around:
    """Surroundings of all steps of a scenario. Each field is a name of one of the tables below."""

    step: str = "plain"
    numbers: str = "plain"
    params: str = "tensors"
    scaler: str | None = None
    hooks: bool = False
    profiled: bool = False
    flush: bool = False


# ---- the step of a subclass --------------------------------------------------------------------


def _called(step):
    def own(self, closure=None):
        return step(self, closure)

    return own


def _wrapped(step):
    @functools.wraps(step)
    def own(self, *positional, **named):
        return step(self, *positional, **named)

    return own


STEPS = {"plain": None, "own": _called, "wrapped": _wrapped, "no_grad": torch.no_grad()}


def subclass(cls, how):
    """`cls`, or a subclass of it whose step is wrapped."""
    return cls if STEPS[how] is None else type("Own", (cls,), {"step": STEPS[how](cls.step)})


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which says on stderr when it starts and stops


@contextmanager
def listened_to(optimizer, around):
    """For a `with` block, hooks and a profiler. Yields the names of the hooks that were called, in their order."""
    called = []

    def hook(name):
        return lambda stepped, *_: called.append(name) if stepped is optimizer else None

    with ExitStack() as stack:
        if around.hooks:
            for register, name in (
                (register_optimizer_step_pre_hook, "global pre"),
                (optimizer.register_step_pre_hook, "pre"),
                (optimizer.register_step_post_hook, "post"),
                (register_optimizer_step_post_hook, "global post"),
            ):
                stack.callback(register(hook(name)).remove)
        if around.profiled:
            stack.enter_context(torch.autograd.profiler.profile())
        yield called


def mode(around):
    """The CPU's, for a `with` block."""
    return flush_denormal(around.flush)


# ---- gradient scalers --------------------------------------------------------------------------


class UnscalesHalves(torch.amp.GradScaler):
    """Also float16 gradients, as FSDP's does, and as fastclip's step."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16=True)


class Decides(UnscalesHalves):
    """One that decides itself whether a step is taken: "skip", "take", or None for what torch would."""

    verdict = None

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        if self.verdict is None:
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        return optimizer.step(*args, **kwargs) if self.verdict == "take" else None


SCALERS = {"torch's": torch.amp.GradScaler, "own unscaling": UnscalesHalves, "own verdict": Decides}


def scalers(name):
    """(fastclip's, the loop's), which have the same scales: powers of two."""
    pair = SCALERS[name], UnscalesHalves if name == "torch's" else SCALERS[name]
    made = [kind("cpu", init_scale=2.0**10, growth_interval=2) for kind in pair]
    for scaler in made:
        scaler.scale(torch.zeros(()))  # which makes its tensors
    return made


# ---- numbers and pairs -------------------------------------------------------------------------


class FloatOnly:
    """A number that knows nothing but its float."""

    def __init__(self, number):
        self.number = number

    def __float__(self):
        return self.number

    def __repr__(self):
        return f"FloatOnly({self.number})"


def _float64(values):
    return torch.tensor(values, dtype=torch.float64)


NUMBERS = {  # of a float, and of a pair: the value survives
    "plain": None,
    "numpy": (np.float64, np.array),
    "array": (np.array, lambda pair: list(map(np.array, pair))),
    "tensor": (_float64, _float64),
    "Fraction": (fractions.Fraction, lambda pair: list(map(fractions.Fraction, pair))),
    "Decimal": (decimal.Decimal, lambda pair: tuple(map(decimal.Decimal, pair))),
    "own": (FloatOnly, lambda pair: list(map(FloatOnly, pair))),
}
NUMERIC = ("lr", "momentum", "dampening", "weight_decay", "eps", "betas", "max_norm", "norm_type", "clip_value")


def in_form(settings, form):
    """The settings, with their numbers in this form."""
    if NUMBERS[form] is None:
        return settings
    number, pair = NUMBERS[form]

    def of(value):
        if isinstance(value, tuple):
            return pair(value) if all(map(math.isfinite, value)) else value
        if value is None or isinstance(value, str) or not math.isfinite(value):  # no Fraction is infinite
            return value
        return number(float(value))

    return {name: of(value) if name in NUMERIC else value for name, value in settings.items()}


# ---- parameters --------------------------------------------------------------------------------

PARAMS = {  # of places and tensors
    "tensors": lambda places, tensors: tensors,
    "Parameters": lambda places, tensors: tensors,
    "generator": lambda places, tensors: (tensor for tensor in tensors),
    "named": lambda places, tensors: [(f"p{place}", tensor) for place, tensor in zip(places, tensors, strict=True)],
}


def leaf(tensor, form):
    return torch.nn.Parameter(tensor) if form == "Parameters" else tensor.requires_grad_()


# ---- hooks of load_state_dict ------------------------------------------------------------------


def renamed(state_dict):
    """As a file of other names, in the opposite order in each group."""
    name = "p{}".format
    groups = [{**g, "params": [name(key) for key in reversed(g["params"])]} for g in state_dict["param_groups"]]
    return {"state": {name(key): value for key, value in state_dict["state"].items()}, "param_groups": groups}


def named_back(_, state_dict):
    """The hook for it."""
    groups = [{**g, "params": [int(key[1:]) for key in reversed(g["params"])]} for g in state_dict["param_groups"]]
    return {"state": {int(key[1:]): value for key, value in state_dict["state"].items()}, "param_groups": groups}
