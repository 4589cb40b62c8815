"""icefall's `clipping_scale`: the norm is clipped at twice the median of the last norms.

    python -m examples.trainers.icefall_style

icefall's ScaledAdam sets its threshold every `clipping_update_period` = 100 steps, and waits for the device at every
step to compare the norm with it. Here the norms stay on the device, and the only wait is the median's, once in a
period. Two things differ: a threshold holds from the next step on, and the norm is the plain one, where ScaledAdam
weighs each gradient by the size of its parameter. The threshold is kept in param_groups, so checkpoints have it.
"""

import math

import torch
from tqdm import tqdm

import fastclip

from .tiny_ctc import DTYPES, MOMENTUM, Log, TinyCTC, loader, run

PERIOD = 20  # steps in this short run


# <copy>
class MedianClip:
    """Sets max_norm to `scale` times the median of the norms of the last `period` steps, once in a period."""

    def __init__(self, optimizer, scale=2.0, period=100):
        self.optimizer, self.scale, self.period = optimizer, scale, period
        self.norms = []

    def step(self):
        self.norms.append(self.optimizer.total_norm)
        if len(self.norms) < self.period:
            return
        median = torch.stack(self.norms).nanmedian().item()
        if not math.isfinite(median):
            raise RuntimeError(f"most of the last {self.period} steps had gradients with inf or NaN")
        for group in self.optimizer.param_groups:  # one norm over all of them, so one threshold
            group["max_norm"] = self.scale * median
        self.norms.clear()


# </copy>


def eden(step, decay_steps=100):
    """icefall's schedule, its part that counts batches; without warmup."""
    return ((step**2 + decay_steps**2) / decay_steps**2) ** -0.25


def train(options):
    device, log = options.device, Log()
    model = TinyCTC().to(device)
    # <copy>
    optimizer = fastclip.SGD(
        model.parameters(),
        options.lr,
        MOMENTUM,
        max_norm=options.max_norm,  # until the first median is there; math.inf as in icefall: no clip yet
        clip_value=options.clip_value,
        skip_nonfinite=True,
    )
    median_clip = MedianClip(optimizer, period=PERIOD)
    # </copy>
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, eden)
    scaler = torch.amp.GradScaler(device, enabled=options.amp == "fp16")
    progress = tqdm(total=options.steps, desc="training", unit="step")
    for _ in range(options.epochs):
        for index, batch in enumerate(loader(options), 1):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device, DTYPES[options.amp], enabled=options.amp != "no"):
                loss = model(**batch)["loss"]
            scaler.scale(loss / options.accumulate).backward()
            if index % options.accumulate == 0:
                # <copy>
                scheduler.step()
                scaler.step(optimizer)
                scaler.update()
                median_clip.step()
                # </copy>
                optimizer.zero_grad()
                log.add(loss, optimizer.clip_stats())
                progress.update()
    progress.close()
    return model, log


if __name__ == "__main__":
    run(__doc__, train)
