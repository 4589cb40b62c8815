"""What the commands share that compare settings of fastclip on the CPU: their options, and the file they end with."""

import argparse
from pathlib import Path

from ..cpu import thread_counts
from . import record
from .models import MODELS

DEFAULT = ["dnn", "gru-ctc", "tiny-600", "conformer-m", "dense-100m"]


def parse(name, about, arguments, rounds, models=DEFAULT):
    """Returns the options of `python -m benchmarks NAME`; `about` is its module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about.split(": ", 1)[1])
    parser.add_argument("--model", nargs="+", choices=MODELS, metavar="MODEL", default=list(models))
    parser.add_argument("--threads", type=thread_counts, default="1,all", help="as in 1,all (the default)")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def finish(found, report, out):
    """Prints the table of the results, and writes them; returns the exit code."""
    print(report.markdown(found))
    path = out / f"{found['kind']}.json"
    out.mkdir(parents=True, exist_ok=True)
    record.write(found, path)
    print(f"\nWritten: {path}")
    return 0
