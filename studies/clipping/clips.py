"""The clips that the study compares: settings of an optimizer, or of each micro-batch before it is added."""

import contextlib
import math

import fastclip

MICRO_BATCHES = 4  # of a batch, where each is clipped by itself

# Kind of clip: the optimizer's settings that follow from its threshold.
CLIPS = {
    "none": lambda _: {},
    "value": lambda clip_value: {"clip_value": clip_value},
    "norm": lambda max_norm: {"max_norm": max_norm},
    "change": lambda change: {"max_relative_change": change},
    "change of each parameter": lambda change: {"max_relative_change": change, "norm_scope": "parameter"},
    "update RMS": lambda rms: {"max_update_rms": rms},
    "quantile": lambda q: {"max_norm": fastclip.QuantileNorm(q, scale=2.0)},
    "ema": lambda z: {"max_norm": fastclip.EmaNorm(z)},
    "norm 10, skip": lambda scale: {"max_norm": 10.0, "skip_norm": fastclip.QuantileNorm(scale=scale)},
    "norm, in micro-batches": lambda max_norm: {"max_norm": max_norm},
    "change, in micro-batches": lambda change: {"max_relative_change": change},
    "micro-batch norm": lambda _: {},
    "micro-batch quantile": lambda _: {},
    "change 0.03, micro-batch quantile": lambda _: {"max_relative_change": 0.03},
}
# The same for micro-batches, whose gradients are a part of the batch's. Where they are not clipped, what differs from a
# whole batch is the padding: there is less of it.
MICRO_CLIPS = {
    "norm, in micro-batches": lambda _: {"max_norm": math.inf},
    "change, in micro-batches": lambda _: {"max_norm": math.inf},
    "micro-batch norm": lambda max_norm: {"max_norm": max_norm},
    "micro-batch quantile": lambda q: {"max_norm": fastclip.QuantileNorm(q, scale=1.0)},
    "change 0.03, micro-batch quantile": lambda q: {"max_norm": fastclip.QuantileNorm(q, scale=1.0)},
}


def clip_name(kind, threshold):
    return "no clip" if kind == "none" else f"{kind} {threshold:g}"


class Clip:
    """A clip at work: its optimizer, and what its clip of micro-batches needs."""

    def __init__(self, cell, params, situation):
        settings = CLIPS[cell.kind](cell.threshold)
        if situation.optimizer == "SGD":
            settings["momentum"] = situation.momentum
        self.optimizer = getattr(fastclip, situation.optimizer)(params, lr=cell.lr, **settings)
        self.limits_what_is_added = situation.optimizer != "SGD" and not {"max_norm", "clip_value"} & settings.keys()
        self.micro_batch = None
        if cell.kind in MICRO_CLIPS:
            self.micro_batch = fastclip.clipped_accumulation(self.optimizer, **MICRO_CLIPS[cell.kind](cell.threshold))
        self.acted = []  # of the micro-batches of this step: 1.0 where its clip acted

    def parts(self, examples):
        """The examples whose gradients are clipped together."""
        size = -(-len(examples) // MICRO_BATCHES) if self.micro_batch else len(examples)
        self.acted.clear()
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    @contextlib.contextmanager
    def clipped(self):
        """Around the backward pass of a part."""
        if self.micro_batch is None:
            yield
            return
        with self.micro_batch:
            yield
        self.acted.append(float(self.micro_batch.total_norm > self.micro_batch.threshold))

    def share(self):
        """The fraction of elements that a value clip clamped in the last step; of micro-batches that were clipped; for
        others, 1 if they acted, else 0."""
        if self.acted:
            return sum(self.acted) / len(self.acted)
        stats = self.optimizer.clip_stats()
        if stats.clamped_fraction is not None:
            return stats.clamped_fraction.item()
        if self.limits_what_is_added:
            return math.nan  # a factor of the learning rate, which no step tells
        return float(stats.clip_coefficient is not None and stats.clip_coefficient.item() < 1)
