"""One row of the results: a model, a clip, a momentum, a number of threads."""

import torch

from . import timing
from .contenders import CLIPS, OF_TORCH, Contender
from .problem import Probe, Problem, is_normal

# From this size on, time is compared with what the memory allows. Below, a model fits the caches of many machines.
LARGE = 20_000_000
SAME_STEPS = 1_000_000

# Bytes per parameter that a step has to move, without and with momentum: gradient, parameter and momentum are read,
# parameter and momentum are written. The norm reads the gradients before.
FLOOR = {("value", False): 12, ("value", True): 20, ("norm", False): 16, ("norm", True): 24}


def measure(problem, clip, momentum, thread_counts, rounds, on_round=None):
    """One row for each number of threads.

    Gradients are not set anew between steps: what torch's clip functions leave in them is clipped already, but no
    step's time depends on the values.
    """
    contenders = {}
    for name, copies in problem.copies.items():
        problem.reset_params(copies)
        problem.reset_grads(copies)
        contenders[name] = Contender(name, copies, CLIPS[clip], momentum)
    actors = {name: contender.step for name, contender in contenders.items()}
    single_elements = Problem("host", [(1,)] * len(problem.params)).copies["fastclip"]
    actors["host"] = Contender("fastclip", single_elements, CLIPS[clip], momentum).step
    if problem.numel >= LARGE:
        actors["add_"] = Probe(problem.numel).step
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        steps = blocks(actors, problem.numel)
        row = {
            "model": problem.model,
            "tensors": len(problem.params),
            "parameters": problem.numel,
            "clip": clip,
            "limit": CLIPS[clip][1],
            "momentum": momentum,
            "threads": threads,
            "steps_per_block": steps,
        }
        rows.append(row | evaluate(row, timing.rounds(actors, steps, rounds, on_round)))
    for name, contender in contenders.items():
        tensors = [t for written in contender.results().values() for t in written]
        if not is_normal(tensors + [p.grad for p in contender.params]):
            raise ArithmeticError(f"{name} met denormals, inf or NaN: {problem.model}, {clip}, momentum {momentum:g}")
    return rows


def blocks(actors, numel):
    """Steps per block of each actor."""
    steps = {name: timing.steps_per_block(step) for name, step in actors.items()}
    if numel >= SAME_STEPS:
        # The first step of a block meets a cache full of the previous contender's data: the same share for all.
        same = max(count for name, count in steps.items() if name != "host")
        steps = {name: count if name == "host" else same for name, count in steps.items()}
    return steps


def evaluate(row, samples):
    """Times, speed-ups and the part of the floor."""
    own = samples["fastclip"]
    best = timing.fastest({name: samples[name] for name in OF_TORCH})
    found = {
        "us_per_step": {name: described(scaled(1e6, values)) for name, values in samples.items() if name != "add_"},
        "vs_loop": described(timing.ratios(samples["loop"], own)),
        "best_of_torch": best,
        "vs_best_of_torch": described(timing.ratios(samples[best], own)),
        "host_ns_per_tensor": described(scaled(1e9 / row["tensors"], samples["host"])),
    }
    if "add_" in samples:
        floor = FLOOR[row["clip"], row["momentum"] != 0]
        in_add = [Probe.BYTES / seconds for seconds in samples["add_"]]
        found["gb_per_s"] = described(scaled(row["parameters"] / 1e9, in_add))
        found["floor_bytes_per_parameter"] = floor
        found["of_floor"] = described([floor / speed / seconds for speed, seconds in zip(in_add, own, strict=True)])
    return found


def scaled(factor, samples):
    return [factor * value for value in samples]


def described(samples):
    """Summary and samples, to five digits."""
    summary = {name: digits(value) for name, value in timing.summary(samples).items()}
    return summary | {"samples": [digits(value) for value in samples]}


def digits(value):
    return float(f"{value:.5g}")
