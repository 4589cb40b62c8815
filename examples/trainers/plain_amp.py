"""A plain PyTorch loop with mixed precision and gradient accumulation.

    python -m examples.trainers.plain_amp --amp bf16

Gone are `scaler.unscale_(optimizer)` and `clip_grad_norm_`: the optimizer unscales, clips and updates in one pass.
Calling `unscale_` as before is fine too. An inf or NaN under fp16 skips the step on the device: no step waits for it.
"""

import torch
from tqdm import tqdm

import fastclip

from .tiny_ctc import DTYPES, MOMENTUM, Log, TinyCTC, loader, run


def train(options):
    device, log = options.device, Log()
    model = TinyCTC().to(device)
    # <copy>
    optimizer = fastclip.SGD(
        model.parameters(), options.lr, MOMENTUM, max_norm=options.max_norm, clip_value=options.clip_value
    )
    # </copy>
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps)
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
                scaler.step(optimizer)  # unscales, clips, updates; or skips
                scaler.update()
                stats = optimizer.clip_stats()
                # </copy>
                optimizer.zero_grad()
                scheduler.step()
                log.add(loss, stats)
                progress.update()
    progress.close()
    return model, log


if __name__ == "__main__":
    run(__doc__, train)
