"""python -m benchmarks.report cpu.json: the tables of the README, from measured results and nothing else."""

import argparse
import json
import sys
from pathlib import Path

BEGIN, END = "<!-- benchmark:cpu -->", "<!-- /benchmark:cpu -->"
HEADER = ["model", "clip", "momentum", "µs per step", "vs loop", "vs best of torch", "of the floor"]


def main(arguments=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("results", type=Path, help="a cpu.json")
    parser.add_argument("--update", type=Path, metavar="README", help=f"replace what stands after {BEGIN} in this file")
    options = parser.parse_args(arguments)
    try:
        text = markdown(json.loads(options.results.read_text()))
        if options.update:
            options.update.write_text(replaced(options.update.read_text(), text, options.update))
        else:
            print(text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def replaced(document, text, name="the document"):
    """The document with text between the markers. ValueError where they are not there once each, in order."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"{name} needs {BEGIN} and, after it, {END}, once each")
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def markdown(results):
    """One line on the circumstances, one on the models, then a table for each number of threads."""
    parts = [circumstances(results), models(results)]
    for threads in sorted({row["threads"] for row in results["cases"]}):
        rows = [readme_row(row) for row in results["cases"] if row["threads"] == threads]
        lines = [HEADER, ["---", "---"] + 5 * ["---:"], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{threads} thread{'s' if threads > 1 else ''}**\n\n{table}")
    return "\n\n".join(parts)


def circumstances(results):
    machine, versions = results["machine"], results["versions"]
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    return (
        f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, Python {versions['python']}, "
        f"fastclip {versions['fastclip']} ({versions['compiler']}, {versions['capability']}); commit {commit}, "
        f"{results['date'][:10]}; `{results['command']}`. Medians (10th–90th percentile of the rounds). "
        "Floor: the bytes that a step has to move, at the speed of torch's `add_` in the same round."
    )


def models(results):
    sizes = {row["model"]: (row["tensors"], row["parameters"]) for row in results["cases"]}
    return "Models: " + "; ".join(f"{name}, {n} tensors, {rounded(size)}" for name, (n, size) in sizes.items()) + "."


def readme_row(row):
    return [
        row["model"],
        f"{row['clip']} {row['limit']:g}",
        f"{row['momentum']:g}",
        spread(row["us_per_step"]["fastclip"], duration),
        spread(row["vs_loop"], times, "×"),
        f"{spread(row['vs_best_of_torch'], times, '×')} {row['best_of_torch']}",
        spread(row["of_floor"], percent, " %") if "of_floor" in row else "",
    ]


def console(results):
    """All contenders' times in µs per step, for a terminal."""
    titles = ["model", "clip", "mom.", "thr.", "loop", "foreach", "fused", "fastclip µs", "vs loop", "vs best of torch"]
    lines = [titles + ["host µs", "ns/tensor", "GB/s", "of the floor"]]
    for row in results["cases"]:
        own = readme_row(row)
        times_of_torch = [duration(row["us_per_step"][name]["median"]) for name in ("loop", "foreach", "fused")]
        host = [duration(row["us_per_step"]["host"]["median"]), duration(row["host_ns_per_tensor"]["median"])]
        speed = [f"{row['gb_per_s']['median']:.1f}" if "gb_per_s" in row else ""]
        lines.append([*own[:3], str(row["threads"]), *times_of_torch, *own[3:6], *host, *speed, own[6]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([circumstances(results), "", *rows, "", deviations(results)])


def deviations(results):
    """How far the contenders' norm clips are from a step in float64, at most."""
    rows = [row["deviation"] for row in results["agreement"] if row["clip"] == "norm"]
    largest = {name: max(row[name] for row in rows) for name in rows[0]}
    return "norm clip, off a float64 step by at most: " + ", ".join(f"{k} {v:.1g}" for k, v in largest.items())


def spread(summary, form, unit=""):
    return f"{form(summary['median'])}{unit} ({form(summary['p10'])}–{form(summary['p90'])})"


def rounded(count):
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"


def duration(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def percent(value):
    return f"{100 * value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
