"""A small Conformer is trained on the voices that there are, and adapted to a new one: error rates before and after."""

import copy
import dataclasses
import random

import torch

import fastclip

from ..speech.batches import batches_of_like_length, ctc_loss, error_rate
from ..speech.models import Conformer
from ..support.console import progress
from .steps import STEPS
from .ways import WAYS, merge_lora

# Chosen with another voice as the new one, "it", and seed 0. Half of the first two, and twice the last, were tried.
LEARNING_RATES = {"last layers": 0.02, "LoRA": 0.06, "all layers": 0.005}
COMPARED = ["torch", "fastclip, bfloat16"]


@dataclasses.dataclass(frozen=True)
class Settings:
    hidden: int = 144
    layers: int = 4
    epochs: int = 5
    lr: float = 1e-3
    max_norm: float = 5.0
    adapt_steps: int = 40
    of_new: int = 4  # strings in a batch, of the new voice
    of_old: int = 4  # and of the voices before it, so that these are not forgotten


def new_model(task, settings):
    return Conformer(len(task.speech.symbols), hidden=settings.hidden, layers=settings.layers)


def train(task, settings, seed):
    """Returns a Conformer that was trained on the voices that there are."""
    torch.manual_seed(seed)
    model = new_model(task, settings)
    generator = torch.Generator().manual_seed(seed)
    batches = [b for _ in range(settings.epochs) for b in batches_of_like_length(task.train, generator)]
    optimizer = fastclip.AdamW(model.parameters(), settings.lr, max_norm=settings.max_norm)
    warmup = len(batches) // settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda taken: min((taken + 1) / warmup, 1.02 - taken / len(batches))
    )
    for indices in progress(batches, desc=f"training, seed {seed}", unit="step"):
        optimizer.zero_grad()
        ctc_loss([task.train[i] for i in indices])(model).backward()
        optimizer.step()
        schedule.step()
    return model


def adapt(model, way, step, fold, task, settings, seed):
    """Returns a copy of the model that a fold's strings were adapted to, LoRA's matrices merged."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model).train()
    WAYS[way](model)
    take = STEPS[step](model, LEARNING_RATES[way])
    draw = random.Random(seed)
    for _ in range(settings.adapt_steps):
        batch = draw.sample(fold.adapt, settings.of_new) + draw.sample(task.train, settings.of_old)
        take(ctc_loss(batch)(model))
    merge_lora(model)
    return model


def error_rates(model, fold, task):
    """Returns word error rates in percent: of the fold's two kinds of strings, and of the other voices."""
    model.eval()
    tests = {"same_recordings": fold.same, "new_recordings": fold.new, "other_voices": task.test}
    return {name: error_rate(model, examples, task.speech) for name, examples in tests.items()}


def run(task, settings, seed):
    """Returns error rates before and after: {"before" or "way, step": one of `error_rates` per fold}."""
    model = train(task, settings, seed)
    rates = {"before": [error_rates(model, fold, task) for fold in task.folds]}
    runs = [(way, step, fold) for way in WAYS for step in COMPARED for fold in task.folds]
    for way, step, fold in progress(runs, desc=f"adapting, seed {seed}", unit="run"):
        adapted = adapt(model, way, step, fold, task, settings, seed)
        rates.setdefault(f"{way}, {step}", []).append(error_rates(adapted, fold, task))
    return rates
