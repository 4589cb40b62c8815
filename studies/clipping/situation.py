"""What may be different from the study's own training: the loss, the momentum, the model's width, the optimizer, the
data."""

import dataclasses

import torch

BEFORE = 20  # steps at the start that stay as they are
BURST = range(200, 220)


@dataclasses.dataclass(frozen=True)
class Situation:
    """The default is the study's own training."""

    scale: float = 1.0  # the loss is multiplied by it
    momentum: float = 0.9
    width: int = 64
    optimizer: str = "SGD"
    bad: str | None = None  # a key of BAD: batches
    corpus: str | None = None  # a key of CORPORA: strings


SITUATIONS = {
    "as it is": Situation(),
    "loss × 100": Situation(scale=100.0),
    "loss / 100": Situation(scale=0.01),
    "no momentum": Situation(momentum=0.0),
    "width 256": Situation(width=256),
    "AdamW": Situation(optimizer="AdamW"),
    "corrupt 5 %": Situation(bad="corrupt"),
    "burst of 20": Situation(bad="burst"),
    "long strings in 2 %": Situation(bad="long"),
    "5 % of strings corrupt": Situation(corpus="corrupt"),
    "10 % of texts wrong": Situation(corpus="texts"),
}


def corrupt(examples, random):
    """Features thirty times as large, and noise as loud as that."""
    return [
        (30 * (frames + torch.randn(frames.shape, generator=random).to(frames)), target, text)
        for frames, target, text in examples
    ]


def long_strings(examples, _):
    """Eight of the batch, one after the other, in place of each."""
    many = [(examples[i : i + 8] + examples)[:8] for i in range(len(examples))]
    return [
        (torch.cat([frames for frames, *_ in some]), torch.cat([target for _, target, _ in some]), "") for some in many
    ]


def wrong_texts(examples, _):
    """Each has the text of the next."""
    return [
        (frames, target, text)
        for (frames, *_), (_, target, text) in zip(examples, [*examples[1:], *examples[:1]], strict=True)
    ]


# What a bad batch is made by, and the fraction of the steps that have one; None: those of BURST.
BAD = {
    "corrupt": (corrupt, 0.05),
    "burst": (corrupt, None),
    "long": (long_strings, 0.02),
}


# What bad strings are made by, and the fraction of the strings to train on.
CORPORA = {
    "corrupt": (corrupt, 0.05),
    "texts": (wrong_texts, 0.10),
}


def spoilt_corpus(examples, situation, seed):
    """Returns the examples, some of them bad: the same in all cells of a seed."""
    if situation.corpus is None:
        return examples
    make, share = CORPORA[situation.corpus]
    random = torch.Generator().manual_seed(3000 + seed)
    chosen = torch.randperm(len(examples), generator=random)[: round(share * len(examples))].tolist()
    bad = dict(zip(chosen, make([examples[i] for i in chosen], random), strict=True))
    return [bad.get(i, example) for i, example in enumerate(examples)]


class BadBatches:
    """Spoils batches of a training: the same steps in all cells of a seed."""

    def __init__(self, situation, seed):
        self.make, share = BAD.get(situation.bad, (None, 0.0))
        self.random = torch.Generator().manual_seed(1000 + seed)
        steps = torch.Generator().manual_seed(2000 + seed)
        drawn = torch.rand(100_000, generator=steps) < (share or 0.0)
        self.steps = set(BURST) if share is None else {i for i in drawn.nonzero().flatten().tolist() if i >= BEFORE}

    def __contains__(self, step):
        return step in self.steps

    def spoil(self, examples):
        return self.make(examples, self.random)


def lrs_of(name):
    """Learning rates to compare at: those of the study; a tenth of them for AdamW; as many times larger as the loss is
    smaller, which without a clip trains alike."""
    if SITUATIONS[name].optimizer == "AdamW":
        return (1e-3, 1e-2)
    return (1.0, 10.0) if SITUATIONS[name].scale < 1 else (1e-2, 1e-1)


def is_bad(name):
    return SITUATIONS[name].bad is not None or SITUATIONS[name].corpus is not None
