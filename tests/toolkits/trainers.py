"""Programs of users who know nothing of fastclip.

python -m tests.toolkits.trainers lightning|transformers|speechbrain OUT
"""

import sys

import torch

STEPS, BATCH = 12, 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5))

    def forward(self, x, labels=None):
        return {"loss": (10 * self.layers(x) - labels).square().sum()}


def examples():
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(20, generator=generator), "labels": torch.randn(5, generator=generator)}
        for _ in range(2 * BATCH * STEPS)  # two micro-batches a step
    ]


def lightning(out):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    module = Module()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
    ).fit(module, torch.utils.data.DataLoader(examples(), batch_size=BATCH))  # fmt: skip
    return module.model


def transformers(out):
    import transformers as hf

    model = Model()
    arguments = hf.TrainingArguments(
        output_dir=out, max_grad_norm=1.0, num_train_epochs=1, per_device_train_batch_size=BATCH, optim="sgd",
        gradient_accumulation_steps=2, use_cpu=True, learning_rate=0.01, logging_steps=1, save_strategy="no",
        report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=examples())
    trainer.train()
    print([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    return model


def speechbrain(out):
    import speechbrain as sb
    from hyperpyyaml import load_hyperpyyaml

    class Brain(sb.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.model(**batch)

        def compute_objectives(self, outputs, batch, stage):
            return outputs["loss"]

    recipe = load_hyperpyyaml("opt_class: !name:torch.optim.SGD\n  lr: 0.01\n  momentum: 0.9\nmax_grad_norm: 1.0\n")
    brain = Brain(
        {"model": Model()}, recipe["opt_class"],
        run_opts={"device": "cpu", "max_grad_norm": recipe["max_grad_norm"], "grad_accumulation_factor": 2},
    )  # fmt: skip
    brain.fit(range(1), torch.utils.data.DataLoader(examples(), batch_size=BATCH))
    return brain.modules.model


if __name__ == "__main__":
    kind, out = sys.argv[1:]
    train = {"lightning": lightning, "transformers": transformers, "speechbrain": speechbrain}[kind]
    torch.manual_seed(0)
    torch.save(train(out).state_dict(), f"{out}/model.pt")
