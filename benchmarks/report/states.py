"""The table of states in 8 bits beside those in float32."""

from .cpu import machine
from .formats import duration, spread, table, times


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
    with_peer = any("over_bitsandbytes" in row for row in results["cases"])
    header += ["bitsandbytes, 8 bits, over it"] if with_peer else []
    body = []
    for row in results["cases"]:
        sizes, taken = row["bytes_per_parameter"], row["ms_per_step"]
        body.append(
            [
                row["dtype"],
                row["rule"],
                row["clip"],
                str(row["threads"]),
                *(f"{sizes[bits]:.3g}" for bits in ("32", "8")),
                *(duration(taken[bits]["median"]) for bits in ("32", "8")),
                spread(row["of_float32"], "{:.2f}".format),
            ]
        )
        if with_peer:
            body[-1].append(spread(row["over_bitsandbytes"], times, "×") if "over_bitsandbytes" in row else "")
    note = (
        f"{machine(results)} {results['model']}. Medians, and the 10th and 90th percentile, of ratios within a round."
    )
    if with_peer:
        least = min(row["same_codes"] for row in results["cases"] if "same_codes" in row)
        note += f" After a first step, {100 * least:.2f} % or more of the momentum's codes are those of bitsandbytes."
    return "\n\n".join([note, table([header, *body], words=3)])
