"""The table of 16-bit parameters beside the limit and torch."""

from .cpu import machine
from .formats import duration, models, percent, spread, table, times


def markdown(results):
    """A row for each dtype, magnitude of gradients, rounding, rule and number of threads."""
    header = [
        "dtype",
        "gradients",
        "rounded",
        "rule",
        "threads",
        "ms",
        "of the limit",
        "of the divider",
        "torch over it",
    ]
    body = [
        [
            row["dtype"],
            f"{row['scale']:g}",
            row["rounded"],
            row["rule"],
            str(row["threads"]),
            duration(row["ms_per_step"]["fastclip"]["median"]),
            spread(row["of_limit"], percent),
            spread(row["of_divider"], percent) if row["of_divider"] else "",
            spread(row["over_torch"], times, "×"),
        ]
        for row in results["cases"]
    ]
    note = (
        f"{machine(results)} {models(results)} A value clip; torch without a clip, its fused AdamW, its foreach SGD. "
        "Gradients: their standard deviation. The divider: a square root and two divisions for each parameter, with no "
        "memory. Medians, and the 10th and 90th percentile, of ratios within a round."
    )
    return "\n\n".join([note, table([header, *body], words=4)])
