"""The table of real steps on the largest models."""

from .formats import duration, rounded, table
from .report_cpu import machine
from .report_host import title

HEADER = [
    "model",
    "share of",
    "numbers",
    "rule",
    "tensors",
    "elements",
    "GiB",
    "samples",
    "ms per step",
    "of the floor",
]


def markdown(results):
    """A row for each case; a norm clip in all."""
    threads = {row["threads"] for row in results["cases"]}
    body = [
        [
            row["model"],
            f"1 of {row['devices']:,}" if row["devices"] > 1 else "all",
            row["dtype"],
            title(row),
            f"{row['tensors']:,}",
            rounded(row["elements"]),
            f"{row['gib']:.2g}",
            f"{row['samples']:,}",
            duration(row["ms"]),
            f"{100 * row['floor_ms'] / row['ms']:.0f} %",
        ]
        for row in results["cases"]
    ]
    where = f"{machine(results)} Threads: {', '.join(map(str, sorted(threads)))}. Norm clip; medians."
    return f"{where}\n\n{table([HEADER, *body], words=4)}"
