"""Needed and available memory. A benchmark notices too little memory before it allocates any."""

from pathlib import Path

from .contenders import CONTENDERS
from .models import MODELS, count

# A container's own limit (cgroup 2); "max" means no limit.
LIMIT = Path("/sys/fs/cgroup/memory.max")


def kept(model, itemsize=4):
    """Returns the bytes of a problem: parameters and gradients at the start, and a copy of both for every contender."""
    return 2 * (1 + len(CONTENDERS)) * itemsize * count(MODELS[model])


def at_work(model, itemsize=4, states=1):
    """Returns the extra bytes while contenders are compared or timed, with this number of states per parameter."""
    # The loop in float64: parameters, gradients and states; then without gradients, beside two contenders' states.
    compared = max(8 * (2 + states), 8 * (1 + states) + 2 * itemsize * states)
    # The states of all; on a GPU one more contender, which is more than the CPU's probe of its memory.
    timed = (len(CONTENDERS) * states + 2 + states) * itemsize
    return max(compared, timed) * count(MODELS[model])


def needed(models, itemsize=4, states=1):
    """Returns the bytes for problems that are allocated together, and worked on one after the other."""
    return sum(kept(model, itemsize) for model in models) + max(at_work(model, itemsize, states) for model in models)


def shortage(models, available, itemsize=4, states=1):
    """Returns a message if there is too little memory; None if there is enough, or nobody knows."""
    need = needed(models, itemsize, states)
    if available is None or need <= available:
        return None
    return f"{', '.join(models)}: {gib(need)} of memory needed, {gib(available)} available"


def available():
    """Returns the available bytes of the host's memory; None if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        return min(free, int(LIMIT.read_text()))
    except (OSError, ValueError):
        return free


def lack(need):
    """Returns what to tell where there are fewer bytes of memory than needed; None where there are enough."""
    free = available()
    return f"{gib(need)} of memory needed, {gib(free)} available" if free is not None and free < need else None


def gib(size):
    return f"{size / 2**30:.1f} GiB"
