"""The numbers of a run as tables, for people and for docs/edge.md."""

from statistics import mean, median

from .adapt import COMPARED
from .memory import MIB
from .steps import BYTES, STEPS
from .ways import WAYS

TESTS = {
    "same_recordings": "new voice, its eight recordings",
    "new_recordings": "new voice, the two left out",
    "other_voices": "voices before it",
}


def mib(count):
    return f"{count / MIB:,.0f} MiB"


def millions(count):
    return f"{count / 1e6:.1f}M"


def growth(child):
    return child["peak"] - child["before"]


def spread(counts):
    """Returns the median, and where there are several the lowest and the highest."""
    middle = mib(median(counts))
    return middle if len(counts) == 1 else f"{middle} ({min(counts) / MIB:,.0f} to {max(counts) / MIB:,.0f})"


def seconds(values):
    return f"{median(values):.1f} s"


def memory_rows(memory):
    """Returns {title: a text for each step} of full fine-tuning."""
    children = [memory["children"]["all layers"][step] for step in STEPS]
    returned = [memory["returned"]["children"][step] for step in STEPS]
    (variable,) = (f"`{name}={value}`" for name, value in memory["returned"]["variables"].items())
    return {
        "": list(STEPS),
        "bytes per parameter beside its weight, predicted": [str(BYTES[step]) for step in STEPS],
        "gradients and momentum, predicted": [
            mib(BYTES[step] * child["trained"]) for step, child in zip(STEPS, returned, strict=True)
        ],
        "growth while training": [spread([growth(child) for child in of_step]) for of_step in children],
        f"growth with {variable}": [mib(growth(child)) for child in returned],
        "a step": [seconds([child["last_step_seconds"] for child in of_step]) for of_step in children],
        f"a step with {variable}": [seconds([child["last_step_seconds"]]) for child in returned],
        "peak of the process": [spread([child["peak"] for child in of_step]) for of_step in children],
        "smallest limit that is enough": [mib(memory["smallest_limits"][step]) for step in STEPS],
        f"{millions(memory['large']['parameters'])} in {mib(memory['large']['limit'])}": [
            "trains" if memory["large"]["trains"][step] else "out of memory" for step in STEPS
        ],
    }


def rates_of_seeds(words, name, test):
    return [mean(fold[test] for fold in seed[name]) for seed in words["seeds"].values()]


def mean_rate(words, name, test):
    return mean(rates_of_seeds(words, name, test))


def rate(words, name, test):
    """Returns the mean error rate over seeds and folds, and the lowest and highest of a seed."""
    seeds = rates_of_seeds(words, name, test)
    return f"{mean(seeds):.1f} % ({min(seeds):.1f} to {max(seeds):.1f})"


def word_rows(words):
    """Returns {title: a text before, and for each way}."""
    rows = {"": ["before", *WAYS], "trained": ["", *(millions(words["trained"][way]) for way in WAYS)]}
    for test, title in TESTS.items():
        for step in COMPARED:
            cells = [rate(words, f"{way}, {step}", test) for way in WAYS]
            rows[f"{title}: {step}"] = [rate(words, "before", test), *cells]
    return rows


def ways_rows(memory):
    """Returns {title: a text for each way} of the growth of a large model's process."""
    children = memory["children"]
    rows = {"": list(WAYS), "trained": [millions(children[way]["torch"][0]["trained"]) for way in WAYS]}
    for step in COMPARED:
        rows[f"growth: {step}"] = [mib(median(map(growth, children[way][step]))) for way in WAYS]
    return rows


def plain(rows):
    """The rows as text."""
    first = max(map(len, rows))
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return "\n".join(
        f"{title:<{first}}" + "".join(f"   {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        for title, cells in rows.items()
    )


def markdown(rows):
    """The rows as a table of a page."""
    lines = [f"| {' | '.join([title, *cells])} |".replace("|  |", "| |") for title, cells in rows.items()]
    columns = len(next(iter(rows.values())))
    return "\n".join([lines[0], f"| --- |{' ---: |' * columns}", *lines[1:]])
