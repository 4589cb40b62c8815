"""The tables and the picture of a CPU's results."""

from .formats import columns, commit, deviations, duration, models, percent, rounded, rule, spread, table, times

HEADER = ["µs per step", "vs loop", "vs best of torch"]
LIMIT = "Limit: the time that memory takes for the same arrays and nothing else, in the same round."
PANELS = {"vs_loop": "over the Python loop", "vs_best_of_torch": "over the best of torch"}

# The rows of the README's table: model, its title, rule, clip, and what the rule and the clip are called.
SPEED = [
    ("tiny-600", "600 tensors of 144", "0.9", "value", "SGD + momentum, value"),
    ("gru-ctc", "GRU-CTC", "AdamW", "norm", "AdamW, norm"),
    ("conformer-m", "Conformer-M", "AdamW", "norm", "AdamW, norm"),
    ("dense-100m", "6 matrices of 4,096²", "0.9", "value", "SGD + momentum, value"),
]


def markdown(results):
    """One line on the circumstances, one on the models, then a table for each number of threads."""
    header = ["model", "clip", kind_of_rule(results), *HEADER, "of the limit"]
    parts = [circumstances(results), models(results)]
    for threads in sorted({row["threads"] for row in results["cases"]}):
        rows = [table_row(row) for row in results["cases"] if row["threads"] == threads]
        parts.append(f"**{threads} thread{'s' if threads > 1 else ''}**\n\n{table([header, *rows], words=2)}")
    return "\n\n".join(parts)


def summary(results):
    """Returns a row for each model and clip, of medians of the rules in turn; columns for each number of threads."""
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


def speed(all_results):
    """Returns the README's table: medians of a few rows, one thread. None unless the results have all of them."""
    timed = {
        (row["model"], rule(row), row["clip"]): row
        for results in all_results
        for row in results["cases"]
        if row["threads"] == 1
    }
    if not all((model, kind, clip) in timed for model, _, kind, clip, _ in SPEED):
        return None
    lines = [["model", "optimizer, clip", "vs Python loop", "vs best of torch"]]
    for model, title, kind, clip, what in SPEED:
        row = timed[model, kind, clip]
        ratios = [f"{times(row[against]['median'])}×" for against in ("vs_loop", "vs_best_of_torch")]
        lines.append([f"{title} ({rounded(row['parameters'])})", what, *ratios])
    return table(lines, words=2)


def kind_of_rule(results):
    """Returns the name of the column that tells the rules apart."""
    return "momentum" if all("momentum" in row for row in results["cases"]) else "rule"


def size(results, model):
    return rounded(next(row["parameters"] for row in results["cases"] if row["model"] == model))


def circumstances(results):
    return f"{machine(results)} Medians (10th–90th percentile of the rounds). {LIMIT}"


def machine(results):
    found, versions = results["machine"], results["versions"]
    return (
        f"{found['cpu']}, {found['cores']} cores; torch {versions['torch']}, Python {versions['python']}, "
        f"fastclip {versions['fastclip']} ({versions['compiler']}, {versions['capability']}); "
        f"commit {commit(results)}, {results['date'][:10]}; `{results['command']}`."
    )


def table_row(row):
    share = row.get("of_limit")
    return [
        row["model"],
        f"{row['clip']} {row['limit']:g}",
        rule(row),
        spread(row["us_per_step"]["fastclip"], duration),
        spread(row["vs_loop"], times, "×"),
        f"{spread(row['vs_best_of_torch'], times, '×')} {row['best_of_torch']}",
        spread(share, percent, " %") if share else "",
    ]


def console(results):
    """Returns all contenders' times in µs per step, for a terminal."""
    titles = ["model", "clip", "rule", "thr.", "loop", "foreach", "fused", "fastclip µs", "vs loop", "vs best of torch"]
    lines = [titles + ["host µs", "ns/tensor", "limit GB/s", "of the limit"]]
    for row in results["cases"]:
        own = table_row(row)
        timed = row["us_per_step"]
        of_torch = [duration(timed[name]["median"]) if name in timed else "" for name in ("loop", "foreach", "fused")]
        host = [duration(timed["host"]["median"]), duration(row["host_ns_per_tensor"]["median"])]
        speed = [f"{row['limit_gb_per_s']['median']:.1f}" if "limit_gb_per_s" in row else ""]
        lines.append([*own[:3], str(row["threads"]), *of_torch, *own[3:6], *host, *speed, own[6]])
    return "\n".join([circumstances(results), "", columns(lines), "", deviations(results)])


def draw(results, path):
    """Bars of the speed-ups' medians, with the spread between rounds; one colour for each number of threads."""
    import matplotlib  # slow to load

    matplotlib.use("Agg")  # needs no screen
    import matplotlib.pyplot as plt

    threads = sorted({row["threads"] for row in results["cases"]})
    labels = list(dict.fromkeys(label(row) for row in results["cases"]))
    height = 0.8 / len(threads)
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.32 * len(labels)), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for index, count in enumerate(threads):
            rows = [row for row in results["cases"] if row["threads"] == count]
            places = [labels.index(label(row)) + (index - (len(threads) - 1) / 2) * height for row in rows]
            medians = [row[key]["median"] for row in rows]
            # The bars start at 1, "as fast as": on a logarithmic axis that is where they get their length from.
            axis.barh(places, [m - 1 for m in medians], height, left=1, label=f"{count} thread{'s' * (count > 1)}")
            low = [max(0, row[key]["median"] - row[key]["p10"]) for row in rows]
            high = [max(0, row[key]["p90"] - row[key]["median"]) for row in rows]
            axis.errorbar(medians, places, xerr=[low, high], fmt="none", ecolor="0.3", elinewidth=1)
        axis.axvline(1, color="0.3", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1×", "2×", "5×", "10×", "20×", "50×", "100×"])
        axis.minorticks_off()
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"fastclip {title}")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right")
    figure.supxlabel("speed-up of clip and step, log scale (median, 10th to 90th percentile of the rounds)", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label(row):
    title = f"momentum {rule(row)}" if "momentum" in row else rule(row)
    return f"{row['model']}, {row['clip']}, {title}"
