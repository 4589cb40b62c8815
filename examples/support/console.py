"""Messages to people: a progress bar that suits terminal and log, and errors without a traceback."""

import sys

from tqdm import tqdm


class SpeechDataError(Exception):
    """The data can't be used; says which file, and why."""


def progress(iterable=None, **settings):
    """tqdm; where stderr is no terminal each refresh is a line of its own, so there are few."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True, **settings)
