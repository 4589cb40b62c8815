"""python -m benchmarks.scaling: the tables of docs/scaling.md, from the cost model and from what was measured."""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

from . import cost_model, report, report_host, rules
from .cost_model import FLOAT32, LAYOUTS, MIXED, MS, US, Machine
from .formats import duration, rounded, table
from .shapes import MODELS

DOCUMENT = Path(__file__).parents[1] / "docs/scaling.md"
RESULTS = Path(__file__).parent / "results"

# Assumptions, each explained in docs/scaling.md.
H100 = Machine(
    bytes_per_s=0.93 * 3.35e12,
    s_per_launch=4 * US,
    s_per_call=5 * US,
    s_per_tensor=200e-9,
    s_per_dtensor=1 * US,
    s_per_message=20 * US,
)
AIM_S_PER_TENSOR = 15e-9

SGD, MOMENTUM = rules.CASES["sgd"]
ADAMW, AMSGRAD = (rules.CASES[name][0] for name in ("adamw", "amsgrad"))
TITLES = {SGD: "SGD", MOMENTUM: "SGD with momentum", ADAMW: "AdamW", AMSGRAD: "AdamW amsgrad"}
MODEL = "whisper-large"
DEVICES = (1, 8, 64, 1024)


def main(arguments=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--update", action="store_true", help=f"write them into docs/{DOCUMENT.name}")
    if parser.parse_args(arguments).update:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), tables(), DOCUMENT))
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables().items()))
    return 0


def tables():
    """Texts by marker."""
    return {
        "model-bytes": moved(),
        "model-messages": messages(),
        "model-shards": shards(),
        "model-steps": steps(),
        "model-crossovers": crossovers(),
        "model-check": check(),
    }


def moved():
    """Bytes per parameter: fastclip's, and those of torch's clip and fused optimizer after the stroke."""
    header = ["numbers", "clip", *TITLES.values()]
    rows = []
    for layout in LAYOUTS:
        for clip in ("value", "norm"):
            counts = [len(rule.states) for rule in TITLES]
            both = [f"{layout.moved(n, clip)} / {layout.moved_by_torch(n, clip)}" for n in counts]
            rows.append([layout.title, clip, *both])
    return table([header, *rows], words=2)


def messages():
    rows = [[f"{n:,}", f"{math.ceil(n / 8):,}", microseconds(cost_model.all_reduce_seconds(n))] for n in DEVICES[1:]]
    return table([["devices", "nodes of 8", "8 bytes, all-reduced"], *rows], words=0)


def shards():
    """How even FSDP2's cut along the first dimension is."""
    rows = []
    for model in (MODEL, "hubert-xlarge"):
        for devices in DEVICES[1:]:
            most, tensors = cost_model.shard(MODELS[model], devices)
            mean = sum(map(math.prod, MODELS[model])) / devices
            last, of_last = cost_model.shard(MODELS[model], devices, devices - 1)
            line = [rounded(mean), rounded(most), f"{most / mean:.2f}", f"{tensors:,}", rounded(last), f"{of_last:,}"]
            rows.append([model, f"{devices:,}", *line])
    titles = ["mean elements", "on rank 0", "over the mean", "tensors there", "on the last rank", "tensors there"]
    return table([["model", "devices", *titles], *rows], words=1)


def steps():
    """AdamW with a norm clip, sharded by FSDP2 over all devices: predictions."""
    header = [
        "numbers",
        "devices",
        "passes",
        "message",
        "host",
        "host at 15 ns",
        "step",
        "step at 15 ns",
    ]
    rows = []
    at_the_aim = dataclasses.replace(H100, s_per_tensor=AIM_S_PER_TENSOR, s_per_dtensor=AIM_S_PER_TENSOR)
    for layout in (FLOAT32, MIXED):
        for devices in DEVICES:
            elements, tensors = cost_model.shard(MODELS[MODEL], devices)
            passes = elements * layout.moved(len(ADAMW.states), "norm") / H100.bytes_per_s
            of_step = (elements, tensors, layout, len(ADAMW.states), "norm", devices)
            times = [
                passes,
                cost_model.all_reduce_seconds(devices),
                cost_model.host_seconds(H100, tensors, "norm", devices),
                cost_model.host_seconds(at_the_aim, tensors, "norm", devices),
                cost_model.step_seconds(H100, *of_step),
                cost_model.step_seconds(at_the_aim, *of_step),
            ]
            rows.append([layout.title, f"{devices:,}", *map(microseconds, times)])
    return table([header, *rows], words=1)


def crossovers():
    """Of how many devices on the host bounds a step."""
    header = ["model", "tensors", "numbers", "at 1 µs per DTensor", "at 15 ns"]
    rows = []
    for model in ("conformer-l", "wav2vec2-large", "hubert-xlarge", MODEL):
        for layout in (FLOAT32, MIXED):
            found = [
                cost_model.devices_where_the_host_takes_over(
                    dataclasses.replace(H100, s_per_dtensor=s), model, layout, len(ADAMW.states), "norm"
                )
                for s in (H100.s_per_dtensor, AIM_S_PER_TENSOR)
            ]
            rows.append([model, f"{len(MODELS[model]):,}", layout.title, *(duration(n) for n in found)])
    return table([header, *rows], words=1)


def check():
    """The same model of the CPU, with the bandwidth and the host's time that were measured in the same run."""
    ratios = {}
    for path in sorted(RESULTS.glob("cpu*.json")):
        for row in json.loads(path.read_text())["cases"]:
            if "of_floor" in row:
                key = report_host.title(row), row["clip"], row["threads"]
                ratios.setdefault(key, []).append((measured(row) / predicted(row), row["model"]))
    rows = []
    for (rule, clip, threads), found in ratios.items():
        values = [ratio for ratio, _ in found]
        models = ", ".join(model for _, model in found)
        line = [f"{f(values):.2f}" for f in (min, statistics.median, max)]
        rows.append([rule, clip, str(threads), *line, models])
    header = ["rule", "clip", "threads", "least", "median", "most", "models"]
    return table([header, *rows], words=2)


def predicted(row):
    """Seconds of a step of a row of a CPU's results, by the cost model."""
    machine = Machine(
        bytes_per_s=row["gb_per_s"]["median"] * 1e9,
        s_per_launch=0.0,
        s_per_call=0.0,
        s_per_tensor=row["host_ns_per_tensor"]["median"] * 1e-9,
    )
    states = len(rules.of_row(row).states)
    # One processor is its own host: nothing overlaps.
    passes = cost_model.device_seconds(machine, row["parameters"], FLOAT32, states, row["clip"])
    return passes + cost_model.host_seconds(machine, row["tensors"])


def measured(row):
    return row["us_per_step"]["fastclip"]["median"] * US


def microseconds(seconds):
    return f"{seconds / MS:.2f} ms" if seconds >= MS else f"{seconds / US:.0f} µs"


if __name__ == "__main__":
    sys.exit(main())
