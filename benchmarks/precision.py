"""python -m benchmarks precision: steps of 16-bit parameters beside the limit of the memory, and beside torch's.

One model of 100M parameters in bfloat16 and float16: rounded to nearest, at random, and with master weights; gradients
of several magnitudes, as small ones are subnormal in float16. fastclip clips values, torch does not clip.
"""

import gc
import itertools
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tqdm import tqdm

import fastclip

from .core import command, limit, memory, record, rows, timing
from .core.models import MODELS, count
from .core.problem import GRADS_STD, Problem
from .report import precision as report

MODEL = "dense-100m"
WAYS = {
    "to nearest": {},
    "at random": {"stochastic_rounding": True, "rounding_seed": 0},
    "master weights": {"master_weights": True},
}
SCALES = {torch.bfloat16: (1e-2,), torch.float16: (1.0, 1e-4, 1e-7)}  # standard deviations of gradients
BYTES = 4 + 4 + 2 * (2 + 2 + 4 + 4 + 4)  # the problem in float32, and two optimizers


@dataclass(frozen=True)
class Rule:
    name: str
    ours: type
    theirs: type
    settings: dict
    implementation: str  # torch's fastest that changes 16-bit parameters on a CPU: its fused SGD does not


RULES = (
    Rule("SGD, momentum 0.9", fastclip.SGD, torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, "foreach"),
    Rule("AdamW", fastclip.AdamW, torch.optim.AdamW, {"lr": 1e-3}, "fused"),
)


class Unchanged(Exception):
    """A step has left parameters as they were: its time says nothing."""


def main(arguments=None):
    """Returns the exit code: 2 where there is no limit to measure, or memory is short."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("precision", __doc__, arguments, rounds=9, models=[MODEL])
    needed = BYTES * max(count(MODELS[model]) for model in options.model)
    if lack := memory.lack(needed) or limit.lack(max(options.threads)):
        print(f"Nothing was measured: {lack}.", file=sys.stderr)
        return 2
    found = record.describe(arguments, "python -m benchmarks precision") | {"kind": "precision", "cases": []}
    for rule, dtype in itertools.product(RULES, SCALES):
        require_change(rule, dtype)
    for model in options.model:
        problem = Problem(model, MODELS[model], contenders=())
        cases = [
            (d, scale, way, rule) for d, all_ in SCALES.items() for scale in all_ for way in WAYS for rule in RULES
        ]
        for case in tqdm(cases, unit="case", desc=model):
            found["cases"] += timed_rows(problem, options, *case)
    return command.finish(found, report, options.out)


def timed_rows(problem, options, dtype, scale, way, rule):
    """Returns a row for each number of threads."""
    gc.collect()
    optimizers = {
        "fastclip": rule.ours(copied(problem, dtype, scale), **rule.settings, **WAYS[way], clip_value=scale),
        "torch": rule.theirs(copied(problem, dtype, scale), **rule.settings, **{rule.implementation: True}),
    }
    for optimizer in optimizers.values():
        optimizer.step()  # makes states
    actors = {name: optimizer.step for name, optimizer in optimizers.items()}
    actors["limit"] = limit_of(optimizers["fastclip"])
    if rule.ours is fastclip.AdamW:
        actors["divider"] = limit.Divider(problem.numel).run
    found, before = [], torch.get_num_threads()
    for threads in options.threads:
        torch.set_num_threads(threads)
        timers = {name: timing.Timer(step) for name, step in actors.items()}
        samples = timing.rounds(timers, options.rounds)
        found.append(
            {
                "model": problem.model,
                "tensors": len(problem.params),
                "parameters": problem.numel,
                "dtype": str(dtype).removeprefix("torch."),
                "rule": rule.name,
                "rounded": way,
                "scale": scale,
                "threads": threads,
                "ms_per_step": {name: rows.described(rows.scaled(1e3, values)) for name, values in samples.items()},
                "of_limit": rows.described(timing.ratios(samples["limit"], samples["fastclip"])),
                "of_divider": rows.described(timing.ratios(samples["divider"], samples["fastclip"]))
                if "divider" in samples
                else None,
                "over_torch": rows.described(timing.ratios(samples["torch"], samples["fastclip"])),
            }
        )
    torch.set_num_threads(before)
    return found


def copied(problem, dtype, scale):
    """Parameters with gradients of this standard deviation."""
    params = problem.copy(dtype)
    problem.reset_grads(params, scale / GRADS_STD)
    return params


def require_change(rule, dtype):
    """Raises Unchanged if a step of either optimizer leaves parameters as they were."""
    for cls, own in ((rule.ours, {}), (rule.theirs, {rule.implementation: True})):
        p = torch.zeros(4096, dtype=dtype, requires_grad=True)
        p.grad = torch.ones_like(p)
        cls([p], **rule.settings, **own).step()
        if not p.detach().all():
            name = f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"
            raise Unchanged(f"{name}: a step has not changed all its parameters in {dtype}")


def limit_of(optimizer):
    """Returns a pass over all arrays of a step. Arrays of 16 bits and those in float32 take one each."""
    limits = {}
    for p, state in optimizer.state.items():
        arrays = [p, *(value for name, value in state.items() if name != "step")]
        wide = [array for array in arrays if array.dtype == torch.float32]
        narrow = [array for array in arrays if array.dtype != torch.float32]
        add(limits, "narrow", p.grad, narrow)
        if wide:
            add(limits, "wide", wide[-1], wide)  # reads one of those that it writes: from the cache
    each = [limit.Limit(*of_it) for of_it in limits.values()]

    def step():
        for of_it in each:
            of_it.update()

    return step


def add(limits, name, read, written):
    """Adds a tensor to the arguments of a Limit."""
    params, states = limits.setdefault(name, ([], []))
    first, *others = written
    params.append(SimpleNamespace(grad=read, detach=first.detach))
    states.append(others)
