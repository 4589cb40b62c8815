"""What the clipping study's rows say: the table at the end of a run, and the tables of a page."""

import dataclasses
import math
import re
from statistics import mean, median

from .clipping_study_results import read_rows, replace_file
from .speech_console import SpeechDataError

KINDS = {"none": "no clip", "value": "value", "norm": "norm"}


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
        """NaN where no row has a finite value."""
        return median(self.values(name)) if self.values(name) else math.nan


def groups_of(rows):
    """{(model, kind, threshold, lr): Group}."""
    groups = {}
    for row in rows:
        key = row["model"], row["kind"], row["threshold"], row["lr"]
        groups.setdefault(key, Group([])).rows.append(row)
    return groups


def values_of(rows, name, **equal):
    """The values of a column, in order, in the rows where others have the given values."""
    found = {row[name] for row in rows if all(row[key] == value for key, value in equal.items())}
    return sorted(found, key=lambda value: (value is not None, value))


def clips_of(rows):
    """(kind, threshold) of all clips, no clip first."""
    return [(kind, threshold) for kind in KINDS for threshold in values_of(rows, "threshold", kind=kind)]


def clip_name(kind, threshold):
    return KINDS[kind] if threshold is None else f"{KINDS[kind]} {threshold:g}"


def best_of(rows, model, kind, **equal):
    """((model, kind, threshold, lr), Group) with the lowest median error rate, the lower loss first; None without rows.

    A group with a run that diverged is no candidate, unless all have one.
    """
    rows = [row for row in rows if all(row[key] == value for key, value in equal.items())]
    groups = {key: group for key, group in groups_of(rows).items() if key[:2] == (model, kind)}
    order = {key: (g.diverged > 0, g.median("wer"), g.median("final_loss")) for key, g in groups.items()}
    return min(groups.items(), key=lambda item: order[item[0]], default=None)


def spread(values, digits=1):
    """Median and, of several values, their range."""
    if not values:
        return "–"
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best_table(rows):
    """Per model and kind of clip the best cell: heads, and lists of texts."""
    heads = ["model", "clip", "lr", "WER %", "new voice %", "training loss", "clipped %", "diverged"]
    lines = []
    for model in values_of(rows, "model"):
        for kind in KINDS:
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
    """The table at the end of a run."""
    if not rows:
        return "No cells."
    heads, lines = best_table(rows)
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [heads, *lines]]  # fmt: skip
    failed = sum(row["diverged"] for row in rows)
    return "\n".join([f"Best of each kind, by median error rate; {len(rows)} cells, {failed} diverged:", "", *text])


def markdown(heads, lines, left=1):
    rule = ["---" if column < left else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])


def wer_table(rows, model):
    """Clips down, learning rates across; diverged runs are counted."""
    groups, rates = groups_of(rows), values_of(rows, "lr", model=model)
    lines = []
    for kind, threshold in clips_of([row for row in rows if row["model"] == model]):
        line = [clip_name(kind, threshold)]
        for lr in rates:
            group = groups.get((model, kind, threshold, lr))
            line.append("–" if group is None else wer_text(group))
        lines.append(line)
    return markdown(["", *(f"lr {lr:g}" for lr in rates)], lines)


def wer_text(group):
    return f"{group.median('wer'):.0f}" + (f" ×{group.diverged}" if group.diverged else "")


def norm_table(rows):
    """The norms of the trainings without a clip that did not diverge: what a user measures first."""
    lines = []
    for (model, _, _, lr), group in sorted(groups_of([row for row in rows if row["kind"] == "none"]).items()):
        if not group.diverged:
            lines.append([model, f"{lr:g}", f"{group.median('norm_median'):.2g}", f"{group.median('norm_p90'):.2g}"])
    return markdown(["model, no clip", "lr", "median norm", "90 % quantile"], lines)


def clipped_table(rows, model):
    """In percent: of a value clip the elements clamped, of a norm clip the steps in which it acted."""
    groups, rates = groups_of(rows), values_of(rows, "lr", model=model)
    lines = []
    for kind, threshold in clips_of([row for row in rows if row["model"] == model]):
        if kind != "none":
            found = [groups.get((model, kind, threshold, lr)) for lr in rates]
            lines.append([clip_name(kind, threshold),
                          *("–" if g is None else percent(g.median("clipped")) for g in found)])  # fmt: skip
    return markdown(["", *(f"lr {lr:g}" for lr in rates)], lines)


def parameter_table(rows):
    lines = []
    for model in values_of(rows, "model"):
        line = [model]
        for kind in KINDS:
            counts = {row["parameters"] for row in rows if (row["model"], row["kind"]) == (model, kind)}
            line.append(", ".join(f"{count:,}" for count in sorted(counts)) or "–")
        seconds = [[row["cpu_seconds"] / row["steps"] for row in rows
                    if (row["model"], row["kind"], row["diverged"]) == (model, kind, 0)] for kind in KINDS]  # fmt: skip
        lines.append([*line, *(f"{1000 * mean(s):.1f}" if s else "–" for s in seconds)])
    heads = ["model", *(f"parameters, {name}" for name in KINDS.values())]
    return markdown([*heads, *(f"ms per step, {name}" for name in KINDS.values())], lines)


def extent(rows):
    """One sentence: what part of the grid was run."""
    seeds = {seed: sum(row["seed"] == seed for row in rows) for seed in values_of(rows, "seed")}
    each = ", ".join(f"{number} with seed {seed}" for seed, number in seeds.items())
    failed = sum(row["diverged"] for row in rows)
    seconds = sum(row["cpu_seconds"] for row in rows)
    machines = ", ".join(sorted({f"{row['machine']}, torch {row['torch']}" for row in rows}))
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    return (
        f"{len(rows)} cells ({each}), {failed} of them diverged; {seconds / 60:.0f} minutes of training on one core. "
        f"{machines}, commit {commits}."
    )


def blocks(rows):
    """What stands between <!-- study:name --> and <!-- /study:name --> in a page."""
    found = {"extent": extent(rows), "best": markdown(*best_table(rows), left=2), "norms": norm_table(rows),
             "parameters": parameter_table(rows)}  # fmt: skip
    for model in values_of(rows, "model"):
        found |= {f"wer-{model}": wer_table(rows, model), f"clipped-{model}": clipped_table(rows, model)}
    return found


def updated(page, rows, name="the page"):
    """The page with all its blocks made anew; SpeechDataError for a block that can't be made."""
    found = blocks(rows)

    def block(match):
        if match[1] not in found:
            raise SpeechDataError(f"{name}: the rows give nothing for <!-- study:{match[1]} -->")
        return f"<!-- study:{match[1]} -->\n{found[match[1]]}\n<!-- /study:{match[1]} -->"

    return re.sub(r"<!-- study:(\S+) -->\n.*?<!-- /study:\1 -->", block, page, flags=re.DOTALL)


def update(page, folder):
    """Writes the tables of the results in `folder` into the page; returns the rows."""
    rows = read_rows(folder / "clipping.csv")
    if not rows:
        raise SpeechDataError(f"{folder / 'clipping.csv'}: no rows")
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise SpeechDataError(f"{page}: {error.strerror}") from None
    replace_file(page, updated(text, rows, page))
    return rows
