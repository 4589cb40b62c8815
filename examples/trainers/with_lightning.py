"""PyTorch Lightning: the optimizer clips, and the Trainer does not.

    python -m examples.trainers.with_lightning --amp bf16

Leave `gradient_clip_val` out of the Trainer, or set it to 0. With `precision="16-mixed"` another value raises, as
fastclip unscales inside `step()`; elsewhere Lightning would clip first, without a word, and fastclip again. In
`on_before_optimizer_step` the gradients are still scaled under 16-mixed: `LogClip` logs the norm after the step.
"""

import logging
import warnings

import pytorch_lightning
import torch

import fastclip
from fastclip.integrations.lightning import LogClip

from .tiny_ctc import MOMENTUM, Log, TinyCTC, loader, run

PRECISION = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Recogniser(pytorch_lightning.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.options, self.log_of_steps = options, Log()
        self.model = TinyCTC()

    def training_step(self, batch, index):
        loss = self.model(**batch)["loss"]
        self.log("loss", loss, on_epoch=True, batch_size=len(batch["features"]))
        return loss

    # <copy>
    def configure_optimizers(self):
        optimizer = fastclip.SGD(
            self.parameters(),
            self.options.lr,
            MOMENTUM,
            max_norm=self.options.max_norm,
            clip_value=self.options.clip_value,
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}

    # </copy>
    def on_train_batch_end(self, outputs, batch, index):
        if (index + 1) % self.trainer.accumulate_grad_batches == 0:
            loss = outputs["loss"] * self.options.accumulate
            self.log_of_steps.add(loss, self.trainer.optimizers[0].clip_stats())


def train(options):
    recogniser = Recogniser(options)
    trainer = pytorch_lightning.Trainer(
        # <copy>
        gradient_clip_val=0,  # fastclip clips
        accumulate_grad_batches=options.accumulate,
        callbacks=[LogClip()],  # logs grad_norm and the rest of clip_stats
        # </copy>
        precision=PRECISION[options.amp],
        max_epochs=options.epochs,
        accelerator="cpu" if options.cpu else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(recogniser, loader(options))
    return recogniser.model, recogniser.log_of_steps


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    run(__doc__, train)
