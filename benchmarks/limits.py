"""python -m benchmarks limits: what limits on the change, and by past norms, cost more than a fixed norm clip.

All are fastclip's: the same step over the same gradients, with one setting or another.
"""

import itertools
import sys

import torch
from tqdm import tqdm

import fastclip
from fastclip.settings import LIMITS

from .core import command, record, rows, timing
from .core.models import MODELS
from .core.problem import Problem
from .report import tensors as report

BASE = "max_norm"
# A second norm clip shows how far two equal steps differ. No limit acts: that would change no time, but the values.
QUANTILE, EMA = fastclip.QuantileNorm(scale=1e9), fastclip.EmaNorm(ratio=1e9)
SETTINGS = {
    BASE: {"max_norm": 1e9},
    "max_norm again": {"max_norm": 1e9},
    "max_change": {"max_change": 1e9},
    "max_relative_change": {"max_relative_change": 1e9},
    "both and max_norm": {"max_norm": 1e9, "max_change": 1e9, "max_relative_change": 1e9},
    "QuantileNorm": {"max_norm": QUANTILE},
    "EmaNorm": {"max_norm": EMA},
    "QuantileNorm and skip_norm": {"max_norm": QUANTILE, "skip_norm": EMA},
}
RULES_NEED = {"skip_nonfinite": True}  # so all have it; it changes nothing else without a value clip
MOMENTUMS = (0.0, 0.9)
LEAST_STEPS = 8  # of a block: the first meets what the block before has left in the caches


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("limits", __doc__, arguments, rounds=40)
    found = record.describe(arguments, "python -m benchmarks limits") | {"kind": "limits", "cases": []}
    combinations = list(itertools.product(options.model, MOMENTUMS, options.threads))
    for model, momentum, threads in tqdm(combinations, unit="case"):
        found["cases"].append(measure(model, momentum, threads, options.rounds))
    return command.finish(found, report, options.out)


def measure(model, momentum, threads, rounds):
    """A row: microseconds per step, and what each setting takes more than a norm clip, round by round."""
    torch.set_num_threads(threads)
    problem = Problem(model, MODELS[model], contenders=())
    optimizer = fastclip.SGD(problem.copy(), lr=1e-9, momentum=momentum)
    steps = max(LEAST_STEPS, timing.steps_per_block(optimizer.step))
    # One optimizer for all: others would have other memory, and notice that somebody else writes to the parameters.
    timers = {name: timer(optimizer, own, steps) for name, own in SETTINGS.items()}
    samples = timing.rounds(timers, rounds)
    more = {name: [a - b for a, b in zip(samples[name], samples[BASE], strict=True)] for name in SETTINGS}
    return {
        "model": model,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "momentum": momentum,
        "threads": threads,
        "us_per_step": rows.microseconds(samples),
        "ratio": {name: rows.described(timing.ratios(samples[name], samples[BASE])) for name in SETTINGS},
        "us_more": rows.microseconds(more),
    }


def timer(optimizer, settings, steps):
    """Times blocks of steps with these settings, after one that measures the parameters."""
    timed = timing.Timer(optimizer.step, steps=steps)

    def seconds_per_step():
        optimizer.param_groups[0].update(dict.fromkeys(LIMITS) | RULES_NEED | settings)
        optimizer.step()
        return timed()

    return seconds_per_step
