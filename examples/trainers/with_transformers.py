"""Hugging Face's Trainer: max_grad_norm=0, an optimizer that clips, and its norm in the log.

    python -m examples.trainers.with_transformers --amp bf16

With `max_grad_norm=0` the Trainer calls `clip_grad_norm_(inf)` all the same, to log: two more passes over the
gradients, and where one of them is inf it turns gradients to NaN, before a `clip_value` could bound them. `LogsClip`
takes that away where fastclip measures the norm, and logs fastclip's. To let the Trainer make the parameter groups (no
decay of biases), pass `optimizer_cls_and_kwargs=(fastclip.SGD, {...})` in place of `optimizers=`. Under fp16 the
scheduler steps also where a step is skipped: the device decides to skip, and the host does not wait to hear of it.
"""

import tempfile

import torch
import transformers

import fastclip
from fastclip.integrations.transformers import LogsClip

from .tiny_ctc import MOMENTUM, Log, TinyCTC, collate, run, utterances


# <copy>
class Trainer(LogsClip, transformers.Trainer):  # grad_norm and the rest of clip_stats are in its log
    # </copy>
    def log(self, logs, *args):
        if "loss" in logs:
            self.log_of_steps.add(torch.tensor(logs["loss"]), self.optimizer.optimizer.clip_stats())
        super().log(logs, *args)


def train(options, trainer_class=Trainer, max_grad_norm=0):
    model = TinyCTC()
    optimizer = fastclip.SGD(
        model.parameters(), options.lr, MOMENTUM, max_norm=options.max_norm, clip_value=options.clip_value
    )
    with tempfile.TemporaryDirectory() as folder:
        # <copy>
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_grad_norm=max_grad_norm,  # 0: fastclip clips
            # </copy>
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            bf16=options.amp == "bf16",
            fp16=options.amp == "fp16",
            use_cpu=options.device == "cpu",
            seed=options.seed,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        )
        # <copy>
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=utterances(options.utterances, options.seed),
            data_collator=collate,
            optimizers=(optimizer, None),  # None: the Trainer's own schedule
        )
        # </copy>
        trainer.log_of_steps = Log()
        trainer.train()
    return model, trainer.log_of_steps


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    run(__doc__, train)
