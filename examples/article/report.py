"""The results of the article's runs: one table, a CSV and a JSON with the same numbers, and a picture."""

import csv
import io
import json
from statistics import median

import matplotlib

from benchmarks.core import record

from ..speech.report import draw_curves, finite
from ..support.lockstep import LOOP
from ..support.safe_files import write
from . import update_memory

LAST = 50  # steps whose mean is called the final loss


def rows_of(name, task, arms):
    """Returns a dict per arm."""
    order = task.batches(None)
    loss_of = task.loss_of(next(iter(order)))
    rows = []
    for arm in arms:
        last = arm.losses[-LAST:]
        state_bytes, extra_bytes = update_memory.bytes_of_update(arm, loss_of)
        shares = [update / step for update, step in zip(arm.update_seconds, arm.step_seconds, strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in arm.params),
                "arm": arm.name,
                "score": task.score_name,
                **{test: task.score(arm.model, test) for test in task.tests},
                "final_loss": sum(last) / len(last),
                "clamped_percent": 100 * sum(arm.clamped) / len(arm.clamped) if arm.clamped else None,
                "steps": len(arm.losses),
                "step_ms": 1e3 * median(arm.step_seconds),
                "clip_update_us": 1e6 * median(arm.update_seconds),
                "share_percent": 100 * median(shares),
                "state_bytes": state_bytes,
                "extra_bytes": extra_bytes,
            }
        )
    loop = next(row for row in rows if row["arm"] == LOOP)
    for row in rows:
        row["times_faster"] = loop["clip_update_us"] / row["clip_update_us"]
    return rows


def table(rows, tests):
    """Returns the rows as text."""
    columns = [
        ("model", "model", "{}"),
        ("params", "parameters", "{:,}"),
        ("arm", "arm", "{}"),
        ("score", "score", "{}"),
    ]
    columns += [(test, test, "{:.1f}") for test in tests]
    columns += [
        ("final loss", "final_loss", "{:.3g}"),
        ("clamped %", "clamped_percent", "{:.1f}"),
        ("step ms", "step_ms", "{:.2f}"),
        ("clip+update µs", "clip_update_us", "{:.0f}"),
        ("of step %", "share_percent", "{:.1f}"),
        ("vs loop", "times_faster", "{:.1f}x"),
        ("state B", "state_bytes", "{:,}"),
        ("extra B", "extra_bytes", "{:,}"),
    ]
    lines = [[head for head, *_ in columns]]
    for row in rows:
        lines.append(["-" if row[key] is None else form.format(row[key]) for _, key, form in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ("arm", "model", "score")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if key in text else cell.rjust(width)
            for cell, width, (_, key, _) in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def save(folder, rows, data, settings, command):
    """article.csv and article.json; returns their paths."""
    report = {"data": data, "settings": settings, **record.describe([], command), "results": rows}
    numbers = folder / "article.json"
    write(numbers, (json.dumps(finite(report), indent=1) + "\n").encode())
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    sheet = folder / "article.csv"
    write(sheet, buffer.getvalue().encode())
    return sheet, numbers


def draw(folder, arms_of, rows, tests, caption):
    """Loss and gradient norm of each model's arms, as a PNG; returns its path."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(
        len(arms_of), 2, figsize=(12, 3.7 * len(arms_of)), layout="constrained", squeeze=False
    )
    for axes, (name, arms) in zip(all_axes, arms_of.items(), strict=True):
        scored = [row for row in rows if row["model"] == name]
        labels = [f"{row['arm']}: {row['score']} {' / '.join(f'{row[test]:.1f}' for test in tests)}" for row in scored]
        loss = "cross-entropy" if name == "dnn" else "CTC loss per utterance"
        draw_curves(axes, arms, labels, loss, f"{name}: loss")
    figure.suptitle(f"SGD with and without clamp(±0.01); score: {' / '.join(tests)}; {caption}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    path = folder / "article.png"
    write(path, buffer.getbuffer())
    return path
