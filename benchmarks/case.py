"""One row of the results: a model, a clip, an update rule, a number of threads.

What the rows of a CPU and of a GPU share stands here; gpu_case.py has the rest of a GPU's.
"""

import torch

from . import agreement, rules, timing
from .contenders import CLIPS, OF_TORCH, Contender
from .problem import Probe, Problem, is_normal

# From this size on, time is compared with what the memory allows. Below, a model fits the caches of many machines.
LARGE = 20_000_000
SAME_STEPS = 1_000_000


def measure(problem, clip, rule, thread_counts, rounds, on_round=None):
    """One row for each number of threads.

    Gradients are not set anew between steps: what torch's clip functions leave in them is clipped already, but no
    step's time depends on the values.
    """
    contenders = at_the_start(problem, clip, rule)
    actors = {name: contender.step for name, contender in contenders.items()}
    single_elements = Problem("host", [(1,)] * len(problem.params)).copies["fastclip"]
    actors["host"] = Contender("fastclip", single_elements, CLIPS[clip], rule).step
    if problem.numel >= LARGE:
        actors["add_"] = Probe(problem.numel).step
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        steps = blocks(actors, problem.numel)
        timers = {name: timing.Timer(step, steps=steps[name]) for name, step in actors.items()}
        row = head(problem, clip, rule) | {"threads": threads, "steps_per_block": steps}
        rows.append(row | evaluate(row, timing.rounds(timers, rounds, on_round)))
    require_normal(contenders, row)
    return rows


def at_the_start(problem, clip, rule):
    """All contenders, each on its copy of the problem."""
    contenders = {}
    for name, copies in problem.copies.items():
        problem.reset_params(copies)
        problem.reset_grads(copies)
        contenders[name] = Contender(name, copies, CLIPS[clip], rule)
    return contenders


def agreement_row(problem, clip, rule, threads=(1,)):
    """How far the contenders are apart; raises Disagreement."""
    try:
        deviations = agreement.check(problem, CLIPS[clip], rule, threads)
    except agreement.Disagreement as error:
        raise agreement.Disagreement(f"{problem.model}, {clip}, {rule.title}: {error}") from error
    deviations = {name: digits(value) for name, value in deviations.items()}
    return {"model": problem.model, "clip": clip, **rule.in_row(), "deviation": deviations}


def head(problem, clip, rule):
    """What a row is about."""
    return {
        "model": problem.model,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "clip": clip,
        "limit": CLIPS[clip][1],
        **rule.in_row(),
    }


def require_normal(contenders, row):
    """ArithmeticError where a contender worked on numbers that have timings of their own."""
    for name, contender in contenders.items():
        tensors = [t for written in contender.results().values() for t in written]
        if not is_normal(tensors + [p.grad for p in contender.params]):
            raise ArithmeticError(
                f"{name} met denormals, inf or NaN: {row['model']}, {row['clip']}, {rules.of_row(row).title}"
            )


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
    found = {
        "us_per_step": microseconds({name: values for name, values in samples.items() if name != "add_"}),
        **speed_ups(samples),
        "host_ns_per_tensor": described(scaled(1e9 / row["tensors"], samples["host"])),
    }
    if "add_" in samples:
        in_add = [row["parameters"] * Probe.BYTES / seconds for seconds in samples["add_"]]
        found["gb_per_s"] = described(scaled(1e-9, in_add))
        found["floor_bytes_per_parameter"] = floor_bytes(row)
        found["of_floor"] = of_floor(row["parameters"] * found["floor_bytes_per_parameter"], in_add, own)
    return found


def microseconds(samples):
    return {name: described(scaled(1e6, values)) for name, values in samples.items()}


def speed_ups(samples):
    """Of fastclip, over the loop and over the best of torch."""
    own = samples["fastclip"]
    best = timing.fastest({name: samples[name] for name in OF_TORCH})
    return {
        "vs_loop": described(timing.ratios(samples["loop"], own)),
        "best_of_torch": best,
        "vs_best_of_torch": described(timing.ratios(samples[best], own)),
    }


def floor_bytes(row, itemsize=4):
    """Bytes per parameter that a step has to move."""
    return rules.of_row(row).elements(row["clip"]) * itemsize


def of_floor(moved, speeds, own):
    """The part of the time that the bytes which have to move take at the speed measured in the same round."""
    return described([moved / speed / seconds for speed, seconds in zip(speeds, own, strict=True)])


def scaled(factor, samples):
    return [factor * value for value in samples]


def described(samples):
    """Summary and samples, to five digits."""
    summary = {name: digits(value) for name, value in timing.summary(samples).items()}
    return summary | {"samples": [digits(value) for value in samples]}


def digits(value):
    return float(f"{value:.5g}")
