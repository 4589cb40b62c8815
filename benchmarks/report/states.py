"""The table of states in 8 bits beside those in float32."""

from .cpu import machine
from .formats import duration, spread, table


def markdown(results):
    """A row for each dtype, rule, clip and number of threads."""
    header = [
        "dtype",
        "rule",
        "clip",
        "threads",
        "bytes of state: before",
        "in 8 bits",
        "ms: before",
        "in 8 bits",
        "ratio",
    ]
    body = []
    for row in results["cases"]:
        sizes, times = row["bytes_per_parameter"], row["ms_per_step"]
        body.append(
            [
                row["dtype"],
                row["rule"],
                row["clip"],
                str(row["threads"]),
                *(f"{sizes[bits]:.3g}" for bits in ("32", "8")),
                *(duration(times[bits]["median"]) for bits in ("32", "8")),
                spread(row["of_float32"], "{:.2f}".format),
            ]
        )
    note = (
        f"{machine(results)} {results['model']}. Medians, and the 10th and 90th percentile, of ratios within a round."
    )
    return "\n\n".join([note, table([header, *body], words=3)])
