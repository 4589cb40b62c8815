"""The training loop of ESPnet and WeNet, where a step with a non-finite norm is skipped.

    python -m examples.trainers.espnet_style

There it reads: unscale_, clip_grad_norm_(model.parameters(), grad_clip, grad_clip_type), then `if
torch.isfinite(grad_norm)`, which waits for the device at every step. With `skip_nonfinite=True` the device decides,
and `skipped_steps` counts. One thing differs from ESPnet, not from WeNet: a skipped step advances the schedule.

In ESPnet itself, without editing its trainer: add `fastclip.SGD` to `optim_classes` in espnet2/tasks/abs_task.py, give
`max_norm` in `optim_conf`, and set `grad_clip: .inf`. Its trainer then still takes the norm once more, and waits for
it.
"""

import torch
from tqdm import tqdm

import fastclip

from .tiny_ctc import DTYPES, MOMENTUM, Log, TinyCTC, loader, run

WARMUP = 25


def noam(step):
    """Linear warmup, then 1 / sqrt(step) (Vaswani et al., 2017), at most 1."""
    return min((step + 1) / WARMUP, (WARMUP / (step + 1)) ** 0.5)


def train(options):
    device, log = options.device, Log()
    model = TinyCTC().to(device)
    # <copy>
    optimizer = fastclip.SGD(
        model.parameters(),
        options.lr,
        MOMENTUM,
        max_norm=options.max_norm,  # grad_clip
        norm_type=2.0,  # grad_clip_type
        clip_value=options.clip_value,
        skip_nonfinite=True,
    )
    # </copy>
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, noam)
    scaler = torch.amp.GradScaler(device) if options.amp == "fp16" else None
    progress = tqdm(total=options.steps, desc="training", unit="step")
    for _ in range(options.epochs):
        for index, batch in enumerate(loader(options), 1):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device, DTYPES[options.amp], enabled=options.amp != "no"):
                loss = model(**batch)["loss"]
            scaled = loss / options.accumulate if scaler is None else scaler.scale(loss / options.accumulate)
            scaled.backward()
            if index % options.accumulate == 0:
                # <copy>
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                stats = optimizer.clip_stats()  # ESPnet logs total_norm, and 100 * (clip_coefficient < 1)
                # </copy>
                optimizer.zero_grad()
                scheduler.step()
                log.add(loss, stats)
                progress.update()
    progress.close()
    return model, log


if __name__ == "__main__":
    run(__doc__, train)
