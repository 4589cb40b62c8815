"""python -m benchmarks deferred: what the clip and the step of a trainer take, in each way to bring fastclip in.

"deferred" is a clip that the step carries out: by `fastclip.patch`, which measures as torch does, and by
`clip_grad_norm_(defer=True)`.
"""

import itertools
import math
import sys
from functools import partial

import torch
from tqdm import tqdm

import fastclip
from fastclip import patching

from .core import command, record, rows, timing
from .core.models import MODELS
from .core.problem import Problem
from .report import tensors as report

BASE = "max_norm in the optimizer"
MAX_NORM = 1e-3  # below all norms: each step clips
RULES = {"SGD": {"lr": 1e-9, "momentum": 0.9}, "AdamW": {"lr": 1e-9}}


torchs = torch.nn.utils.clip_grad_norm_
deferred = partial(fastclip.clip_grad_norm_, defer=True)
# The optimizer's module and settings, and the clip before its step: a function and its threshold. A trainer's clip that
# can't be left out is set to inf: it measures, and multiplies by 1.
WAYS = {
    BASE: (fastclip, {"max_norm": MAX_NORM}, None, None),
    "deferred, by the patch": (fastclip, {}, patching._defer_norm, MAX_NORM),
    "deferred": (fastclip, {}, deferred, MAX_NORM),
    "fastclip's clip": (fastclip, {}, fastclip.clip_grad_norm_, MAX_NORM),
    "torch's clip, fastclip's step": (fastclip, {}, torchs, MAX_NORM),
    "max_norm, torch's clip at inf": (fastclip, {"max_norm": MAX_NORM}, torchs, math.inf),
    "torch, fused": (torch.optim, {"fused": True}, torchs, MAX_NORM),
    "torch": (torch.optim, {}, torchs, MAX_NORM),
}


def clip_and_step(params, rule, module, settings, clip, threshold):
    optimizer = getattr(module, rule)(params, **RULES[rule], **settings)
    # A backward pass leaves new tensors. Here, two lists of them take turns, which costs all ways the same.
    lists = itertools.cycle([[p.grad for p in params], [p.grad.clone() for p in params]])

    def step():
        nonlocal threshold
        for p, grad in zip(params, next(lists), strict=True):
            p.grad = grad
        if clip is not None:
            clip(params, threshold)
            threshold *= 0.999  # so that a clip at once acts on what it has clipped before
        optimizer.step()

    return step


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("deferred", __doc__, arguments, rounds=20, models=("gru-ctc", "conformer-s", "conformer-m"))
    found = record.describe(arguments, "python -m benchmarks deferred") | {"kind": "deferred", "cases": []}
    for model, rule, threads in tqdm(list(itertools.product(options.model, RULES, options.threads)), unit="case"):
        found["cases"].append(measure(model, rule, threads, options.rounds))
    return command.finish(found, report, options.out)


def measure(model, rule, threads, rounds):
    """A row: microseconds per clip and step, and how many times longer the others take, round by round."""
    torch.set_num_threads(threads)
    problem = Problem(model, MODELS[model], contenders=())
    steps = {name: clip_and_step(problem.copy(), rule, *way) for name, way in WAYS.items()}
    for step in steps.values():
        step()
    samples = timing.rounds({name: timing.Timer(step) for name, step in steps.items()}, rounds)
    return {
        "model": model,
        "rule": rule,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "threads": threads,
        "us_per_step": rows.microseconds(samples),
        "ratio": {name: rows.described(timing.ratios(samples[name], samples[BASE])) for name in steps},
    }
