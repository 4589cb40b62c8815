"""The memory of a training in a process of its own: its peak, and the smallest limit under which it goes through."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ..support.console import RunError

ROOT = Path(__file__).parents[2]
MIB = 2**20
OUT_OF_MEMORY = 3  # exit code of a child
# Lets glibc give blocks of 64 KiB and more back to the system when they are freed. By itself it keeps up to 32 MiB in a
# heap, whose holes are memory, too.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(field="VmRSS"):
    """Returns bytes of this process that are in memory now, or with "VmHWM" the most that were."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def forget_peak():
    """Lets the peak start again from now; where the kernel can't, it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(work):
    """Calls `work`, and returns the bytes in memory before, and the most while it ran."""
    before = resident()
    forget_peak()
    work()
    return before, resident("VmHWM")


def run_child(way, step, size, limit=None, steps=2, variables=None):
    """Trains in a new process. From the second step on, gradients and momentum are there together.

    Returns its numbers, or None if `limit`, in bytes, was too small; raises RunError. `variables` are for its
    environment.
    """
    settings = {"way": way, "step": step, "size": size, "steps": steps, "limit": limit}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
    done = subprocess.run(
        [sys.executable, "-m", "examples.edge.child", json.dumps(settings)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout)
    # Some libraries end the process themselves, with a code of their own; a mistake in Python leaves a traceback.
    if limit is not None and (done.returncode == OUT_OF_MEMORY or "Traceback" not in done.stderr):
        return None
    said = "".join(done.stderr.splitlines(keepends=True)[-3:])
    raise RunError(f"{way}, {step}: the child ended with {done.returncode} and said\n{said}")


def smallest_limit(fits, low, high, resolution=32 * MIB):
    """Returns a limit that fits, at most `resolution` above one that does not.

    Args:
        fits: a function of a limit in bytes.
        low (int): what surely does not fit.
        high (int): what should fit; if it does not, twice as much and more is tried.
    """
    while not fits(high):
        low, high = high, 2 * high
    while high - low > resolution:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
