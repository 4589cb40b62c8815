"""Options of the command line that several programs take."""

import argparse
import contextlib
import math
from pathlib import Path

import torch

from .console import SpeechDataError


def number(kind, low, above=False):
    """Returns a parser of finite numbers of at least `low`, or above it."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low < value < math.inf or (value == low and not above):
                return value
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {'above' if above else 'of at least'} {low}")

    return parse


count, positive = number(int, 1), number(float, 0, above=True)


def make_parser(module, doc, out):
    """Returns the parser of a program with the docstring `doc`: folders of data and of results, by default `out`."""
    about, _, more = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        f"python -m {module}",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="your own wav files and transcripts.txt")
    add("--cache", type=Path, metavar="DIR", default=Path(__file__).parents[2] / ".cache" / "speech",
        help="where the fetched clips are kept (default: .cache/speech in the repository)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", default=Path(out), help="for the results (default: %(default)s)")
    return parser


def add_seed_and_threads(parser):
    add = parser.add_argument
    add("--seed", type=number(int, 0), metavar="N", default=0, help="of data, model and order (default: %(default)s)")
    add("--threads", type=count, metavar="N", default=1, help="of torch (default: %(default)s)")


def device(text):
    """Parses a device that torch can use here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch names it; the first line is enough
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
    return found


def add_device(parser):
    parser.add_argument("--device", type=device, metavar="D", default="cuda" if torch.cuda.is_available() else "cpu",
        help="to train on: cpu, cuda, cuda:1, … (default: a GPU if there is one)")  # fmt: skip


def make_folder(out):
    """Makes the folder of --out; raises SpeechDataError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpeechDataError(f"--out {out}: {error.strerror}") from None
