"""python -m benchmarks peers: a step with a norm clip, and one without a clip, beside the optimizers of others.

Those that are there are compared with fastclip first. What disagrees, or does not run, is said and left out.
"""

import itertools
import math
import sys
from importlib import metadata

import torch
from tqdm import tqdm

from .core import agreement, command, record, rows, timing
from .core.contenders import with_norm_clip
from .core.models import MODELS
from .core.peers import OURS, PEERS, RULES, SETTINGS, unusable
from .core.problem import Problem
from .cpu import blocks
from .report import peers as report

CLIPS = {"none": None, "norm": 1.0}
OWN = "fastclip"
# torch's norm is off by up to 2e-3 in large models; in 16 bits whoever rounds what is in between ends beside it.
LARGEST_DEVIATION = {"float32": 5e-3, "bfloat16": 5e-2}


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command.parse("peers", __doc__, arguments, rounds=15, models=("tiny-600", "conformer-m", "dense-100m"))
    found = record.describe(arguments, "python -m benchmarks peers") | {"kind": "peers", "cases": []}
    usable, found["left_out"] = usable_peers()
    names = {name for peers in usable.values() for name in peers}
    found["peers"] = {name: version_of(PEERS[name].package) for name in PEERS if name in names}
    cases = list(itertools.product(LARGEST_DEVIATION, options.model, RULES, CLIPS))
    for dtype, model, rule, clip in tqdm(cases, unit="case"):
        found["cases"] += measure(dtype, model, rule, clip, usable[rule], options, found["left_out"])
    for name, why in found["left_out"].items():
        print(f"Left out: {name}: {why}", file=sys.stderr)
    return command.finish(found, report, options.out)


def usable_peers():
    """The peers of each rule, and why others are left out."""
    usable, left_out = {rule: [] for rule in RULES}, {}
    for name, peer in PEERS.items():
        for rule in peer.rules:
            if why := unusable(name, rule):
                left_out[name] = why
            else:
                usable[rule].append(name)
    return usable, left_out


def version_of(package):
    return torch.__version__ if package is None else metadata.version(package)


def measure(dtype, model, rule, clip, peers, options, left_out):
    """A row for each number of threads."""
    problem = Problem(model, MODELS[model], dtype=getattr(torch, dtype), contenders=())
    deviations = {name: deviation(problem, rule, clip, name) for name in peers}
    for name in [name for name, value in deviations.items() if not value <= LARGEST_DEVIATION[dtype]]:
        left_out[f"{name}, {dtype}, {rule}, clip {clip}, {model}"] = (
            f"differs from fastclip by {deviations.pop(name):.2g}"
        )
    steps = {name: step_of(name, rule, clip, problem.copy()) for name in (OWN, *deviations)}
    found = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        counts = blocks(steps, problem.numel)
        timers = {name: timing.Timer(step, steps=counts[name]) for name, step in steps.items()}
        samples = timing.rounds(timers, options.rounds)
        found.append(
            {
                "dtype": dtype,
                "model": model,
                "tensors": len(problem.params),
                "parameters": problem.numel,
                "rule": rule,
                "clip": clip,
                "threads": threads,
                "us_per_step": rows.microseconds(samples),
                "speed_up": {name: rows.described(timing.ratios(samples[name], samples[OWN])) for name in deviations},
                "deviation": deviations,
            }
        )
    return found


def step_of(name, rule, clip, params):
    """Returns a function that clips, if so, and steps."""
    limit = CLIPS[clip]
    if name == OWN:
        return OURS[rule](params, **SETTINGS[rule], max_norm=limit).step
    optimizer = PEERS[name].make(rule, params, SETTINGS[rule])
    return optimizer.step if limit is None else with_norm_clip(optimizer, params, limit)


def deviation(problem, rule, clip, name):
    """Returns how far a peer is from fastclip after three steps: the norm of the difference, over that of the change.

    A largest element would say nothing of Lion: where a momentum is almost 0, its sign is a matter of rounding. In 16
    bits parameters start at 0: a step is lost in the rounding of others.
    """
    from_zero = problem.dtype.itemsize == 2
    results = []
    for contender in (name, OWN):
        params = problem.copy()
        problem.reset_params(params, from_zero)
        step = step_of(contender, rule, clip, params)
        for factor in agreement.FACTORS:
            problem.reset_grads(params, factor)
            step()
        results.append(params)
    apart = norm(p.detach() - q.detach() for p, q in zip(*results, strict=True))
    starts = itertools.repeat(0, len(problem.params)) if from_zero else problem.params
    return rows.digits(apart / norm(q.detach() - start for q, start in zip(results[1], starts, strict=True)))


def norm(tensors):
    return math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in tensors))
