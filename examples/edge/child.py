"""One training of a Conformer with random weights on noise, in a process of its own, which may have little memory.

    python -m examples.edge.child '{"way": "all layers", "step": "fastclip", "size": {…}, "steps": 3, "limit": null}'

Writes its memory as JSON, or a message and the exit code 3 if the limit is too small.
"""

import json
import resource
import sys
import time

import torch
import torchaudio.models  # noqa: F401  (before there is a limit)

from ..speech.models import Conformer, output_length
from .memory import MIB, OUT_OF_MEMORY, peak_of, resident
from .steps import STEPS
from .ways import WAYS, trainable


def measure(way, step, size, steps):
    """Returns the bytes in memory after imports, with the model, and at the peak of the training, and the CPU's time of
    the last step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    imports = resident()
    frames, batch, labels = size["frames"], size["batch"], size["labels"]
    model = Conformer(size["symbols"], size["mels"], size["hidden"], size["layers"], size["heads"])
    WAYS[way](model)
    features = torch.randn(batch, frames, size["mels"])
    targets = torch.randint(1, 1 + size["symbols"], (batch * labels,))
    lengths, target_lengths = torch.full([batch], output_length(frames)), torch.full([batch], labels)
    take, seconds = STEPS[step](model, lr=1e-4), []

    def train():
        for _ in range(steps):
            began = time.process_time()
            take(torch.nn.functional.ctc_loss(model(features), targets, lengths, target_lengths))
            seconds.append(time.process_time() - began)

    before, peak = peak_of(train)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trainable(model)),
        "imports": imports,
        "before": before,
        "peak": peak,
        "last_step_seconds": seconds[-1],
    }


def ran_out(error):
    """Whether torch or Python says so. oneDNN says no more than that it could not; an import may not even say that."""
    words = (
        "can't allocate memory",
        "bad_alloc",
        "could not create",
        "Cannot allocate",
        "error return without exception",
    )
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def main(settings):
    limit = settings.pop("limit")
    if limit is not None:
        # Private memory that can be written to: all tensors and heaps, not the code of torch, which is mapped from
        # files. What was allocated before counts, too.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        print(json.dumps(measure(**settings)))
    except (MemoryError, RuntimeError, SystemError, ImportError, OSError) as error:
        if limit is None or not ran_out(error):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        print(f"out of memory with {limit / MIB:.0f} MiB: {said[0]}", file=sys.stderr)
        return OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
