"""How many steps and clips of this process went through fastclip."""

import sys

from ._extension import _C

clips_deferred = 0  # to a step of fastclip's
clips_at_once = 0  # by fastclip, in the place of torch's
clips_by_torch = 0  # that were not those of one optimizer
steps_in_plain_torch = 0  # by fastclip's optimizers
are_reported = False  # at the end of the process


def steps() -> int:
    """Returns the number of steps, in the kernels and in plain torch."""
    return _C.steps_taken() + steps_in_plain_torch


def text() -> str:
    """Returns one line.

    Example:
        >>> print(fastclip.counts.text())
    """
    clips = [(clips_deferred, "deferred to the step"), (clips_at_once, "fused"), (clips_by_torch, "left to torch")]
    said = ", ".join(f"{number} clips {how}" for number, how in clips if number) or "no clips"
    slow = f" ({steps_in_plain_torch} of them in plain torch)" if steps_in_plain_torch else ""
    return f"fastclip: {steps()} steps{slow}, {said}"


def report() -> None:
    """Prints the line to stderr, if there was anything to count."""
    if steps() or clips_deferred or clips_at_once or clips_by_torch:
        print(text(), file=sys.stderr, flush=True)
