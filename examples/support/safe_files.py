"""Files that are there whole or as they were before, and a Ctrl-C that waits for the end of a step."""

import contextlib
import io
import os
import signal

import torch

from .console import SpeechDataError


def write(path, content):
    """Writes bytes beside `path` and moves them there; where that fails, raises SpeechDataError and changes nothing."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        left = "what was there before is kept" if path.exists() else "it was not written"
        raise SpeechDataError(f"{path}: {error.strerror}; {left}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def save_checkpoint(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path):
    """Returns the content of a checkpoint, tensors and plain values only; raises SpeechDataError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SpeechDataError(f"{path}: {error.strerror}") from None
    except Exception:  # whatever the damage leads the unpickler to
        raise SpeechDataError(f"{path}: not a checkpoint, or damaged") from None


@contextlib.contextmanager
def interrupts_between_steps():
    """Yields a function that tells, between steps, whether Ctrl-C was pressed. A second Ctrl-C stops at once."""
    pressed = False

    def note(number, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
