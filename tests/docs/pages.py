"""The documents, their code, and the names that their code takes for granted."""

import re
from pathlib import Path

import torch

import fastclip

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tests/**/README.md", "benchmarks/**/README.md", "examples/**/README.md")
    for path in ROOT.glob(pattern)
)


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def python_of(name):
    return blocks_of((ROOT / name).read_text(), "python")


def namespace():
    """What docs/README.md says that a training has anyway, and two models for the page about GANs."""
    model = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    batches = [(torch.randn(8, 80), torch.randint(10, (8,))) for _ in range(3)]
    x, y = batches[0]
    loss_fn, logged = torch.nn.functional.cross_entropy, []
    discriminator = torch.nn.Linear(80, 1)
    return {
        "torch": torch,
        "fastclip": fastclip,
        "model": model,
        "batches": batches,
        "x": x,
        "y": y,
        "loss_fn": loss_fn,
        "loss": 100 * loss_fn(model(x), y),  # large enough to be clipped
        "log": logged.append,
        "logged": logged,
        "generator": torch.nn.Linear(16, 80),
        "noise": torch.randn(8, 16),
        "discriminator": discriminator,
        "discriminator_optimizer": fastclip.SGD(discriminator.parameters(), lr=0.01, clip_value=0.01),
    }


def run(code, names):
    exec(compile(code, "<a document>", "exec"), names)
    return names
