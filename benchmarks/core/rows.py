"""Rows of the results: each is about a model, a clip and an update rule. What the rows of a CPU and of a GPU share."""

from . import agreement, timing
from .contenders import CLIPS, OF_TORCH, Contender, rule_of
from .problem import is_normal

# From this size on, time is compared with what the memory allows. Below, a model fits the caches of many machines.
LARGE = 20_000_000


def at_the_start(problem, clip, rule):
    """Returns all contenders, each on its copy of the problem."""
    contenders = {}
    for name in rule.contenders:
        copies = problem.copies[name]
        problem.reset_params(copies)
        problem.reset_grads(copies)
        contenders[name] = Contender(name, copies, CLIPS[clip], rule)
    return contenders


def agreement_row(problem, clip, rule, threads=(1,)):
    """Returns how far the contenders are apart; raises Disagreement."""
    try:
        deviations = agreement.check(problem, CLIPS[clip], rule, threads)
    except agreement.Disagreement as error:
        raise agreement.Disagreement(f"{problem.model}, {clip}, {rule.title}: {error}") from error
    deviations = {name: digits(value) for name, value in deviations.items()}
    return {"model": problem.model, "clip": clip, **rule.in_row(), "deviation": deviations}


def head(problem, clip, rule):
    """Returns the subject of a row: model, clip and rule."""
    return {
        "model": problem.model,
        "tensors": len(problem.params),
        "parameters": problem.numel,
        "clip": clip,
        "limit": CLIPS[clip][1],
        **rule.in_row(),
    }


def require_normal(contenders, row):
    """Raises ArithmeticError if a contender worked on numbers that have timings of their own."""
    for name, contender in contenders.items():
        tensors = [t for written in contender.results().values() for t in written]
        if not is_normal(tensors + [p.grad for p in contender.params]):
            raise ArithmeticError(
                f"{name} met denormals, inf or NaN: {row['model']}, {row['clip']}, {rule_of(row).title}"
            )


def microseconds(samples):
    return {name: described(scaled(1e6, values)) for name, values in samples.items()}


def speed_ups(samples):
    """Speed-ups of fastclip over the loop and over the best of torch."""
    own = samples["fastclip"]
    best = timing.fastest({name: samples[name] for name in OF_TORCH if name in samples})
    return {
        "vs_loop": described(timing.ratios(samples["loop"], own)),
        "best_of_torch": best,
        "vs_best_of_torch": described(timing.ratios(samples[best], own)),
    }


def least_bytes(row, itemsize=4):
    """Returns the bytes per parameter that a step has to move."""
    return rule_of(row).elements(row["clip"]) * itemsize


def share_of_floor(moved, speeds, own):
    """Returns the share of the step's time that its bytes take, at the speed measured in the same round."""
    return described([moved / speed / seconds for speed, seconds in zip(speeds, own, strict=True)])


def scaled(factor, samples):
    return [factor * value for value in samples]


def described(samples):
    """Returns summary and samples, to five digits."""
    summary = {name: digits(value) for name, value in timing.summary(samples).items()}
    return summary | {"samples": [digits(value) for value in samples]}


def digits(value):
    return float(f"{value:.5g}")
