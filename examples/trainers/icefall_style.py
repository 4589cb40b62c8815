"""icefall's `clipping_scale`: the norm is clipped at twice the median of the last norms.

    python -m examples.trainers.icefall_style

icefall's ScaledAdam sets its threshold every `clipping_update_period` = 100 steps, and waits for the device at every
step to compare the norm with it. Here the threshold follows at every step, on the device, and nothing waits but the
line that is printed. The norm is the plain one, where ScaledAdam weighs each gradient by the size of its parameter.
Checkpoints have the last norms.
"""

import math

import torch
from tqdm import tqdm

import fastclip

from .tiny_ctc import DTYPES, MOMENTUM, Log, TinyCTC, loader, run

PERIOD = 20  # steps in this short run, and between two lines


# <copy>
def line_of(optimizer):
    """icefall's line: quartiles of the last norms, the threshold, and the parameter with the largest gradient."""
    norms, threshold = optimizer.norm_history(), optimizer.clip_stats().threshold
    quartiles = norms.quantile(norms.new_tensor([0, 0.25, 0.5, 0.75, 1])).tolist()
    names, own_norms = optimizer.norms_by_parameter()
    shares = own_norms.square() / own_norms.square().sum()
    return (
        f"grad-norm quartiles {' '.join(f'{q:.1e}' for q in quartiles)}, threshold={threshold:.1e}, "
        f"percent-clipped={100 * (norms > threshold).double().mean():.1f}, dominating parameter "
        f"{names[shares.argmax()]}, with proportion {shares.max():.2f}"
    )


# </copy>


def eden(step, decay_steps=100):
    """icefall's schedule, its part that counts batches; without warmup."""
    return ((step**2 + decay_steps**2) / decay_steps**2) ** -0.25


def train(options):
    device, log = options.device, Log()
    model = TinyCTC().to(device)
    # <copy>
    optimizer = fastclip.SGD(
        model.named_parameters(),
        options.lr,
        MOMENTUM,
        max_norm=fastclip.QuantileNorm(0.5, scale=2.0, window=100, ceiling=options.max_norm or math.inf),
        clip_value=options.clip_value,
    )
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
                # </copy>
                log.add(loss, optimizer.clip_stats())
                if len(log.losses) % PERIOD == 0:
                    progress.write(line_of(optimizer))
                optimizer.zero_grad()
                progress.update()
    progress.close()
    return model, log


if __name__ == "__main__":
    run(__doc__, train)
