"""python -m benchmarks states: steps with states in 8 bits beside those in float32: time and memory.

One model of 100M parameters; both optimizers in each round, the same gradients; on one thread and on all. Where
bitsandbytes is installed, its optimizers in 8 bits, without a clip, are timed beside them.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import fastclip

from .core import command, memory, record, rows, timing
from .core.models import MODELS, count
from .report import states as report

MODEL = "dense-100m"
RULES = {
    "SGD, momentum 0.9": (fastclip.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (fastclip.AdamW, {"lr": 1e-3}),
    "Lion": (fastclip.Lion, {"lr": 1e-4}),
}
CLIPS = {"none": {}, "norm 1": {"max_norm": 1.0}}
OF_BITSANDBYTES = {"SGD, momentum 0.9": "SGD8bit", "AdamW": "AdamW8bit", "Lion": "Lion8bit"}
DTYPES = {"float32": (torch.float32, {}), "bfloat16, master weights": (torch.bfloat16, {"master_weights": True})}
BYTES = 4 + 4 + 4 + 8  # of a parameter: it, its gradient, its master weights, states


def main(arguments=None):
    """Returns the exit code: 2 where memory is short."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if lack := memory.lack(3 * BYTES * count(MODELS[options.model])):  # with bitsandbytes' optimizer
        print(f"Nothing was measured: {lack}.", file=sys.stderr)
        return 2
    found = record.describe(arguments, "python -m benchmarks states") | {"kind": "states", "model": options.model}
    found["cases"] = []
    cases = [(dtype, rule, clip) for dtype in DTYPES for rule in RULES for clip in CLIPS]
    for case in tqdm(cases, unit="case"):
        found["cases"] += timed_rows(options, *case)
    return command.finish(found, report, options.out)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks states", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", choices=MODELS, default=MODEL, metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    return parser.parse_args(arguments)


def timed_rows(options, dtype, rule, clip):
    """Returns a row for each number of threads."""
    gc.collect()
    cls, settings = RULES[rule]
    stored, way = DTYPES[dtype]
    optimizers = {}
    for bits in (32, 8):
        params = params_with_grads(options.model, stored)
        optimizers[bits] = cls(params, **settings, **CLIPS[clip], **way, state_bits=bits)
        optimizers[bits].step()
    peer = None if way or clip != "none" else peer_of(rule, options.model, optimizers[8])
    numel = count(MODELS[options.model])
    state_bytes = {bits: bytes_of_states(optimizer) / numel for bits, optimizer in optimizers.items()}
    found = []
    for threads in sorted({1, torch.get_num_threads()}):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        steps = {bits: each.step for bits, each in optimizers.items()}
        if peer:
            steps["bitsandbytes"] = peer[0].step
        timers = {name: timing.Timer(functools.partial(step), steps=1) for name, step in steps.items()}
        samples = timing.rounds(timers, options.rounds)
        torch.set_num_threads(before)
        found.append(
            {
                "dtype": dtype,
                "rule": rule,
                "clip": clip,
                "threads": threads,
                "bytes_per_parameter": {str(bits): rows.digits(each) for bits, each in state_bytes.items()},
                "ms_per_step": {
                    str(bits): rows.described([1e3 * seconds for seconds in each]) for bits, each in samples.items()
                },
                "of_float32": rows.described(timing.ratios(samples[8], samples[32])),
            }
        )
        if peer:
            found[-1]["same_codes"] = peer[1]
            found[-1]["over_bitsandbytes"] = rows.described(timing.ratios(samples["bitsandbytes"], samples[8]))
    return found


def params_with_grads(model, dtype):
    """Returns the parameters of a model: the same numbers at each call."""
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in MODELS[model]]
    for p in params:
        p.grad = torch.randn(p.shape, dtype=dtype) * 1e-2
    return params


def peer_of(rule, model, ours):
    """Returns an optimizer of bitsandbytes after the same first step, and the share of its codes of the momentum that
    are fastclip's; None where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    params = params_with_grads(model, torch.float32)
    optimizer = getattr(bitsandbytes.optim, OF_BITSANDBYTES[rule])(params, **RULES[rule][1])
    optimizer.step()
    state = f"{ours._rule.momentum}_codes"
    pairs = [(ours.state[p], optimizer.state[q]) for p, q in zip(ours.param_groups[0]["params"], params, strict=True)]
    of_both = [(own[state] == other["state1"]).float().mean() for own, other in pairs if state in own]
    return optimizer, rows.digits(float(torch.stack(of_both).mean()))


def bytes_of_states(optimizer):
    """Returns the bytes of all states but master weights."""
    states = (item for state in optimizer.state.values() for item in state.items())
    return sum(value.nbytes for name, value in states if name != "master_param")
