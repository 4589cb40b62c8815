"""python -m benchmarks accumulation: what a micro-batch's clip and addition take, against torch, on the CPU."""

import itertools
import sys

import torch
from tqdm import tqdm

import fastclip

from .core import command, record, rows, timing
from .core.models import MODELS
from .core.problem import Problem
from .report import tensors as report

BASE = "fastclip"
MAX_NORM = 1e-3  # below all norms: each micro-batch is clipped


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("accumulation", __doc__, arguments, rounds=20)
    found = record.describe(arguments, "python -m benchmarks accumulation") | {"kind": "accumulation", "cases": []}
    for model, threads in tqdm(list(itertools.product(options.model, options.threads)), unit="case"):
        found["cases"].append(measure(model, threads, options.rounds))
    return command.finish(found, report, options.out)


def measure(model, threads, rounds):
    """A row: microseconds per micro-batch, and how many times longer the others take, round by round."""
    torch.set_num_threads(threads)
    problem = Problem(model, MODELS[model], contenders=())

    def grads():
        return [grad.clone() for grad in problem.grads]

    steps = {
        BASE: by_fastclip(problem.copy(), grads(), max_norm=MAX_NORM),
        "fastclip, QuantileNorm": by_fastclip(problem.copy(), grads(), max_norm=fastclip.QuantileNorm(0.1, scale=1e-3)),
        "torch": by_torch(problem.copy(), grads(), [torch.zeros_like(p) for p in problem.params]),
        "torch without a clip": by_torch(problem.copy(), grads(), [torch.zeros_like(p) for p in problem.params], False),
    }
    samples = timing.rounds({name: timing.Timer(step) for name, step in steps.items()}, rounds)
    return {
        "model": model,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "threads": threads,
        "us_per_micro_batch": rows.microseconds(samples),
        "ratio": {name: rows.described(timing.ratios(samples[name], samples[BASE])) for name in steps},
    }


def by_fastclip(params, grads, **limit):
    """A micro-batch whose backward pass leaves these gradients each time; they are added to those of `params`."""
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, lr=0.0), **limit)

    def add():
        with micro_batch:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    return add


def by_torch(params, grads, sums, clips=True):
    """The same by `clip_grad_norm_`, which scales the gradients in place, and one fused addition to `sums`."""

    @torch.no_grad()
    def add():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if clips:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        torch._foreach_add_(sums, grads)

    return add
