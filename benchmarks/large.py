"""python -m benchmarks large: real steps on the shapes of the largest models, and on one device's share of them.

Checked by samples against torch in float64, then timed beside what their bytes allow; up to 9 GiB of memory.
"""

import argparse
import functools
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .core import limit, memory, record, timing
from .core.contenders import RULES, Rule
from .core.models import MODELS, count
from .core.rows import digits
from .report import tensors as report

ADAMW, SGD, MOMENTUM = RULES["adamw"][0], *RULES["sgd"]
LR = 0.1  # moves parameters by more than bfloat16 rounds away
PER_TENSOR = 16  # samples; the first and the last element among them


@dataclass(frozen=True)
class Case:
    model: str
    dtype: torch.dtype
    rule: Rule
    devices: int = 1  # that FSDP2 shares the model out to: the step is that of rank 0

    def title(self):
        return f"{self.model}, {self.dtype}, {self.rule.title}, 1 of {self.devices}"

    def shapes(self):
        return [(-(-shape[0] // self.devices), *shape[1:]) if shape else () for shape in MODELS[self.model]]

    def bytes(self):
        """Returns the memory of parameters, gradients and states."""
        return count(self.shapes()) * self.dtype.itemsize * (2 + len(self.rule.states))


RUNS = [
    Case("whisper-large", torch.bfloat16, SGD),
    Case("whisper-large", torch.bfloat16, MOMENTUM),
    Case("hubert-xlarge", torch.bfloat16, ADAMW),
    Case("whisper-large", torch.float32, ADAMW, devices=8),
    Case("whisper-large", torch.float32, ADAMW, devices=64),
    Case("whisper-large", torch.float32, ADAMW, devices=1024),
]


class Wrong(Exception):
    """A sampled element is not what torch computes in float64."""


def main(arguments=None):
    """Returns the exit code: 1 where a sample is wrong, 2 where memory or a compiler is missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if lack := memory.lack(max(case.bytes() for case in RUNS)) or limit.lack(options.threads):
        print(f"Nothing was run: {lack}.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    found = record.describe(arguments, "python -m benchmarks large") | {"kind": "large", "cases": []}
    try:
        for case in tqdm(RUNS, unit="case"):
            found["cases"].append(run(case, options.rounds))
    except Wrong as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    print(report.markdown(found))
    options.out.mkdir(parents=True, exist_ok=True)
    record.write(found, options.out / "large.json")
    print(f"\nWritten: {options.out / 'large.json'}")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks large", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    return parser.parse_args(arguments)


def run(case, rounds):
    """Returns a row: the check, the time of a step, and the time of its bytes."""
    params = [torch.nn.Parameter(repeated(shape, case.dtype, 0.05, seed=0)) for shape in case.shapes()]
    for p in params:
        p.grad = repeated(p.shape, case.dtype, 0.02, seed=1)
    norm = math.sqrt(sum(squares(p.grad) for p in params))
    places, expected = oracle(case.rule, params, norm)
    optimizer = case.rule.fastclip_class(params, **case.rule.settings | {"lr": LR}, max_norm=norm / 2)
    optimizer.step()
    row = {
        "model": case.model,
        "devices": case.devices,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.rule.in_row(),
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
        "gib": digits(case.bytes() / 2**30),
        "norm_deviation": digits(abs(optimizer.total_norm.item() / norm - 1)),
        **compare(case, optimizer, params, places, expected),
    }
    if row["norm_deviation"] > 1e-6:
        raise Wrong(f"{case.title()}: the norm is off by {row['norm_deviation']:.2g}")
    own = limit.Limit(params, [[optimizer.state[p][name] for name in case.rule.states] for p in params])
    actors = {"step": optimizer.step, "limit": own.norm_and_update}
    times = timing.rounds({name: timing.Timer(step) for name, step in actors.items()}, rounds)
    row |= {"threads": torch.get_num_threads(), "ms": digits(statistics.median(times["step"]) * 1e3)}
    return row | {"of_limit": digits(statistics.median(timing.ratios(times["limit"], times["step"])))}


def repeated(shape, dtype, scale, seed):
    """Returns a tensor of random numbers that repeat: drawing a billion would take a minute."""
    numbers = (scale * drawn(seed)).to(dtype)
    tensor = torch.empty(shape, dtype=dtype)
    for piece in tensor.view(-1).split(len(numbers)):
        piece.copy_(numbers[: len(piece)])
    return tensor


@functools.cache
def drawn(seed):
    return torch.randn(999_983, generator=torch.Generator().manual_seed(seed))


def squares(grad):
    return sum(piece.double().square_().sum().item() for piece in grad.view(-1).split(2**20))


def oracle(rule, params, norm):
    """Places in each tensor, and what one step of torch in float64 makes of the elements and their states there."""
    places = [torch.randint(p.numel(), (PER_TENSOR,)) for p in params]
    for p, at in zip(params, places, strict=True):
        at[0], at[1] = 0, p.numel() - 1
    small = torch.nn.Parameter(picked(params, places))
    small.grad = picked([p.grad for p in params], places) * ((norm / 2) / (norm + 1e-6))
    optimizer = rule.torch_class([small], **rule.settings | {"lr": LR}, foreach=False)
    optimizer.step()
    return places, {"parameter": small.detach()} | {name: optimizer.state[small][name] for name in rule.states}


def picked(tensors, places):
    return torch.cat([t.detach().view(-1)[at].double() for t, at in zip(tensors, places, strict=True)])


def compare(case, optimizer, params, places, expected):
    """Returns how far the sampled elements are off, as a fraction of what rounding allows; raises Wrong above 1."""
    largest = 0.0
    for kind, wanted in expected.items():
        tensors = params if kind == "parameter" else [optimizer.state[p][kind] for p in params]
        # The result is rounded once to its dtype, and float32 rounds a few times on the way to it.
        on_the_way = 8 * torch.finfo(torch.float32).eps * wanted.abs().max()
        allowed = 0.51 * torch.finfo(case.dtype).eps * wanted.abs() + on_the_way
        deviation = ((picked(tensors, places) - wanted).abs() / allowed).max().item()
        if not deviation <= 1:
            raise Wrong(f"{case.title()}: a sample of {kind} is off by {deviation:.2g} times what rounding allows")
        largest = max(largest, deviation)
    return {"samples": len(wanted) * len(expected), "deviation": digits(largest)}
