"""The results of a run: a table, a picture, and all numbers as JSON."""

import json
import math
from statistics import median

import matplotlib

from benchmarks.core import record

SMOOTHING = 0.9


def summarise(arms, baseline):
    """Returns a dict per arm; `baseline` names the arm that the speed-up refers to."""
    rows = [
        {
            "arm": arm.name,
            "lr": arm.optimizer.param_groups[0]["lr"],
            "wer_percent": arm.wer,
            "final_loss": sum(arm.losses[-20:]) / len(arm.losses[-20:]),
            "steps_per_second": len(arm.step_seconds) / sum(arm.step_seconds),
            "update_microseconds": 1e6 * median(arm.update_seconds),
        }
        for arm in arms
    ]
    base = next(row["update_microseconds"] for row in rows if row["arm"] == baseline)
    for row in rows:
        row["speedup_of_update"] = base / row["update_microseconds"]
    return rows


def table(rows, caption, baseline):
    """Returns the rows as text, with a line that shows recognised words."""
    lines = [f"Test: {caption}."]
    head = ("arm", "WER %", "final loss", "steps/s", "clip+update µs", "faster than loop")
    lines.append(f"{head[0]:<24}{head[1]:>8}{head[2]:>12}{head[3]:>10}{head[4]:>16}{head[5]:>18}")
    for row in rows:
        faster = f"{row['speedup_of_update']:.1f}x" if row["arm"] != baseline else "-"
        lines.append(
            f"{row['arm']:<24}{row['wer_percent']:>8.1f}{row['final_loss']:>12.3g}{row['steps_per_second']:>10.1f}"
            f"{row['update_microseconds']:>16.0f}{faster:>18}"
        )
    return "\n".join(lines)


def smooth(values):
    """Returns a running mean, which starts again at each value that is not finite."""
    smoothed, mean = [], None
    keep = max(SMOOTHING, 1 - 100 / max(1, len(values)))  # smoother where there are thousands
    for value in values:
        mean = value if mean is None or not math.isfinite(mean) else keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return smoothed


def draw_curves(axes, arms, labels, loss, title):
    """Loss in the first axes, with labels, and gradient norm in the second."""
    # The loop is a broad light line, so that fastclip's, which coincides with it, shows inside.
    styles = {"Python loop": {"lw": 6, "alpha": 0.35, "color": "tab:blue"}, "fastclip": {"lw": 1.3, "color": "navy"}}
    others = iter(("tab:red", "tab:orange", "tab:green"))
    for arm, label in zip(arms, labels, strict=True):
        style = styles.get(arm.name) or {"lw": 1.3, "color": next(others)}
        axes[0].plot(range(1, len(arm.losses) + 1), smooth(arm.losses), label=label, **style)
        axes[1].plot(arm.norm_steps, smooth(arm.norms), label=arm.name, **style)
    axes[0].set(xlabel="step", ylabel=f"{loss} (smoothed)", yscale="log", title=title)
    axes[1].set(xlabel="step", ylabel="norm before the clip (smoothed)", yscale="log", title="Gradient norm")
    for each in axes:
        each.grid(alpha=0.3)
        each.legend()


def draw(arms, caption, path):
    """Loss and gradient norm over the steps, as a PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    labels = [f"{arm.name}: WER {arm.wer:.1f} %" for arm in arms]
    draw_curves(axes, arms, labels, "CTC loss per string", "Loss")
    figure.suptitle(f"SGD with and without clipping; {caption}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finite(value):
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path, rows, arms, speech, settings, command):
    """The results, and what they depend on, as JSON; every step's numbers in a second file, ..._steps.json."""
    report = {
        "data": {"kind": speech.kind, "caption": speech.caption, "train": len(speech.train), "test": len(speech.test)},
        "settings": settings,
        **record.describe([], command),
        "results": rows,
    }
    steps = {
        "curves": {arm.name: {"loss": arm.losses, "norm_steps": arm.norm_steps, "norm": arm.norms} for arm in arms},
        "seconds": {arm.name: {"step": arm.step_seconds, "update": arm.update_seconds} for arm in arms},
    }
    path.write_text(json.dumps(finite(report), indent=1) + "\n")
    path.with_stem(f"{path.stem}_steps").write_text(json.dumps(finite(steps)) + "\n")
