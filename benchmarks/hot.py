"""python -m benchmarks hot: what a norm would save that is taken in the backward pass, while gradients are in a cache.

Whole training iterations of real models: with a norm clip as it is, and with what a norm in the backward pass would
come to: hooks measure each bucket of gradients as it fills, and the step reads gradients once. A third way takes no
norm at all: what is left between it and the first is all that can be saved.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import fastclip

from .core import command, record, rows, timing
from .report import hot as report

BUCKETS_MB = (1, 4, 16)
MODELS = {
    "LSTM, 3 layers of 512": lambda: Recurrent(512),
    "Transformer, 6 layers of 512": lambda: Encoder(512, 6),
}


class Recurrent(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.rnn = nn.LSTM(80, units, num_layers=3, batch_first=True)
        self.head = nn.Linear(units, 1000)

    def forward(self, features):
        return self.head(self.rnn(features)[0])


class Encoder(nn.Module):
    def __init__(self, units, layers):
        super().__init__()
        self.stem = nn.Linear(80, units)
        layer = nn.TransformerEncoderLayer(units, 8, 4 * units, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(units, 1000)

    def forward(self, features):
        return self.head(self.layers(self.stem(features)))


class Buckets:
    """Measures gradients as they arrive, some MiB at a time."""

    def __init__(self, params, megabytes):
        self.most, self.size, self.params = megabytes * 2**20, 0, []
        self.hooks = [p.register_post_accumulate_grad_hook(self.add) for p in params]

    def add(self, param):
        self.params.append(param)
        self.size += param.grad.nbytes
        if self.size >= self.most:
            self.measure()

    def measure(self):
        if self.params:
            fastclip.clip_grad_norm_(self.params, float("inf"))
        self.params, self.size = [], 0

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    found = record.describe(arguments, "python -m benchmarks hot") | {
        "kind": "hot",
        "batch": options.batch,
        "cases": [],
    }
    threads = sorted({1, torch.get_num_threads()})
    for name, count in tqdm([(name, count) for name in MODELS for count in threads], unit="case"):
        torch.set_num_threads(count)
        found["cases"].append(timed_row(name, count, options))
    return command.finish(found, report, options.out)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks hot", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs=2, default=[4, 50], help="sequences and frames; default: 4 50")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    return parser.parse_args(arguments)


def timed_row(name, threads, options):
    torch.manual_seed(0)
    model = MODELS[name]()
    features = torch.randn(*options.batch, 80)
    params = list(model.parameters())
    optimizers = {
        norm: fastclip.SGD(params, lr=1e-6, momentum=0.9, max_norm=1.0 if norm else None) for norm in (True, False)
    }

    def iterate(norm, megabytes=None):
        buckets = Buckets(params, megabytes) if megabytes else None
        model.zero_grad()
        model(features).square().mean().backward()
        if buckets:
            buckets.measure()
            buckets.remove()
        optimizers[norm].step()

    ways = {"norm": lambda: iterate(True), "none": lambda: iterate(False)}
    ways |= {f"buckets of {size} MiB": lambda size=size: iterate(False, size) for size in BUCKETS_MB}
    for way in ways.values():
        way()
    samples = timing.rounds({way: timing.Timer(call, steps=2) for way, call in ways.items()}, options.rounds)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in params),
        "threads": threads,
        "ms": {way: rows.described([1e3 * seconds for seconds in each]) for way, each in samples.items()},
        "of_norm": {way: rows.described(timing.ratios(each, samples["norm"])) for way, each in samples.items()},
    }
