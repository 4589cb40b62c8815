"""Optimizers of others that step on a CPU, and how each is made.

`pip install '.[peers]'` installs what PyPI has of them. A peer that is missing, or does not run here, is left out, with
the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastclip

RULES = ("SGD, momentum 0.9", "AdamW", "Lion")
SETTINGS = {
    "SGD, momentum 0.9": {"lr": 0.01, "momentum": 0.9},
    "AdamW": {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "Lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01},
}
OURS = {"SGD, momentum 0.9": fastclip.SGD, "AdamW": fastclip.AdamW, "Lion": fastclip.Lion}


@dataclass(frozen=True)
class Peer:
    """An optimizer of somebody else.

    Attributes:
        package: its name on PyPI, or None for torch.
        make: from a rule, parameters and settings to an optimizer. It imports what it needs.
        rules: those that it has.
    """

    package: str | None
    make: Callable
    rules: tuple = RULES


def of_torch(**implementation):
    kinds = {"SGD, momentum 0.9": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    return lambda rule, params, settings: kinds[rule](params, **settings, **implementation)


def deepspeed(rule, params, settings):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Its states have the dtype of the parameters, as those of the others.
    return DeepSpeedCPUAdam(params, **settings, adamw_mode=True, fp32_optimizer_states=False)


def optimi(rule, params, settings):
    import optimi

    kind = {"SGD, momentum 0.9": optimi.SGD, "AdamW": optimi.AdamW, "Lion": optimi.Lion}[rule]
    return kind(params, **settings, kahan_sum=False)  # in 16 bits it would keep one more state


def bitsandbytes(rule, params, settings):
    import bitsandbytes

    names = {"SGD, momentum 0.9": "SGD32bit", "AdamW": "AdamW32bit", "Lion": "Lion32bit"}
    return getattr(bitsandbytes.optim, names[rule])(params, **settings)


def lion_pytorch(rule, params, settings):
    import lion_pytorch

    return lion_pytorch.Lion(params, **settings)


PEERS = {
    "torch, fused": Peer(None, of_torch(fused=True), RULES[:2]),
    "torch, foreach": Peer(None, of_torch(foreach=True), RULES[:2]),
    "DeepSpeed CPUAdam": Peer("deepspeed", deepspeed, ("AdamW",)),
    "torch-optimi": Peer("torch-optimi", optimi),
    "bitsandbytes": Peer("bitsandbytes", bitsandbytes),
    "lion-pytorch": Peer("lion-pytorch", lion_pytorch, ("Lion",)),
}


def unusable(name, rule):
    """Returns why a peer cannot be timed here, in one line; None if it can."""
    p = torch.nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    try:
        PEERS[name].make(rule, [p], SETTINGS[rule]).step()
    except ImportError as error:
        return f"{error}; pip install {PEERS[name].package}"
    except Exception as error:  # whatever a package raises that was not made for this machine
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None
