"""fastclip.integrations: what the logs of Lightning and Hugging Face get. ESPnet and FunASR are in test_toolkits.py."""

import csv
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.integrations.names import OPTIMIZERS
from fastclip.integrations.stats import measures_norm, stats_to_log
from fastclip.integrations.transformers import LogsClip


def stepped(**settings):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fastclip.SGD([p], lr=0.1, **settings)
    p.grad = torch.full((4,), 3.0)
    optimizer.step()
    return optimizer


def test_names_are_those_of_all_optimizers():
    assert OPTIMIZERS["fastclip_adamw"] is fastclip.AdamW and len(OPTIMIZERS) == 10
    assert all(name == f"fastclip_{cls.__name__.lower()}" for name, cls in OPTIMIZERS.items())


def test_numbers_to_log_are_those_of_the_clips_that_are_set():
    assert stats_to_log(stepped()) == {"skipped_steps": 0}
    found = stats_to_log(stepped(max_norm=3.0, clip_value=2.0))
    assert found == {"grad_norm": 4.0, "clip_coefficient": pytest.approx(0.75), "clamped_fraction": 1.0,
                     "skipped_steps": 0.0}  # fmt: skip

    class Wrapper:  # Accelerate's
        optimizer = stepped(max_norm=3.0)

    assert stats_to_log(Wrapper())["grad_norm"] == 6.0 and measures_norm(Wrapper())
    assert measures_norm(stepped(skip_norm=50.0)) and stats_to_log(stepped(skip_norm=50.0))["grad_norm"] == 6.0
    assert not measures_norm(stepped(clip_value=2.0)) and not measures_norm(None)
    assert stats_to_log(torch.optim.SGD([torch.zeros(1)], lr=0.1)) == {} == stats_to_log(None)


def test_the_log_of_a_hugging_face_trainer():
    class Trainer:
        def __init__(self):
            self.optimizer, self.logged = stepped(max_norm=3.0), []

        def log(self, logs, start_time=None):
            self.logged.append(logs)

    class OurTrainer(LogsClip, Trainer):
        pass

    trainer = OurTrainer()
    trainer.log({"loss": 1.0}, 5.0)
    trainer.log({"eval_loss": 1.0})
    assert trainer.logged[0] == {"loss": 1.0, "grad_norm": 6.0, "clip_coefficient": pytest.approx(0.5),
                                 "skipped_steps": 0.0}  # fmt: skip
    assert trainer.logged[1] == {"eval_loss": 1.0}


def test_in_a_real_hugging_face_trainer(tmp_path):
    hf = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from .trainers import Model, examples

    class Trainer(LogsClip, hf.Trainer):
        pass

    torch.manual_seed(0)
    model = Model()
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), max_grad_norm=0, num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    optimizer = fastclip.SGD(model.parameters(), lr=0.01, max_norm=1.0)
    trainer = Trainer(model, arguments, train_dataset=examples()[:32], optimizers=(optimizer, None))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(entry["grad_norm"] > 1 > entry["clip_coefficient"] > 0 for entry in logged)
    assert logged[-1]["grad_norm"] == pytest.approx(optimizer.total_norm.item())


def test_the_callback_in_a_real_lightning_trainer(tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from fastclip.integrations.lightning import LogClip

    from .trainers import Model, examples

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = Model(), None

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            self.optimizer = fastclip.SGD(self.parameters(), lr=0.01, max_norm=1.0)
            return self.optimizer

    module = Module()
    logger = pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, logger=logger, log_every_n_steps=1,
        callbacks=[LogClip()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(examples()[:32], batch_size=4))  # fmt: skip
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == 4
    assert all(float(row["grad_norm"]) > 1 > float(row["clip_coefficient"]) for row in logged)
    assert float(logged[-1]["grad_norm"]) == pytest.approx(module.optimizer.total_norm.item())
