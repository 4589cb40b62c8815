"""SpeechBrain: a Brain whose `optimizers_step` does not clip, as its `opt_class` does.

    python -m examples.trainers.with_speechbrain --amp bf16

`Brain.optimizers_step` always calls `clip_grad_norm_`, by default with `max_grad_norm=5.0`, and over the first
parameter group only. The override below is SpeechBrain's method without that call; fastclip takes one norm over all
groups. In a HyperPyYAML recipe: `opt_class: !name:fastclip.SGD`, then `lr`, `momentum` and `max_norm` below it,
indented.
"""

import functools

import speechbrain
from speechbrain.nnet.schedulers import NewBobScheduler, update_learning_rate

import fastclip

from .tiny_ctc import MOMENTUM, Log, TinyCTC, loader, run

PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


class Brain(speechbrain.Brain):
    # <copy>
    def optimizers_step(self):
        optimizers = self.freeze_optimizers(self.optimizers_dict).values()
        for optimizer in optimizers:
            self.scaler.step(optimizer)  # unscales, clips, updates; or skips
        self.scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1

    # </copy>

    def compute_forward(self, batch, stage):
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return self.modules.model(**batch)

    def compute_objectives(self, outputs, batch, stage):
        return outputs["loss"]

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        if should_step:
            self.hparams.log.add(loss, self.optimizer.clip_stats())

    def on_stage_end(self, stage, stage_loss, epoch):
        _, lr = self.hparams.scheduler(stage_loss)
        update_learning_rate(self.optimizer, lr)


def train(options, brain_class=Brain):
    # <copy>
    opt_class = functools.partial(
        fastclip.SGD,
        lr=options.lr,
        momentum=MOMENTUM,
        max_norm=options.max_norm,
        clip_value=options.clip_value,
        skip_nonfinite=True,  # in place of skip_nonfinite_grads, which looks at each parameter in Python
    )
    # </copy>
    brain = brain_class(
        {"model": TinyCTC()},
        opt_class,
        hparams={"log": Log(), "scheduler": NewBobScheduler(options.lr)},
        run_opts={
            "device": options.device,
            "precision": PRECISION[options.amp],
            "grad_accumulation_factor": options.accumulate,
        },
    )
    brain.fit(range(options.epochs), loader(options))
    return brain.modules.model, brain.hparams.log


if __name__ == "__main__":
    run(__doc__, train)
