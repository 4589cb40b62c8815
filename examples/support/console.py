"""Messages to people: a progress bar that suits terminal and log, and errors without a traceback."""

import contextlib
import signal
import sys

from tqdm import tqdm


class SpeechDataError(Exception):
    """The data can't be used; says which file, and why."""


class RunError(Exception):
    """A run can't go on: something is not there, or a program of it failed; says what to do, or what it said."""


def exit_code_of(run, options, stopped="Stopped; no results were written."):
    """Returns what `run(options)` does, or after a message the code of an error, or of Ctrl-C."""
    try:
        return run(options)
    except (SpeechDataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpeechDataError) else 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(f"\n{stopped}", file=sys.stderr)
        return 130


@contextlib.contextmanager
def programs_stopped_too():
    """While it lasts, a termination of this process unwinds it, so that the programs it has started are stopped."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(iterable=None, **settings):
    """tqdm; where stderr is no terminal each refresh is a line of its own, so there are few."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True, **settings)
