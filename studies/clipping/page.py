"""The tables of docs/clipping.md, from the rows of the clipping study and nothing else."""

import re

from examples.support import safe_files
from examples.support.console import SpeechDataError

from .clips import MICRO_CLIPS, clip_name
from .results import OF_SITUATIONS, read_rows
from .situation import SITUATIONS, is_bad
from .summary import best_table, clips_of, groups_of, percent, spread, values_of, whole


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
    """Returns the norms of the trainings without a clip that did not diverge, which a user measures first."""
    lines = []
    for (model, _, _, lr), group in sorted(groups_of([row for row in rows if row["kind"] == "none"]).items()):
        if not group.diverged:
            lines.append([model, f"{lr:g}", f"{group.median('norm_median'):.2g}", f"{group.median('norm_p90'):.2g}"])
    return markdown(["model, no clip", "lr", "median norm", "90 % quantile"], lines)


def clipped_table(rows, model):
    """Returns percentages: elements that a value clip clamped, or steps in which a norm clip acted."""
    groups, rates = groups_of(rows), values_of(rows, "lr", model=model)
    lines = []
    for kind, threshold in clips_of([row for row in rows if row["model"] == model]):
        if kind != "none":
            found = [groups.get((model, kind, threshold, lr)) for lr in rates]
            lines.append([clip_name(kind, threshold),
                          *("–" if g is None else percent(g.median("clipped")) for g in found)])  # fmt: skip
    return markdown(["", *(f"lr {lr:g}" for lr in rates)], lines)


def product_table(rows, kind):
    """Returns error rates over learning rate times threshold: the length of an update, if the clip always acts."""
    found = {}
    for (model, group_kind, threshold, lr), group in groups_of(rows).items():
        if group_kind == kind:
            found.setdefault(float(f"{lr * threshold:.1g}"), {}).setdefault(model, []).append(group.median("wer"))
    models = values_of(rows, "model")
    lines = [[f"{product:g}", *(spread(found[product].get(model, []), 0) for model in models)]
             for product in sorted(found)]  # fmt: skip
    return markdown([f"lr × {kind} threshold", *models], lines)


def parameter_table(rows):
    """Returns the sizes of each model over all clips: one."""
    lines = []
    for model in values_of(rows, "model"):
        counts = values_of(rows, "parameters", model=model)
        lines.append([model, ", ".join(f"{count:,}" for count in counts)])
    return markdown(["model", "parameters, with any clip"], lines)


def situation_table(rows, model, names):
    """Clips and learning rates down, situations across: error rates."""
    rows = [row for row in rows if row["model"] == model]
    groups = {name: groups_of([row for row in rows if row["situation"] == name]) for name in names}
    lines = []
    for kind, threshold in clips_of(rows):
        for lr in values_of(rows, "lr", kind=kind):
            found = [groups[name].get((model, kind, threshold, lr)) for name in names]
            if any(found):
                line = ["–" if group is None else wer_text(group) for group in found]
                lines.append([f"{clip_name(kind, threshold)}, lr {lr:g}", *line])
    return markdown(["", *names], lines)


def situations(rows):
    """Returns the tables at the end of a run over situations."""
    names = [name for name in SITUATIONS if any(row["situation"] == name for row in rows)]
    return "\n\n".join(f"{model}:\n\n{situation_table(rows, model, names)}" for model in values_of(rows, "model"))


def situation_blocks(rows):
    """As `blocks`, for the page of the situations."""
    bad, others = ([name for name in SITUATIONS if is_bad(name) == of] for of in (True, False))
    found = {"situations": extent(rows)}
    whole_batches = [row for row in rows if row["kind"] not in MICRO_CLIPS]
    beside_micro_batches = [row for row in rows if row["kind"] in (*MICRO_CLIPS, "norm", "change")]
    for model in values_of(rows, "model"):
        found[f"bad-{model}"] = situation_table(whole_batches, model, [others[0], *bad])
        found[f"micro-{model}"] = situation_table(beside_micro_batches, model, [others[0], *bad])
        found[f"transfer-{model}"] = situation_table(whole_batches, model, [n for n in others if n != "AdamW"])
        found[f"adamw-{model}"] = situation_table(whole_batches, model, ["AdamW"])
    return found


def extent(rows):
    """Returns one sentence, on the part of the grid that was run."""
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
    """Returns the texts between <!-- study:name --> and <!-- /study:name --> in a page, by name."""
    found = {"extent": extent(rows), "best": markdown(*best_table(rows), left=2), "norms": norm_table(rows),
             "parameters": parameter_table(rows), "product-value": product_table(whole(rows), "value"),
             "product-norm": product_table(whole(rows), "norm")}  # fmt: skip
    for model in values_of(rows, "model"):
        found |= {f"wer-{model}": wer_table(rows, model), f"clipped-{model}": clipped_table(rows, model)}
    return found


def updated(page, rows, name="the page", of_situations=()):
    """Returns the page with all its blocks written again; SpeechDataError for a block that can't be made."""
    found = blocks(rows) | (situation_blocks(of_situations) if of_situations else {})

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
    of_situations = read_rows(folder / "situations.csv", OF_SITUATIONS)
    safe_files.write(page, updated(text, rows, page, of_situations).encode())
    return rows
