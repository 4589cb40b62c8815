"""python -m benchmarks gpu: checks that all contenders agree on a GPU, times them there, writes gpu.json."""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from .core import agreement, gpu_rows, memory, record, rows
from .core.contenders import CLIPS, RULES, Contender, rule_of
from .core.devices import DEVICES
from .core.models import MODELS
from .core.problem import Problem
from .report import gpu as report

# The most wanted first: a run whose time is up leaves out the last.
DEFAULT = [
    ("dense-100m", torch.float32),
    ("conformer-l", torch.float32),
    ("dense-100m", torch.bfloat16),
    ("dnn", torch.float32),
    ("conformer-s", torch.float32),
    ("conformer-m", torch.float32),
    ("tiny-600", torch.float32),
]
QUICK = ["dnn", "conformer-s"]
OTHERS = [model for model in MODELS if model not in dict(DEFAULT)]
MODEL_HELP = f"default: {', '.join(dict(DEFAULT))}; others: {', '.join(OTHERS)}"
PROBLEMS = DEFAULT + [(model, torch.float32) for model in OTHERS]


def main(arguments=None):
    """Returns the exit code: 2 without a GPU, 1 where contenders disagree (no times of that model) or a case failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    end = time.monotonic() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"This torch ({torch.__version__}) sees no GPU: nothing was measured.", file=sys.stderr)
        return 2
    device = DEVICES[options.device]()
    found = record.describe(arguments, "python -m benchmarks gpu")
    found |= {"device": device.type, "rehearsal": device.type != "cuda", "gpu": device.describe()}
    problems = [(model, dtype) for model, dtype in PROBLEMS if model in options.model]
    found |= {"rounds": options.rounds, "agreement": [], "cases": [], "failed": [], "left_out": []}
    problems = [problem for problem in problems if agree(found, *problem, device)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    for _ in measure(found, problems, device, options.rounds, end):
        record.write(found, path)  # after every case: finished measurements outlive a crash
    print(report.console(found))
    print(f"\nWritten: {path}")
    return 1 if found["failed"] else 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="two of the smaller models, few rounds")
    parser.add_argument("--model", nargs="+", choices=MODELS, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--rounds", type=int, help="default: 12, or 4 with --quick")
    parser.add_argument("--seconds", type=float, default=600, help="no case begins later (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="a folder; default: %(default)s")
    parser.add_argument(
        "--device", choices=DEVICES, default="cuda", help="cpu is a rehearsal: all runs, and no time means anything"
    )
    options = parser.parse_args(arguments)
    options.model = options.model or (QUICK if options.quick else list(dict(DEFAULT)))
    if options.rounds is None:
        options.rounds = 4 if options.quick else 12
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def agree(found, model, dtype, device):
    """Returns whether all contenders fit the device and agree. Adds rows of deviations, or the reason."""
    name = str(dtype).removeprefix("torch.")
    shortage = memory.shortage([model], device.available_memory(), dtype.itemsize)
    if shortage:
        found["failed"].append({"case": f"{model} {name}", "error": shortage})
        print(f"FAILED: {name}: this model is not timed. {shortage}", file=sys.stderr, flush=True)
        return False
    problem = Problem(model, MODELS[model], device=device.type, dtype=dtype)
    try:
        for clip, rule in itertools.product(CLIPS, RULES["sgd"]):
            found["agreement"].append(rows.agreement_row(problem, clip, rule) | {"dtype": name})
    except agreement.Disagreement as error:
        found["failed"].append({"case": f"{model} {name}", "error": str(error)})
        print(f"FAILED: {name}: the contenders disagree, this model is not timed. {error}", file=sys.stderr, flush=True)
        return False
    finally:
        del problem
        device.release()
    print(f"agree: {model} {name}", flush=True)
    return True


def measure(found, problems, device, rounds, end):
    """Adds rows to found["cases"]; yields after each."""
    for model, dtype in problems:
        problem = Problem(model, MODELS[model], device=device.type, dtype=dtype)
        for clip, rule in itertools.product(CLIPS, RULES["sgd"]):
            title = f"{model} {str(dtype).removeprefix('torch.')}, {clip}, {rule.title}"
            if time.monotonic() > end:
                found["left_out"].append(title)
                continue
            start = time.monotonic()
            try:
                found["cases"].append(gpu_rows.measure(problem, clip, rule, device, rounds))
            except Exception as error:  # the others may go well
                found["failed"].append({"case": title, "error": f"{type(error).__name__}: {error}"})
                print(f"FAILED: {title}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"timed: {title} ({time.monotonic() - start:.1f} s)", flush=True)
            yield
        del problem
        device.release()
    # Last: a profiler that has run once may slow down every launch after it.
    for row in found["cases"]:
        row["kernels"] = kernels(row, device)
    yield


def kernels(row, device):
    """Names of the kernels of one step of fastclip, for a row that was timed."""
    problem = Problem(row["model"], MODELS[row["model"]], device=device.type, dtype=getattr(torch, row["dtype"]))
    step = Contender("fastclip", problem.copies["fastclip"], CLIPS[row["clip"]], rule_of(row)).step
    step()
    names = device.kernels(step)
    del problem, step
    device.release()
    return names
