"""DeepSpeed: fastclip takes the step, and DeepSpeed the norm, as ZeRO leaves each rank a piece of the parameters.

    torchrun --nproc-per-node 2 -m examples.trainers.with_deepspeed

With `max_norm` in the optimizer, stages 1 to 3 raise at the first step; only at stage 0 has each rank the whole. A
`clip_value` is about each gradient by itself, and works at all stages. DeepSpeed knows torch's own classes by name, and
takes others at stages 1 to 3 when it is told to. On the CPU its first run compiles an all-reduce, for a minute.
"""

import os

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import fastclip

from .tiny_ctc import DTYPES, MOMENTUM, Log, TinyCTC, collate, loader, run

STAGE = 1


def train(options):
    deepspeed.init_distributed("gloo" if options.device == "cpu" else "nccl", verbose=False)
    log, model = Log(), TinyCTC()
    # <copy>
    optimizer = fastclip.SGD(model.parameters(), options.lr, MOMENTUM, clip_value=options.clip_value)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps // deepspeed.comm.get_world_size())
    config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.max_norm,
        "zero_optimization": {"stage": STAGE},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    # </copy>
    mine = DistributedSampler(loader(options).dataset, shuffle=False)
    batches = DataLoader(mine.dataset, options.batch, sampler=mine, collate_fn=collate)
    progress = tqdm(total=options.epochs * len(batches), desc="training", unit="batch", disable=engine.global_rank > 0)
    for _ in range(options.epochs):
        for index, batch in enumerate(batches, 1):
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
            with torch.autocast(options.device, DTYPES[options.amp], enabled=options.amp != "no"):
                loss = engine(**batch)["loss"]
            # <copy>
            engine.backward(loss)
            engine.step()  # counts the batches itself; steps the scheduler, too
            if index % options.accumulate == 0:
                norm = engine.get_global_grad_norm()  # the norm of all ranks, before the clip
                # </copy>
                progress.set_postfix(norm=float(norm))
                log.add(loss, optimizer.clip_stats())
            progress.update()
    progress.close()
    return engine.module, log


if __name__ == "__main__":
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})
    run(__doc__, train)
