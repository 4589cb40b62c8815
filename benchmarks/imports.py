"""python -m benchmarks imports: what `import fastclip` adds to `import torch`, and how large the extension is.

Each round is a Python of its own, with the files in the page cache.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

import fastclip

from .core import record, rows

SCRIPT = """
import time
began = time.perf_counter()
import torch
torchs = time.perf_counter()
import fastclip
print(torchs - began, time.perf_counter() - torchs)
"""


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    found = record.describe(arguments, "python -m benchmarks imports") | {"kind": "imports"}
    measured = [seconds() for _ in tqdm(range(options.rounds + 1), unit="import")][1:]  # the first fills the cache
    found["ms"] = {}
    for name, each in zip(("torch", "fastclip"), zip(*measured, strict=True), strict=True):
        found["ms"][name] = rows.described([1e3 * one for one in each])
    compiled = Path(fastclip.__file__).parent.glob("*.so")
    found["extension_mib"] = round(sum(path.stat().st_size for path in compiled) / 2**20, 2)
    for name, ms in found["ms"].items():
        print(f"import {name:<10}{ms['median']:8.1f} ms")
    print(f"extension        {found['extension_mib']:8.1f} MiB")
    options.out.mkdir(parents=True, exist_ok=True)
    record.write(found, options.out / "imports.json")
    print(f"\nWritten: {options.out / 'imports.json'}")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks imports", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def seconds():
    """Returns how long the imports of torch and of fastclip take in a new process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))
