"""The tables of a GPU's results."""

from .formats import columns, commit, deviations, duration, models, percent, rule, spread, table, times

HEADER = ["model", "dtype", "clip", "momentum", "step µs", "device µs", "host µs", "vs loop", "vs best of torch"]
# Device: over torch's fused optimizer, and of the norm clip over the value clip. Host: over the loop.
SUMMARY = [
    "plain SGD",
    "dtype",
    "clip",
    "device µs",
    "of the floor",
    "vs fused",
    "norm vs value",
    "host µs",
    "vs loop",
    "kernels",
]


def markdown(results):
    """One line on the circumstances, one on the models, then the main results and all rows."""
    rows = [table_row(row) for row in results["cases"]]
    parts = [
        circumstances(results),
        models(results),
        table(summary(results), words=3),
        table([[*HEADER, "of the floor"], *rows], words=3),
    ]
    return "\n\n".join(parts + remarks(results))


def summary(results):
    """Returns the numbers that docs/performance.md predicts: a header, and a row of strings per case of plain SGD."""
    rows = [row for row in results["cases"] if row["momentum"] == 0]
    return [SUMMARY, *map(summary_row, rows)]


def summary_row(row):
    return [
        row["model"],
        row["dtype"],
        row["clip"],
        duration(row["device_us"]["fastclip"]["median"]),
        f"{percent(row['of_floor']['median'])} %" if "of_floor" in row else "",
        f"{times(row['device_vs_fused']['median'])}×",
        f"{row['norm_vs_value']['median']:.2f}×" if "norm_vs_value" in row else "",
        duration(row["host_us"]["fastclip"]["median"]),
        f"{times(row['host_vs_loop']['median'])}×",
        str(len(row["kernels"])) if row.get("kernels") else "",
    ]


def circumstances(results):
    versions, gpu = results["versions"], results["gpu"]
    if results["rehearsal"]:
        device = "**A rehearsal on a CPU: these are no GPU's times**"
    else:
        device = f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}"
    return (
        f"{device}; CUDA {versions['cuda']} (nvcc {versions['nvcc']}), torch {versions['torch']}, "
        f"Python {versions['python']}, fastclip {versions['fastclip']}; commit {commit(results)}, "
        f"{results['date'][:10]}; `{results['command']}`. Medians (10th–90th percentile of the rounds) of fastclip. "
        "Step: as a training loop takes them, bounded by the host in small models. Device: replayed from a CUDA graph. "
        "Host: until the call returns. Speed-ups compare steps. Floor: the bytes that a step has to move, at the speed "
        "of a copy on the device in the same round."
    )


def remarks(results):
    """Remarks on single rows, and on rows that are missing."""
    reasons = {f"{name}: {text}" for row in results["cases"] for name, text in row["no_graph"].items()}
    parts = [f"No graph, steps in a row instead: {'; '.join(sorted(reasons))}."] if reasons else []
    if results["failed"]:
        parts.append(f"Failed: {'; '.join(case['case'] for case in results['failed'])}.")
    if results["left_out"]:
        parts.append(f"Left out, as the time was up: {'; '.join(results['left_out'])}.")
    return parts


def table_row(row):
    return [
        row["model"],
        row["dtype"],
        f"{row['clip']} {row['limit']:g}",
        rule(row),
        spread(row["us_per_step"]["fastclip"], duration),
        spread(row["device_us"]["fastclip"], duration) + ("*" if "fastclip" in row["no_graph"] else ""),
        spread(row["host_us"]["fastclip"], duration),
        spread(row["vs_loop"], times, "×"),
        f"{spread(row['vs_best_of_torch'], times, '×')} {row['best_of_torch']}",
        spread(row["of_floor"], percent, " %") if "of_floor" in row else in_cache(row),
    ]


def in_cache(row):
    return "in the L2 cache" if row["in_l2"] else ""


def console(results):
    """Returns all contenders' times, for a terminal."""
    kinds = {"us_per_step": "step µs", "device_us": "device µs", "host_us": "host µs"}
    names = ["loop", "foreach", "fused", "fastclip"]
    lines = [["model", "dtype", "clip", "mom.", "", *names, "copy GB/s", "of the floor"]]
    for row in results["cases"]:
        own = table_row(row)
        for key, title in kinds.items():
            medians = [duration(row[key][name]["median"]) for name in names]
            rest = [f"{row['copy_gb_per_s']['median']:.0f}", own[-1]] if key == "device_us" else ["", ""]
            lines.append([*own[:4], title, *medians, *rest])
    parts = [circumstances(results), columns(lines), deviations(results), *remarks(results)]
    return "\n\n".join([*parts, columns(summary(results))])
