"""The table of trainings with states in 8 bits beside those with states in float32."""

import statistics

from .cpu import machine
from .formats import rounded, table


def markdown(results):
    """A row for each task and optimizer: medians over the seeds, and the range."""
    header = ["task", "optimizer", "parameters", "steps", "MB of state", "in 8 bits", "loss", "in 8 bits", "WER %"]
    body = []
    for row in results["cases"]:
        before, after = row["runs"]["32"], row["runs"]["8"]
        body.append(
            [
                row["task"],
                row["optimizer"],
                rounded(row["parameters"]),
                str(row["steps"]),
                *(f"{runs[0]['state_bytes'] / 1e6:.3g}" for runs in (before, after)),
                *(spread([run["loss"] for run in runs]) for runs in (before, after)),
                " / ".join(spread([run["wer"] for run in runs]) for runs in (before, after))
                if "wer" in after[0]
                else "",
            ]
        )
    seeds = {len(row["runs"]["8"]) for row in results["cases"]}
    note = (
        f"{machine(results)} Medians over {' or '.join(map(str, sorted(seeds)))} seeds, and the range; the loss is the "
        "mean of the last 20 steps; word error rates with states in float32 / in 8 bits."
    )
    return "\n\n".join([note, table([header, *body], words=2)])


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"
