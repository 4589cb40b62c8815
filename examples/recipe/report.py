"""What the runs have to say, side by side: their logs, error rates and times."""

import json
import re
from statistics import median

from ..speech.batches import word_error_rate
from .corpus import read_text

OF_AN_EPOCH = re.compile(r"(\d+)epoch results: \[train\] (.*?), time=.*\[valid\] .*?cer_ctc=([^,\s]+)")
LOGGED = ("loss", "grad_norm", "clip", "optim_step_time", "train_time")


def result_of(folder, test):
    """Returns the numbers of a run: `wer_percent`, milliseconds per step, and what ESPnet logged of each epoch."""
    wanted, got = read_text(test / "text"), read_text(folder / "decoded" / "1best_recog" / "text")
    seconds = json.loads((folder / "times.json").read_text())
    times = {f"{name}_ms": 1000 * median(values) for name, values in seconds.items()}
    times["share_percent"] = 100 * (times["clip_ms"] + times["update_ms"]) / times["step_ms"]
    return {
        "wer_percent": word_error_rate(list(wanted.values()), [got.get(name, []) for name in wanted]),
        "steps": len(seconds["update"]),
        **times,
        "epochs": log_of(folder / "train.log"),
    }


def log_of(path):
    """Returns, of each epoch, the numbers that ESPnet's log names, and its error rate on the test set."""
    epochs = []
    for _, text, error_rate in OF_AN_EPOCH.findall(path.read_text()):
        numbers = dict(part.split("=") for part in text.split(", "))
        epochs.append({**{name: float(numbers[name]) for name in LOGGED}, "cer_ctc": float(error_rate)})
    return epochs


def rows(results):
    """Returns {title: a text for each run}; results is {name of a run: result_of it}."""
    forms = {
        "word error rate": ("wer_percent", "{:.1f} %"),
        "a step": ("step_ms", "{:.0f} ms"),
        "its clip": ("clip_ms", "{:.1f} ms"),
        "its update": ("update_ms", "{:.1f} ms"),
        "share of the two": ("share_percent", "{:.1f} %"),
    }
    texts = {title: [form.format(result[key]) for result in results.values()] for title, (key, form) in forms.items()}
    return {"": list(results), **texts}


def tables(results):
    """The runs side by side as text, and below them what ESPnet logged of each epoch."""
    lines = [(title, *texts) for title, texts in rows(results).items()]
    lines += [("",), ("ESPnet's log, by epoch", *results)]
    for epoch, entries in enumerate(zip(*(result["epochs"] for result in results.values()), strict=True), 1):
        for key in (*LOGGED, "cer_ctc"):
            lines.append((f"{epoch} {key}", *(f"{entry[key]:.4g}" for entry in entries)))
    return "\n".join(f"{title:<28}" + "".join(f"{text:>20}" for text in texts) for title, *texts in lines)
