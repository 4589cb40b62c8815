"""python -m tests.matrix: fastclip with each torch and each Python that is supported, built by pip, tested.

Each minor release of torch under the Python that runs this, and torch 2.13 under each other Python that is found, on
the PATH or by pyenv. torch comes from the index of pip; where it is built for CUDA, a stand-in takes the place of
NVIDIA's libraries. Writes docs/versions.json, the line of README.md and the table of docs/install.md; not with --only
and not with --wheels, which installs what `make wheel` has made.
"""

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.core import record
from tests.support.project import ROOT

from .cell import Cell, CellError

TORCHES = ("2.11", "2.12", "2.13", "2.14", "2.15")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_YET = ("3.14",)  # tested where it is here, and not asked for
MAIN_TORCH = "2.13"
RESULTS = ROOT / "docs" / "versions.json"
PLACE = re.compile(r"(<!-- versions -->\n).*(\n<!-- /versions -->)", re.DOTALL)


def find_python(minor):
    """Returns the path of a Python of this minor release, or None."""
    pyenv = os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")
    for path in (shutil.which(f"python{minor}"), *sorted(glob.glob(f"{pyenv}/versions/{minor}.*/bin/python"))):
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def cells(own, others=True):
    """Yields (Python's minor release, torch's): all torches under `own`, one under the others."""
    yield from ((own, torch) for torch in TORCHES)
    if others:
        yield from ((python, MAIN_TORCH) for python in (*PYTHONS, *NOT_YET) if python != own)


def line(results):
    """What the README says of cells that have all passed."""

    def span(name):
        minors = {tuple(map(int, result[name].split(".")[:2])) for result in results}
        return " to ".join(".".join(map(str, end(minors))) for end in (min, max))

    return f"Tested with torch {span('torch')} and Python {span('python')}."


def table(results):
    """What docs/install.md says."""
    rows = [f"| {result['torch']} | {result['python']} | {result['tests']} |" for result in results]
    return "\n".join(["| torch | Python | tests of the step |", "|---|---|---|", *rows])


def write_into(path, text):
    path.write_text(PLACE.sub(lambda found: found[1] + text + found[2], path.read_text()))


def main():
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="cells whose name has it, as in 'torch 2.14'")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "matrix", help="for the environments")
    parser.add_argument("--this-python", action="store_true", help="all torches, and this Python alone")
    parser.add_argument("--wheels", type=Path, help="install the wheels in this folder, and write no document")
    options = parser.parse_args()
    began, surroundings, results, failed = time.perf_counter(), record.describe([], "python -m tests.matrix"), [], False
    options.folder.mkdir(parents=True, exist_ok=True)
    for minor, torch in cells("{}.{}".format(*sys.version_info), others=not options.this_python):
        name = f"Python {minor}, torch {torch}"
        if options.only and options.only not in name:
            continue
        python = find_python(minor)
        if python is None:
            print(f"{time.perf_counter() - began:5.0f} s  {name}: skipped, this Python is not here", flush=True)
            failed |= minor not in NOT_YET
            continue
        folder = options.folder.resolve() / f"{minor}-{torch}"
        try:
            result = {**Cell(python, torch, folder, options.wheels and options.wheels.resolve()).run(), "passed": True}
            said = result["tests"]
        except CellError as error:
            result, said, failed = (
                {"torch": torch, "python": minor, "tests": "failed", "passed": False},
                f"FAILED: {error}",
                True,
            )
        results.append(result)
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {said}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        print("Not all of it has passed: the documents stay as they are.")
    elif not (options.only or options.wheels or options.this_python):
        RESULTS.write_text(json.dumps({**surroundings, "results": results}, indent=1) + "\n")
        write_into(ROOT / "README.md", line(results))
        write_into(ROOT / "docs" / "install.md", table(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
