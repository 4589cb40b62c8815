"""The emulated device of `cuda_on_cpu.cpp`, from Python: only in a process whose fastclip was built on it."""

import ctypes
from pathlib import Path

import fastclip

LIBRARY = Path(fastclip.__file__).with_name("libfastclip.so")
_library = ctypes.CDLL(LIBRARY)
SCHEDULES = ("in order", "reversed", "random")


class Device(ctypes.Structure):
    """As in cuda_runtime.h; starts with the same values."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "multiprocessors",
            "threads_per_multiprocessor",
            "shared_per_multiprocessor",
            "shared_per_block_optin",
            "reserved_shared_per_block",
            "cooperative",
            "l2_bytes",
        )
    ]

    def __init__(self, **changed):
        h100 = (3, 2048, 228 << 10, 227 << 10, 1 << 10, 1, 50 << 20)
        super().__init__(*h100)
        for name, value in changed.items():
            setattr(self, name, value)


class Counters(ctypes.Structure):
    """As in cuda_runtime.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "cooperative_launches",
            "copies",
            "copied_bytes",
            "memsets",
            "synchronizations",
            "bytes_read",
            "bytes_written",
            "wide_reads",
            "narrow_reads",
            "wide_writes",
            "narrow_writes",
            "last_blocks",
            "last_threads",
            "last_shared_bytes",
        )
    ]


def set_device(**changed):
    """A device like one H100 with few multiprocessors, but for what is given."""
    _library.cuda_on_cpu_set_device(ctypes.byref(Device(**changed)))


def set_schedule(name, seed=0):
    _library.cuda_on_cpu_set_schedule(SCHEDULES.index(name), ctypes.c_uint64(seed))


def set_capturing(capturing):
    _library.cuda_on_cpu_set_capturing(int(capturing))


def count(step):
    """The Counters of what `step()` does."""
    _library.cuda_on_cpu_reset_counters()
    step()
    counters = Counters()
    _library.cuda_on_cpu_get_counters(ctypes.byref(counters))
    return counters
