"""python -m benchmarks by-tensor: norms and limits of each tensor, ScaledAdam and LAMB, against AdamW with a norm clip.

All take the same gradients, none of which a limit changes.
"""

import sys

import torch
from tqdm import tqdm

import fastclip
from fastclip.settings import LIMITS

from .core import agreement, command, record, rows, timing
from .core.contenders import with_norm_clip
from .core.models import MODELS
from .core.problem import Problem
from .core.stacked import StackedScaledAdam
from .report import tensors as report

BASE = "AdamW, max_norm"
# Of one optimizer, whose settings change from block to block: others would have other memory.
SETTINGS = {
    BASE: {"max_norm": 1e9},
    "the same again": {"max_norm": 1e9},
    "norm_scope group": {"max_norm": 1e9, "norm_scope": "group"},
    "norm_scope parameter": {"max_norm": 1e9, "norm_scope": "parameter"},
    "EmaNorm of each parameter": {"max_norm": fastclip.EmaNorm(ratio=1e9), "norm_scope": "parameter"},
    "max_update_rms": {"max_update_rms": 1e9},
    "max_change": {"max_change": 1e9},
    "max_relative_change": {"max_relative_change": 1e9},
    "max_relative_change of each parameter": {"max_relative_change": 1e9, "norm_scope": "parameter"},
    "max_relative_change and max_norm": {"max_relative_change": 1e9, "max_norm": 1e9},
}
NONE = {**dict.fromkeys([*LIMITS, "max_update_rms"]), "norm_scope": "global", "skip_nonfinite": False}
FUSED, STACKED = "torch's fused AdamW and its clip", "ScaledAdam, stacked in plain torch"
OTHERS = {
    "ScaledAdam": lambda params: fastclip.ScaledAdam(params, lr=1e-9),
    "ScaledAdam, clipping_scale": lambda params: fastclip.ScaledAdam(params, lr=1e-9, clipping_scale=1e9),
    "LAMB, max_norm": lambda params: fastclip.LAMB(params, lr=1e-9, max_norm=1e9),
    "NovoGrad": lambda params: fastclip.NovoGrad(params, lr=1e-9),
    FUSED: lambda params: torch.optim.AdamW(params, lr=1e-9, fused=True),
    STACKED: lambda params: StackedScaledAdam(params, lr=1e-9, clipping_scale=1e9),
}
LARGEST_DEVIATION = 1e-5  # of ScaledAdam from its stacked writing, relative to the parameter's largest element


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("by-tensor", __doc__, arguments, rounds=11, models=("conformer-m", "zipformer-m"))
    found = record.describe(arguments, "python -m benchmarks by-tensor") | {"kind": "by_tensor", "cases": []}
    for model in options.model:
        problem = Problem(model, MODELS[model], contenders=())
        deviation = deviation_of_scaled_adam(problem)
        timers = all_timers(problem)
        for threads in tqdm(options.threads, unit="case", desc=model):
            found["cases"].append(measure(problem, timers, threads, options.rounds) | {"deviation": deviation})
    return command.finish(found, report, options.out)


def deviation_of_scaled_adam(problem, steps=6):
    """Returns how far ScaledAdam is from its stacked writing; raises Disagreement if that is too far."""
    ours, theirs = problem.copy(), problem.copy()
    fast, stacked = (kind(p, lr=0.01) for kind, p in ((fastclip.ScaledAdam, ours), (StackedScaledAdam, theirs)))
    for _ in range(steps):
        fast.step()
        stacked.step()
    found = max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(ours, theirs, strict=True) if q.numel())
    if found > LARGEST_DEVIATION:
        raise agreement.Disagreement(f"{problem.model}: ScaledAdam and its stacked writing differ by {found:.1g}")
    return rows.digits(found)


def all_timers(problem):
    """Functions that take a step, by name."""
    switched = fastclip.AdamW(problem.copy(), lr=1e-9)

    def with_settings(own):
        def step():
            switched.param_groups[0].update(NONE | own)
            switched.step()

        return step

    steps = {name: with_settings(own) for name, own in SETTINGS.items()}
    for name, make in OTHERS.items():
        params = problem.copy()
        optimizer = make(params)
        steps[name] = with_norm_clip(optimizer, params, 1e9) if name == FUSED else optimizer.step
    return steps


def timer(step):
    """Times blocks of steps, after one that meets what the block before has left in the caches."""
    timed = timing.Timer(step, steps=3)

    def seconds_per_step():
        step()
        return timed()

    return seconds_per_step


def measure(problem, steps, threads, rounds):
    """A row: milliseconds per step, and the time of each over that of the base, round by round."""
    torch.set_num_threads(threads)
    samples = timing.rounds({name: timer(step) for name, step in steps.items()}, rounds)
    return {
        "model": problem.model,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "threads": threads,
        "ms_per_step": {name: rows.described(rows.scaled(1e3, values)) for name, values in samples.items()},
        "ratio": {name: rows.described(timing.ratios(samples[name], samples[BASE])) for name in samples},
    }
