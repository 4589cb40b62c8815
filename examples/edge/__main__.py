"""Adapts a Conformer to a new voice, and measures the memory that it takes, with torch and with fastclip.

    python -m examples.edge

Words: a Conformer of 2M parameters learns the recorded digits of all voices but one. It is adapted to that one, by its
last layers, by LoRA, or as a whole, with strings of eight of the voice's ten recordings. Error rates are those of new
strings of these eight, of strings of the other two, and of the voices before it.

Memory: a Conformer of 104M parameters with random weights takes a few steps on noise, in a process of its own: its
peak, and the smallest limit under which it trains. Then one of 273M under the limit of a board of 4 GB.
"""

import argparse
import functools
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.core import record

from ..support.console import RunError, exit_code_of, programs_stopped_too, progress
from ..support.options import add_seed_and_threads, count, make_folder
from ..support.safe_files import write
from . import adapt, report
from .memory import MIB, RETURNED, run_child, smallest_limit
from .steps import BYTES, STEPS
from .voice import FOLDS, make_task
from .ways import WAYS, trainable

ROOT = Path(__file__).parents[2]
SETTINGS = adapt.Settings()
# 8 s of speech. Of Conformer-L's size, and of one that a board of 4 GB can just adapt.
BOARD = {"frames": 800, "batch": 1, "labels": 30, "symbols": 1000, "mels": 80, "hidden": 512, "layers": 17, "heads": 8}
LARGE = {**BOARD, "hidden": 768, "layers": 20}
LARGE_LIMIT = 3072 * MIB  # what is left of 4 GB beside a system without a desktop, and torch's code
RESOLUTION = 32 * MIB
REPEATS = 3  # of all layers: glibc's heap is not the same in each process


def words_of(options):
    """Returns error rates by seed, and how many parameters each way trains."""
    seeds = {}
    for seed in range(options.seed, options.seed + options.seeds):
        task = make_task(options.cache, seed, options.voice)
        seeds[str(seed)] = adapt.run(task, SETTINGS, seed)
    model = adapt.new_model(task, SETTINGS)
    trained = {"parameters": sum(p.numel() for p in model.parameters())}
    for way in WAYS:
        model = adapt.new_model(task, SETTINGS)
        WAYS[way](model)
        trained[way] = sum(p.numel() for p in trainable(model))
    return {"data": task.speech.caption, "voice": task.voice, "folds": FOLDS, "trained": trained, "seeds": seeds}


def memory_of(options):
    """Returns the numbers of all children."""
    runs = [("all layers", step, RETURNED) for step in STEPS]
    runs += [("all layers", step, None) for _ in range(REPEATS) for step in STEPS]
    runs += [(way, step, None) for way in WAYS if way != "all layers" for step in adapt.COMPARED]
    children, returned = {way: {} for way in WAYS}, {}
    for way, step, variables in progress(runs, desc="peaks", unit="process"):
        child = run_child(way, step, BOARD, variables=variables)
        if variables:
            returned[step] = child
        else:
            children[way].setdefault(step, []).append(child)

    def fits(step, size, limit):
        return run_child("all layers", step, size, limit) is not None

    limits = {}
    for step in progress(STEPS, desc="limits", unit="step"):
        peak = max(child["peak"] for child in children["all layers"][step])
        needed = (4 + BYTES[step]) * returned[step]["parameters"]
        limits[step] = smallest_limit(functools.partial(fits, step, BOARD), needed, peak, RESOLUTION)
    trains = {step: fits(step, LARGE, LARGE_LIMIT) for step in progress(STEPS, desc="3 GiB", unit="process")}
    return {
        "size": BOARD,
        "children": children,
        "returned": {"variables": RETURNED, "children": returned},
        "resolution": RESOLUTION,
        "smallest_limits": limits,
        "large": {"size": LARGE, "limit": LARGE_LIMIT, "trains": trains, "parameters": parameters_of(LARGE)},
    }


def parameters_of(size):
    """Returns the number of parameters without memory for them."""
    from ..speech.models import Conformer

    with torch.device("meta"):
        model = Conformer(size["symbols"], size["mels"], size["hidden"], size["layers"], size["heads"])
    return sum(p.numel() for p in model.parameters())


def run(options):
    """Returns the exit code."""
    try:
        import torchaudio.models  # noqa: F401  (the Conformer)
    except (ImportError, OSError) as error:
        raise RunError(f"torchaudio does not import: {error}; pip install --no-deps torchaudio") from None
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    make_folder(options.out)
    found = record.describe([], shlex.join(["python", "-m", "examples.edge", *options.arguments]))
    found["settings"] = {"seed": options.seed, "seeds": options.seeds, "threads": options.threads}
    found["settings"] |= {**vars(SETTINGS), "learning_rates": adapt.LEARNING_RATES}
    if options.only != "memory":
        found["words"] = words_of(options)
        print(f"\nData: {found['words']['data']}.\n\n{report.plain(report.word_rows(found['words']))}\n", flush=True)
    if options.only != "words":
        found["memory"] = memory_of(options)
        print(f"\n{report.plain(report.memory_rows(found['memory']))}\n")
        print(f"{report.plain(report.ways_rows(found['memory']))}\n")
        imports = found["memory"]["returned"]["children"]["torch"]["imports"]
        print(f"Python and torch take {report.mib(imports)} of each peak.")
    path = options.out / "edge.json"
    write(path, (json.dumps(found, indent=1) + "\n").encode())
    print(f"{path} ({time.perf_counter() - began:.0f} s in all)")
    return 0


def parse_arguments(arguments=None):
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m examples.edge",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=["words", "memory"], help="one of the two parts")
    add("--seeds", type=count, metavar="N", default=1, help="this many, from --seed on (default: %(default)s)")
    add("--voice", metavar="NAME", help="the new one (default: one of the two Italians)")
    add("--cache", type=Path, metavar="DIR", default=ROOT / ".cache" / "speech",
        help="where the fetched clips are kept (default: .cache/speech in the repository)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", default=Path("edge_output"), help="for the results (default: %(default)s)")
    add_seed_and_threads(parser)
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    with programs_stopped_too():
        return exit_code_of(run, options)


if __name__ == "__main__":
    sys.exit(main())
