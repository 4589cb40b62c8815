"""python -m benchmarks host: what a step costs per tensor, over the number of tensors, on one thread.

Every tensor has one element, so hardly anything is moved or computed.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from tqdm import tqdm

from .core import record, rows, timing
from .core.contenders import CLIPS, RULES, Contender
from .report import tensors as report

COUNTS = (100, 1_000, 10_000, 100_000)
MEASURED = [*RULES["sgd"], *RULES["adamw"]]
# torch takes seconds for a step of more.
MOST_FOR_TORCH = 10_000
MOST_FOR_DTENSORS = 1_000
DISPLACING_BYTES = 128 * 2**20  # more than the caches of most machines


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    found = record.describe(arguments, "python -m benchmarks host") | {"kind": "host_time", "cases": []}
    combinations = list(itertools.product(options.count, MEASURED, CLIPS))
    for count, rule, clip in tqdm(combinations, unit="case"):
        found["cases"].append(alone(measure, count, rule, clip, options.rounds))
    print(report.markdown(found))
    options.out.mkdir(parents=True, exist_ok=True)
    record.write(found, options.out / "host_time.json")
    print(f"\nWritten: {options.out / 'host_time.json'}")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--count", nargs="+", type=int, default=COUNTS, help=f"of tensors; default: {COUNTS}")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(*options.count, options.rounds) < 1:
        parser.error("--count and --rounds are at least 1")
    return options


def alone(function, *arguments):
    """Calls a function in a process of its own, and returns its result: earlier cases have left holes in the heap, over
    which small tensors would be scattered."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(count, rule, clip, rounds):
    """Returns a row: nanoseconds per tensor of each contender, and of fastclip's walk."""
    torch.set_num_threads(1)
    with process_group(8):
        samples = timing.rounds(timers(count, rule, clip), rounds)
    ns = {name: rows.described(rows.scaled(1e9 / count, values)) for name, values in samples.items()}
    return {"tensors": count, **rule.in_row(), "clip": clip, "ns_per_tensor": ns}


def timers(count, rule, clip):
    names = ["fastclip", "fused", "foreach"] if count <= MOST_FOR_TORCH else ["fastclip"]
    steps = {name: Contender(name, params(count), CLIPS[clip], rule).step for name in names}
    steps["walk"] = walk(params(count), CLIPS[clip], rule)
    displaced = {name: steps[name] for name in ("fastclip", "fused") if "fused" in names}
    if count <= MOST_FOR_DTENSORS:
        for name in ("fastclip", "foreach"):
            steps[f"{name} dtensors"] = Contender(name, sharded(count), CLIPS[clip], rule).step
    timed = {name: timing.Timer(step) for name, step in steps.items()}
    return timed | {f"{name} displaced": timing.Timer(step, displacing()) for name, step in displaced.items()}


def displacing():
    """Returns a clock that displaces the caches before each step, as forward and backward passes do."""
    other = torch.zeros(DISPLACING_BYTES // 4)

    def clock(step, steps):
        seconds = 0.0
        for _ in range(steps):
            other.add_(1)
            seconds += timing.block(step, 1)
        return seconds

    return clock


def params(count):
    """Tensors of one element with gradients, which come from the last to the first, as from a backward pass."""
    made = [torch.nn.Parameter(torch.randn(1)) for _ in range(count)]
    for p in reversed(made):
        p.grad = torch.randn(1)
    return made


@contextlib.contextmanager
def process_group(devices):
    """Pretends that this is one of several devices; messages arrive nowhere, and take no time."""
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=devices)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def sharded(count):
    """Makes tensors sharded by FSDP2, which are DTensors: each device has one element of a tensor."""
    devices = torch.distributed.get_world_size()
    model = torch.nn.ParameterList(torch.randn(devices) for _ in range(count))
    fully_shard(model, mesh=init_device_mesh("cpu", (devices,)))
    made = list(model.parameters())
    for p in reversed(made):
        p.grad = DTensor(torch.randn(1), p._spec, requires_grad=False)
    return made


def walk(made, clip, rule):
    """Makes a step that AMP skips: fastclip finds, reads and checks every tensor, and then writes nothing."""
    contender = Contender("fastclip", made, clip, rule)
    contender.step()  # makes the states
    contender.optimizer.found_inf = torch.ones(())
    contender.optimizer.grad_scale = None
    return contender.step
