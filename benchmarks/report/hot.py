"""The table of training iterations with a norm as it is, in the backward pass, and without one."""

from .cpu import machine
from .formats import duration, rounded, spread, table


def markdown(results):
    """A row for each model and number of threads."""
    ways = [way for way in results["cases"][0]["ms"] if way != "norm"]
    header = ["model", "threads", "ms per iteration", *("without a norm" if way == "none" else way for way in ways)]
    body = [
        [
            f"{row['model']} ({rounded(row['parameters'])})",
            str(row["threads"]),
            duration(row["ms"]["norm"]["median"]),
            *(spread(row["of_norm"][way], "{:.3f}".format) for way in ways),
        ]
        for row in results["cases"]
    ]
    sequences, frames = results["batch"]
    note = (
        f"{machine(results)} {sequences} sequences of {frames} frames. Medians, and the 10th and 90th percentile, of "
        "ratios to the iteration with a norm clip, within a round."
    )
    return "\n\n".join([note, table([header, *body], words=1)])
