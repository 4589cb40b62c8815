"""Times things in turns, and says what came out: median and spread."""

import gc
import random
import statistics
import time

BLOCK_SECONDS = 0.02


def rounds(actors, steps, count, on_round=None):
    """Samples in seconds per step: in every round, each actor runs one block of its number of steps.

    The order changes from round to round: what the machine does besides, and what the one before left in the caches,
    hits all of them.

    Args:
        actors (dict): functions by name.
        steps (dict): steps per block, by name.
        count: number of rounds.
        on_round (Callable, optional): called after each round.
    """
    shuffler = random.Random(0)
    samples = {name: [] for name in actors}
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            for name in shuffler.sample(list(actors), len(actors)):
                samples[name].append(block(actors[name], steps[name]) / steps[name])
            if on_round:
                on_round()
    finally:
        gc.enable()
    return samples


def block(step, steps):
    """Seconds that a number of steps take."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def steps_per_block(step):
    """Steps that take about BLOCK_SECONDS, at least 1."""
    block(step, 1)  # the first one allocates, and builds what is kept
    steps = 1
    while (taken := block(step, steps)) < BLOCK_SECONDS / 4:
        steps *= 2
    return max(1, round(BLOCK_SECONDS * steps / taken))


def summary(samples):
    """Median, 10th and 90th percentile."""
    if len(samples) == 1:
        return {"median": samples[0], "p10": samples[0], "p90": samples[0]}
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": statistics.median(samples), "p10": deciles[0], "p90": deciles[-1]}


def ratios(numerators, denominators):
    """Of each round; a ratio of medians would mix rounds in which the machine was fast with slow ones."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def fastest(samples):
    """Name with the smallest median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))
