"""python -m tests.long.training FOLDER: a small training that goes on from its last checkpoint, to be killed by tests.

Checkpoints are written beside their place and moved there by os.replace: at any moment there is a whole one, or none.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

import fastclip

STEPS, EVERY = 120, 7
NEVER = -1


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.long.training", description=__doc__.split(": ", 1)[1])
    parser.add_argument("folder", type=Path, help="for checkpoint.pt and result.pt")
    parser.add_argument("--halt-before", type=int, default=NEVER, metavar="STEP", help="stop there and wait for a kill")
    parser.add_argument(
        "--halt-in-save", type=int, default=NEVER, metavar="STEP", help="write half of that checkpoint, then wait"
    )
    parser.add_argument("--forget", choices=["optimizer", "adam", "scheduler"], help="what to leave out when going on")
    options = parser.parse_args(arguments)
    train(options.folder, options.halt_before, options.halt_in_save, options.forget)


def train(folder, halt_before=NEVER, halt_in_save=NEVER, forget=None, steps=STEPS):
    """Trains to the end and writes result.pt: parameters, optimizers, scheduler, losses' random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4), torch.nn.Linear(4, 4))
    optimizer = fastclip.SGD(
        [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "lr": 0.02, "momentum": 0.5, "clip_value": 0.3},
        ],
        lr=0.05,
        momentum=0.9,
        max_norm=0.5,
    )
    adam = fastclip.AdamW(model[3].parameters(), lr=0.003, clip_value=0.2, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts = {"model": model, "optimizer": optimizer, "adam": adam, "scheduler": scheduler}
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved["step"]
        for name, part in parts.items():
            if name != forget:
                part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
    print(f"from step {first}", flush=True)
    for step in range(first, steps):
        if step == halt_before:
            wait("halted")
        inputs = torch.randn(16, 12)  # from the random state that checkpoints hold
        model.zero_grad()
        model(inputs).sub(inputs[:, :4].cumsum(1)).square().mean().backward()
        optimizer.step()
        adam.step()
        scheduler.step()
        print(f"step {step}", flush=True)
        if (step + 1) % EVERY == 0:
            save(checkpoint, parts, step + 1, halves=step + 1 == halt_in_save)
    save(folder / "result.pt", parts, steps)


def save(path, parts, step, halves=False):
    content = {name: part.state_dict() for name, part in parts.items()}
    beside = path.with_suffix(".tmp")
    torch.save({**content, "step": step, "random": torch.get_rng_state()}, beside)
    if halves:
        os.truncate(beside, beside.stat().st_size // 2)
        wait("half a checkpoint")
    os.replace(beside, path)


def wait(why):
    print(why, flush=True)
    signal.pause()


if __name__ == "__main__":
    sys.exit(main())
