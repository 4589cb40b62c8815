"""python -m tests.long.soak: very many steps of a small model: memory stays flat, and the result is torch's to the bit.

Gradients are new tensors at every step, groups are added now and then, a scheduler moves the learning rate, a value
clip, momentum and weight decay are at work, AdamW steps beside SGD, max_norm=inf measures every gradient, and every
97th step is skipped for a NaN. Memory is judged by the resident set: its median over the last quarter of the samples
may exceed that over the second quarter by 2 MiB. (The first quarter is left out: torch sets itself up.) Over 1,000,000
steps that finds a leak of 4 bytes per step.
"""

import argparse
import math
import os
import statistics
import sys
import time

import torch
from tqdm import tqdm

import fastclip
from tests.support.cases import exact_square_roots

SHAPES = [(33, 7), (5,)]
SAMPLES = 200
NEW_GROUPS = 3  # in the first quarter, so that what they need is not taken for a leak
SKIP_EVERY = 97
LIMIT = 2 * 2**20


def main(arguments=None, between_steps=None):
    """Returns the exit code: 1 where memory grows or a bit differs. `between_steps` is called after each step."""
    options = parse(arguments)
    torch.set_num_threads(1)
    training = Training()
    samples = []
    start = time.monotonic()
    for step in tqdm(range(options.steps), unit=" steps", mininterval=0.5):
        if step % max(1, options.steps // 4 // NEW_GROUPS) == 0 and len(training.optimizer.param_groups) <= NEW_GROUPS:
            training.add_group()
        training.step(step)
        if between_steps is not None:
            between_steps(training)
        if step % max(1, options.steps // SAMPLES) == 0:
            samples.append(resident_bytes())
    growth = growth_of(samples)
    wrong = training.difference()
    passed = growth <= LIMIT and wrong is None
    print(
        f"soak: {'passed' if passed else 'FAILED'}, {options.steps} steps in {time.monotonic() - start:.0f} s, "
        f"resident memory {samples[-1] / 2**20:.1f} MiB, grown by {growth / 1024:.0f} KiB (limit {LIMIT // 1024}), "
        f"{len(training.ours)} parameters in {len(training.optimizer.param_groups)} groups "
        f"{'have the bits of torch' if wrong is None else wrong}"
    )
    return 0 if passed else 1


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m tests.long.soak",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1_000_000, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < SAMPLES:
        parser.error(f"--steps is at least {SAMPLES}")
    return options


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_of(samples):
    """From the second quarter to the last one, in bytes."""
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


class Training:
    """The same steps by fastclip and by the loop of clamp_ and torch's: SGD in several groups, and AdamW beside it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.ours, self.theirs = [], []
        settings = {"momentum": 0.9, "weight_decay": 1e-4}
        ours, theirs = self.new_params()
        of_adam, of_adam_loop = self.new_params()
        self.adam = fastclip.AdamW(of_adam, clip_value=0.5, amsgrad=True, skip_nonfinite=True)
        self.adam_loop = torch.optim.AdamW(of_adam_loop, amsgrad=True, foreach=False)
        self.optimizer = fastclip.SGD(ours, lr=0.1, clip_value=0.5, max_norm=math.inf, skip_nonfinite=True, **settings)
        self.loop = torch.optim.SGD(theirs, lr=0.1, foreach=False, **settings)
        self.schedulers = [
            torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=50, cycle_momentum=False)
            for o in (self.optimizer, self.loop)
        ]
        self.skipped = 0

    def new_params(self):
        values = [torch.randn(shape, generator=self.generator) for shape in SHAPES]
        made = [[v.clone().requires_grad_() for v in values] for _ in range(2)]
        self.ours += made[0]
        self.theirs += made[1]
        return made

    def add_group(self):
        ours, theirs = self.new_params()
        self.optimizer.add_param_group({"params": ours, "momentum": 0.5})
        self.loop.add_param_group({"params": theirs, "momentum": 0.5})
        for scheduler in self.schedulers:  # torch's schedulers know of the groups they were made with
            scheduler.base_lrs.append(1e-3)
            scheduler.max_lrs.append(0.05)

    def step(self, number):
        skip = number % SKIP_EVERY == SKIP_EVERY - 1
        flat = torch.randn(sum(p.numel() for p in self.ours), generator=self.generator)
        for p, q, values in zip(self.ours, self.theirs, flat.split([p.numel() for p in self.ours]), strict=True):
            p.grad = q.grad = values.view(p.shape).clone()  # the loop clamps it, fastclip has gone first
        if skip:
            for p in (self.ours[-1], self.adam.param_groups[0]["params"][0]):
                p.grad.fill_(math.nan)
        for optimizer in (self.optimizer, self.adam):
            optimizer.step()
        self.skipped += skip
        if not skip:
            for q in self.theirs:
                q.grad.clamp_(-0.5, 0.5)
            self.loop.step()
            with exact_square_roots():
                self.adam_loop.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def difference(self):
        """What is not as in torch, or None."""
        for index, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            if not torch.equal(p, q):
                return f"differ from torch: parameter {index} by up to {(p - q).abs().max():.3g}"
            state = self.loop.state.get(q) or self.adam_loop.state[q]
            found = self.optimizer.state.get(p) or self.adam.state[p]
            for name, value in state.items():
                if not torch.equal(found[name], value):
                    return f"differ from torch: the {name} of parameter {index}"
        for optimizer in (self.optimizer, self.adam):
            if optimizer.skipped_steps.item() != self.skipped:
                return f"differ from torch: {optimizer.skipped_steps.item()} steps skipped, not {self.skipped}"
        return None


if __name__ == "__main__":
    sys.exit(main())
