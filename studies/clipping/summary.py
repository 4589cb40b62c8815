"""A summary of the study's rows: seeds grouped, the best of each kind, the table at the end."""

import dataclasses
import math
from statistics import median

from .clips import CLIPS, clip_name


@dataclasses.dataclass
class Group:
    """The rows that differ in the seed only."""

    rows: list

    @property
    def diverged(self):
        return sum(row["diverged"] for row in self.rows)

    def values(self, name):
        return [row[name] for row in self.rows if row[name] is not None and math.isfinite(row[name])]

    def median(self, name):
        """Returns the median; NaN if no row has a finite value."""
        return median(self.values(name)) if self.values(name) else math.nan


def groups_of(rows):
    """{(model, kind, threshold, lr): Group}."""
    groups = {}
    for row in rows:
        key = row["model"], row["kind"], row["threshold"], row["lr"]
        groups.setdefault(key, Group([])).rows.append(row)
    return groups


def values_of(rows, name, **equal):
    """Returns the values of a column, in order, in the rows where others have the given values."""
    found = {row[name] for row in rows if all(row[key] == value for key, value in equal.items())}
    return sorted(found, key=lambda value: (value is not None, value))


def clips_of(rows):
    """(kind, threshold) of all clips, no clip first."""
    return [(kind, threshold) for kind in CLIPS for threshold in values_of(rows, "threshold", kind=kind)]


def whole(rows):
    """Returns the rows of the models for which the whole grid was run, not only what is compared on all models."""
    models = {row["model"] for row in rows if row["kind"] == "value"}
    return [row for row in rows if row["model"] in models]


def best_of(rows, model, kind, **equal):
    """((model, kind, threshold, lr), Group) with the lowest median error rate, the lower loss first; None without rows.

    A group with a run that diverged is no candidate, unless all have one.
    """
    rows = [row for row in rows if all(row[key] == value for key, value in equal.items())]
    groups = {key: group for key, group in groups_of(rows).items() if key[:2] == (model, kind)}
    order = {key: (g.diverged > 0, g.median("wer"), g.median("final_loss")) for key, g in groups.items()}
    return min(groups.items(), key=lambda item: order[item[0]], default=None)


def spread(values, digits=1):
    """Returns the median, and the range of several values."""
    if not values:
        return "–"
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best_table(rows):
    """Per model and kind of clip the best cell: heads, and lists of texts."""
    heads = ["model", "clip", "lr", "WER %", "new voice %", "training loss", "clipped %", "diverged"]
    lines = []
    for model in values_of(rows, "model"):
        for kind in CLIPS:
            if best := best_of(rows, model, kind):
                (*_, threshold, lr), group = best
                clipped = "–" if kind == "none" else percent(group.median("clipped"))
                lines.append([model, clip_name(kind, threshold), f"{lr:g}", spread(group.values("wer")),
                              spread(group.values("wer_new_voice")), spread(group.values("final_loss"), 2),
                              clipped, f"{group.diverged} of {len(group.rows)}"])  # fmt: skip
    return heads, lines


def percent(share):
    return f"{100 * share:.0f}" if not share < 0.1 else f"{100 * share:.2g}"


def summary(rows):
    """Returns the table at the end of a run."""
    if not rows:
        return "No cells."
    heads, lines = best_table(rows)
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [heads, *lines]]  # fmt: skip
    failed = sum(row["diverged"] for row in rows)
    return "\n".join([f"Best of each kind, by median error rate; {len(rows)} cells, {failed} diverged:", "", *text])
