"""Hugging Face Accelerate: without `accelerator.clip_grad_norm_`, and with a handle on fastclip's optimizer.

    python -m examples.trainers.with_accelerate --amp bf16

What `prepare` returns wraps the optimizer, and has no `clip_stats`: keep the optimizer itself, or reach it by
`prepared.optimizer`. Under fp16 `optimizer_step_was_skipped` is always False, as with torch's fused optimizers: the
device decides to skip, and the host does not wait to hear of it. So the scheduler steps there as well.
"""

import torch
from accelerate import Accelerator
from tqdm import tqdm

import fastclip

from .tiny_ctc import MOMENTUM, Log, TinyCTC, loader, run


def train(options):
    log = Log()
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=options.amp, gradient_accumulation_steps=options.accumulate
    )
    model = TinyCTC()
    # <copy>
    optimizer = fastclip.SGD(
        model.parameters(), options.lr, MOMENTUM, max_norm=options.max_norm, clip_value=options.clip_value
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    model, prepared, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, loader(options))
    # </copy>
    progress = tqdm(total=options.steps, desc="training", unit="step")
    for _ in range(options.epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                # <copy>
                accelerator.backward(loss)
                prepared.step()  # clips; there is no accelerator.clip_grad_norm_ before it
                scheduler.step()
                prepared.zero_grad()
                if accelerator.sync_gradients:
                    stats = optimizer.clip_stats()
                    # </copy>
                    log.add(loss, stats)
                    progress.update()
    progress.close()
    return accelerator.unwrap_model(model), log


if __name__ == "__main__":
    run(__doc__, train)
