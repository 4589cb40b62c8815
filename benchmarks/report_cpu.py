"""The tables of a CPU's results."""

from .formats import columns, commit, deviations, duration, models, percent, rounded, rule, spread, table, times

HEADER = ["µs per step", "vs loop", "vs best of torch", "of the floor"]


def markdown(results):
    """One line on the circumstances, one on the models, then a table for each number of threads."""
    header = ["model", "clip", kind_of_rule(results), *HEADER]
    parts = [circumstances(results), models(results)]
    for threads in sorted({row["threads"] for row in results["cases"]}):
        rows = [readme_row(row) for row in results["cases"] if row["threads"] == threads]
        parts.append(f"**{threads} thread{'s' if threads > 1 else ''}**\n\n{table([header, *rows], words=2)}")
    return "\n\n".join(parts)


def summary(results):
    """A row for each model and clip, of medians of the rules in turn; columns for each number of threads."""
    counts = sorted({row["threads"] for row in results["cases"]})
    header = ["model", "clip"]
    for threads in counts:
        header += [f"{threads} thread{'s' if threads > 1 else ''}: vs loop", "vs best of torch"]
    lines = {}
    for row in results["cases"]:
        line = lines.setdefault((row["model"], row["clip"], row["limit"]), {})
        for against in ("vs_loop", "vs_best_of_torch"):
            line.setdefault((row["threads"], against), []).append(f"{times(row[against]['median'])}×")
    rows = [
        [
            f"{model}, {size(results, model)}",
            f"{clip} {limit:g}",
            *(" / ".join(line.get((n, against), [])) for n in counts for against in ("vs_loop", "vs_best_of_torch")),
        ]
        for (model, clip, limit), line in lines.items()
    ]
    found = " / ".join(dict.fromkeys(rule(row) for row in results["cases"]))
    return f"{machine(results)} Medians; {kind_of_rule(results)} {found}.\n\n{table([header, *rows], words=2)}"


def kind_of_rule(results):
    """What tells the rules apart."""
    return "momentum" if all("momentum" in row for row in results["cases"]) else "rule"


def size(results, model):
    return rounded(next(row["parameters"] for row in results["cases"] if row["model"] == model))


def circumstances(results):
    return (
        f"{machine(results)} Medians (10th–90th percentile of the rounds). "
        "Floor: the bytes that a step has to move, at the speed of torch's `add_` in the same round."
    )


def machine(results):
    found, versions = results["machine"], results["versions"]
    return (
        f"{found['cpu']}, {found['cores']} cores; torch {versions['torch']}, Python {versions['python']}, "
        f"fastclip {versions['fastclip']} ({versions['compiler']}, {versions['capability']}); "
        f"commit {commit(results)}, {results['date'][:10]}; `{results['command']}`."
    )


def readme_row(row):
    return [
        row["model"],
        f"{row['clip']} {row['limit']:g}",
        rule(row),
        spread(row["us_per_step"]["fastclip"], duration),
        spread(row["vs_loop"], times, "×"),
        f"{spread(row['vs_best_of_torch'], times, '×')} {row['best_of_torch']}",
        spread(row["of_floor"], percent, " %") if "of_floor" in row else "",
    ]


def console(results):
    """All contenders' times in µs per step, for a terminal."""
    titles = ["model", "clip", "rule", "thr.", "loop", "foreach", "fused", "fastclip µs", "vs loop", "vs best of torch"]
    lines = [titles + ["host µs", "ns/tensor", "GB/s", "of the floor"]]
    for row in results["cases"]:
        own = readme_row(row)
        times_of_torch = [duration(row["us_per_step"][name]["median"]) for name in ("loop", "foreach", "fused")]
        host = [duration(row["us_per_step"]["host"]["median"]), duration(row["host_ns_per_tensor"]["median"])]
        speed = [f"{row['gb_per_s']['median']:.1f}" if "gb_per_s" in row else ""]
        lines.append([*own[:3], str(row["threads"]), *times_of_torch, *own[3:6], *host, *speed, own[6]])
    return "\n".join([circumstances(results), "", columns(lines), "", deviations(results)])
