"""What is trained: the study's grid, and that of the situations. Seed by seed: a run that is stopped has whole grids of
fewer seeds."""

import itertools

from .cell import Cell
from .clips import MICRO_CLIPS
from .situation import SITUATIONS, is_bad, lrs_of

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
THRESHOLDS = {
    "none": (None,),
    "value": (1e-4, 1e-3, 1e-2, 1e-1),
    "norm": (0.1, 1, 10, 100),
    "change": (0.01, 0.03, 0.1),
    "change of each parameter": (0.01, 0.03, 0.1),
    "quantile": (0.5,),
    "ema": (2.5,),
}
# Those that are compared on all models, and with more seeds.
HEADLINE = {"none": (None,), "norm": (1, 10), "change": (0.03,), "quantile": (0.5,)}
QUICK_LEARNING_RATES = (1e-2, 1e-1)
QUICK_THRESHOLDS = {"none": (None,), "value": (1e-2,), "norm": (1,), "change": (0.03,)}
SITUATION_CLIPS = {
    "none": (None,),
    "norm": (1, 10),
    "change": (0.03,),
    "quantile": (0.5, 0.75),
    "ema": (2.5,),
    "norm 10, skip": (8,),
    "norm, in micro-batches": (1, 10),
    "change, in micro-batches": (0.03,),
    "micro-batch norm": (0.25, 2.5),  # four of them: together at most 1 and 10
    "micro-batch quantile": (0.5,),
    "change 0.03, micro-batch quantile": (0.5,),
}


# Beside a norm clip, of what AdamW adds.
ADAMW_CLIPS = {"change": (0.01,), "change of each parameter": (0.01,), "update RMS": (1,)}


def grid(options):
    """Returns the cells."""
    rates, thresholds = LEARNING_RATES, HEADLINE if options.headline else THRESHOLDS
    if options.quick:
        rates, thresholds = QUICK_LEARNING_RATES, QUICK_THRESHOLDS
    return [
        Cell(model, kind, threshold, lr, seed)
        for seed, model, kind in itertools.product(range(options.seeds), options.models, thresholds)
        for threshold, lr in itertools.product(thresholds[kind], rates)
    ]


def situation_grid(options):
    """Returns (situation, cell)."""
    names = ("as it is", "corrupt 5 %") if options.quick else SITUATIONS
    return [
        (name, Cell(model, kind, threshold, lr, seed))
        for seed, name, model in itertools.product(range(options.seeds), names, options.models)
        for kind, thresholds in clips_in(name).items()
        for threshold, lr in itertools.product(thresholds, lrs_of(name))
    ]


def clips_in(name):
    """What is compared in a situation: micro-batches on bad data, and for comparison as it is. Limits of AdamW are on
    what it adds."""
    if SITUATIONS[name].optimizer != "SGD":
        return {kind: thresholds for kind, thresholds in SITUATION_CLIPS.items() if is_of_gradients(kind)} | ADAMW_CLIPS
    return {
        kind: thresholds
        for kind, thresholds in SITUATION_CLIPS.items()
        if is_bad(name) or name == "as it is" or kind not in MICRO_CLIPS
    }


def is_of_gradients(kind):
    return "change" not in kind and kind not in MICRO_CLIPS
