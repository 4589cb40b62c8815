"""Times contenders in turns, and returns median and spread."""

import gc
import random
import statistics
import time

BLOCK_SECONDS = 0.02


class Timer:
    """Times a step in blocks; each call gives seconds per step.

    Args:
        step (Callable): the step to time.
        clock (Callable, optional): block() below, or another function of the same arguments and result.
        steps (int, optional): steps per block. By default, as many as take BLOCK_SECONDS.
        inside (int): steps that one call of `step` takes, as the replay of a graph may hold several.
    """

    def __init__(self, step, clock=None, steps=None, inside=1):
        self.step, self.clock, self.inside = step, clock or block, inside
        self.steps = steps or steps_per_block(step, self.clock)

    def __call__(self):
        return self.clock(self.step, self.steps) / (self.steps * self.inside)


def rounds(timers, count, on_round=None):
    """Samples in seconds per step: in every round, each timer times one block.

    The order changes from round to round: other work of the machine, and the caches' contents, slow all timers alike.

    Args:
        timers (dict): functions that return seconds per step, by name.
        count: number of rounds.
        on_round (Callable, optional): called after each round.
    """
    shuffler = random.Random(0)
    samples = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            for name in shuffler.sample(list(timers), len(timers)):
                samples[name].append(timers[name]())
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


def steps_per_block(step, clock=block):
    """Steps that take about BLOCK_SECONDS by a clock, at least 1."""
    clock(step, 1)  # the first step allocates states and scratch memory
    steps = 1
    while (taken := clock(step, steps)) < BLOCK_SECONDS / 4:
        steps *= 2
    return max(1, round(BLOCK_SECONDS * steps / taken))


def summary(samples):
    """Returns median, 10th and 90th percentile."""
    if len(samples) == 1:
        return {"median": samples[0], "p10": samples[0], "p90": samples[0]}
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": statistics.median(samples), "p10": deciles[0], "p90": deciles[-1]}


def ratios(numerators, denominators):
    """Ratios of each round. A ratio of medians would mix rounds in which the machine was fast with slow ones."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def fastest(samples):
    """Returns the name with the smallest median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))
