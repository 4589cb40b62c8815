"""The limit of a step: the time that this machine's memory takes for the same arrays, with nothing else to do.

A pass reads the gradients, and reads and writes parameters and states; a norm reads the gradients before. The arrays
are those of the step that is timed: another piece of memory may be faster. limit.cpp is compiled for this machine where
it is needed. How it asks for memory, and how wide its registers are, is chosen for each pass and number of threads.
"""

import ctypes
import functools
import itertools
import os
import platform
import re
import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limit.cpp")
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-shared", "-fPIC"]
# The widest registers are not always the fastest.
IS_X86 = platform.machine() in ("x86_64", "AMD64")
WIDTHS = (("-march=native", "-mprefer-vector-width=256"), ("-march=native", "-mprefer-vector-width=512"))
TARGETS = WIDTHS if IS_X86 else (("-mcpu=native",),)
DISTANCES = (0, 64, 256, 1024, 4096)  # bytes between what is read and what is asked for; 0: nothing is asked for
TRIES = 3
MOST_WRITTEN = 4
WORD = 4  # bytes


class Tensor(ctypes.Structure):
    """As limit.cpp has it."""

    _fields_ = (("read", ctypes.c_void_p), ("written", ctypes.c_void_p * MOST_WRITTEN), ("words", ctypes.c_int64))


class Limit:
    """Measures passes over the arrays of a step. None of them changes.

    Args:
        params: parameters with gradients.
        states: the states of each; all arrays of a parameter are dense, and of one size.

    Raises:
        RuntimeError: no compiler, or it fails; with its words. Or torch's threads were not found.
    """

    def __init__(self, params, states):
        self.arrays = [(p.grad, [p.detach(), *own]) for p, own in zip(params, states, strict=True)]
        self.tensors = (Tensor * len(self.arrays))(*(as_tensor(read, written) for read, written in self.arrays))
        self.written = len(self.arrays[0][1])
        self.best = {}  # by number of arrays that are written, and number of threads

    def update(self):
        """Takes the pass of an update."""
        self.run(self.written)

    def norm_and_update(self):
        """Takes the pass of a norm, and that of an update."""
        self.run(0)
        self.run(self.written)

    def run(self, written):
        threads = torch.get_num_threads()
        if (written, threads) not in self.best:
            self.best[written, threads] = fastest(
                itertools.product(TARGETS, DISTANCES), lambda choice: self.seconds(written, threads, *choice)
            )
        self.seconds(written, threads, *self.best[written, threads])

    def seconds(self, written, threads, target, distance):
        arguments = ctypes.c_int64(len(self.arrays)), written, threads, ctypes.c_int64(distance), ctypes.c_uint32(0)
        return compiled(target).pass_seconds(self.tensors, *arguments, parallel(threads))


class Divider:
    """The other limit of Adam: a square root and two divisions for each parameter, in the innermost cache.

    Args:
        numel: number of parameters.
    """

    def __init__(self, numel):
        self.numel, self.best = numel, {}

    def run(self):
        """Divides as often as a step of Adam does."""
        threads = torch.get_num_threads()
        if threads not in self.best:
            self.best[threads] = fastest(TARGETS, lambda target: self.seconds(threads, target))
        self.seconds(threads, self.best[threads])

    def seconds(self, threads, target):
        divide, total = compiled(target).divider_seconds, ctypes.c_double()
        seconds = divide(ctypes.c_int64(self.numel), threads, ctypes.c_float(1), ctypes.byref(total), parallel(threads))
        assert total.value == 2.0 * self.numel, total.value  # 6 / (2 / 1 + 1)
        return seconds


def fastest(choices, seconds):
    """Returns the choice that takes the fewest seconds, by the median of some tries in turns."""
    samples = {choice: [] for choice in choices}
    for _ in range(TRIES):
        for choice, taken in samples.items():
            taken.append(seconds(choice))
    return min(samples, key=lambda choice: statistics.median(samples[choice]))


def parallel(threads):
    """Returns what limit.cpp is to call for so many threads."""
    return threads_of_torch() if threads > 1 else None


def lack(threads):
    """Compiles limit.cpp. Returns what to tell where a limit on a number of threads cannot be measured, or None."""
    try:
        for target in TARGETS:
            compiled(target)
        parallel(threads)
    except RuntimeError as error:
        return str(error)
    return None


def as_tensor(read, written):
    arrays = [read, *written]
    if len(written) > MOST_WRITTEN:
        raise ValueError(f"{len(written)} arrays that are written; {MOST_WRITTEN} at most")
    if any(a.nbytes != read.nbytes or a.untyped_storage().nbytes() < a.nbytes for a in arrays):
        raise ValueError("a limit is measured over dense arrays of one size")
    pointers = [a.data_ptr() for a in written] + [None] * (MOST_WRITTEN - len(written))
    return Tensor(read.data_ptr(), (ctypes.c_void_p * MOST_WRITTEN)(*pointers), read.nbytes // WORD)


@functools.cache
def compiled(target):
    """Returns limit.cpp as a library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limit.so")
        command = [*(shlex.split(os.environ.get("CXX", "")) or ["c++"]), *FLAGS, *target, SOURCE, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"the limit of this machine needs a C++ compiler: {error}") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"limit.cpp does not compile: {error.stderr[-2000:]}") from error
        loaded = ctypes.CDLL(str(library))
    loaded.pass_seconds.restype = loaded.divider_seconds.restype = ctypes.c_double
    return loaded


@functools.cache
def threads_of_torch():
    """Returns the entry to a parallel region of the OpenMP that torch has loaded.

    Other threads would be new to each pass, and share the cores with torch's.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    for library in dict.fromkeys(line.split()[-1] for line in lines if re.search(r"/lib(gomp|iomp5|omp)[-.]", line)):
        entry = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
        if entry:
            return ctypes.cast(entry, ctypes.c_void_p)
    raise RuntimeError("the limit of several threads needs a torch with OpenMP on Linux")
