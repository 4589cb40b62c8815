"""The tables of many tensors and of large ones: what a step costs per tensor, and real steps on the largest models."""

from .cpu import machine
from .formats import duration, models, rounded, rule, spread, table, times

WHAT = {
    "fastclip": "fastclip",
    "walk": "of it, finding and checking",
    "fused": "torch, fused",
    "foreach": "torch, foreach",
    "fastclip displaced": "fastclip, caches displaced",
    "fused displaced": "torch, fused, caches displaced",
    "fastclip dtensors": "fastclip, DTensors",
    "foreach dtensors": "torch, foreach, DTensors",
}
LARGE_HEADER = [
    "model",
    "share of",
    "numbers",
    "rule",
    "tensors",
    "elements",
    "GiB",
    "samples",
    "ms per step",
    "of the limit",
]


def markdown(results):
    kinds = {
        "large": large,
        "limits": limits,
        "by_tensor": by_tensor,
        "accumulation": accumulation,
        "deferred": deferred,
        "host_time": host,
        "imports": imports,
    }
    return kinds[results["kind"]](results)


def limits(results):
    """A row for each model, momentum and number of threads: what each setting takes more than a norm clip."""
    rows = results["cases"]
    base, *others = rows[0]["ratio"]
    header = ["model", "momentum", "threads", f"µs per step, {base}", *others]

    def more(row, name):
        ratio, micros = row["ratio"][name], row["us_more"][name]["median"]
        spread = f"{percent(ratio['p10'])} to {percent(ratio['p90'])}"
        return f"{percent(ratio['median'])} ({spread}), {micros:+.2f} µs"

    body = [
        [row["model"], f"{row['momentum']:g}", str(row["threads"]), duration(row["us_per_step"][base]["median"])]
        + [more(row, name) for name in others]
        for row in rows
    ]
    note = "Medians of the differences in each round, and the 10th and 90th percentile."
    return "\n\n".join([f"{machine(results)} {note}", table([header, *body], words=2)])


def by_tensor(results):
    """A row for each optimizer or setting, a column for each model and number of threads: its time over that of the
    first."""
    rows = results["cases"]
    base, *others = rows[0]["ratio"]
    header = ["", *(f"{row['model']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows)]
    first = [f"{base}: ms", *(f"{row['ms_per_step'][base]['median']:.1f}" for row in rows)]
    body = [[name, *(spread(row["ratio"][name], hundredths, " ×") for row in rows)] for name in others]
    largest = max(row["deviation"] for row in rows)
    note = (
        f"{models(results)} Medians, and the 10th and 90th percentile, of ratios within a round. ScaledAdam and its "
        f"stacked writing differed by at most {largest:.1g} of a parameter's largest element after six steps."
    )
    return "\n\n".join([f"{machine(results)} {note}", table([header, first, *body], words=1)])


def hundredths(value):
    return f"{value:.2f}"


def imports(results):
    """What each import takes, the first before the second; and the size of the extension."""
    rows = [
        [f"`import {name}`", f"{ms['median']:.1f}", f"{ms['p10']:.1f} to {ms['p90']:.1f}"]
        for name, ms in results["ms"].items()
    ]
    note = f"The extension has {results['extension_mib']:.1f} MiB."
    return "\n\n".join([f"{machine(results)} {note}", table([["", "ms", "10th to 90th percentile"], *rows], words=1)])


def accumulation(results):
    """A row for each model and number of threads: the time of a micro-batch, and that of others over it."""
    return times_of_others(results, ["model", "threads"], "us_per_micro_batch", "µs per micro-batch")


def deferred(results):
    """A row for each model, rule and number of threads: the time of a clip and step, and that of others over it."""
    return times_of_others(results, ["model", "rule", "threads"], "us_per_step", "µs per clip and step")


def times_of_others(results, columns, micros, what):
    rows = results["cases"]
    base, *others = rows[0]["ratio"]
    header = [*columns, f"{what}, {base}", *others]
    body = [
        [*(str(row[column]) for column in columns), duration(row[micros][base]["median"])]
        + [spread(row["ratio"][name], times, "×") for name in others]
        for row in rows
    ]
    return "\n\n".join(
        [
            f"{machine(results)} Medians, and the 10th and 90th percentile.",
            table([header, *body], words=len(columns) - 1),
        ]
    )


def percent(ratio):
    return f"{100 * (ratio - 1):+.1f} %"


def host(results):
    """Medians in ns per tensor: a row for each rule, clip and contender, a column for each number of tensors."""
    rows = results["cases"]
    counts = sorted({row["tensors"] for row in rows})
    lines = {}
    for row in rows:
        for name, summary in row["ns_per_tensor"].items():
            lines.setdefault((title(row), row["clip"], name), {})[row["tensors"]] = summary["median"]
    header = ["rule", "clip", "ns per tensor", *(f"{count:,} tensors" for count in counts)]
    body = [
        [of, clip, WHAT[name], *(duration(line[count]) if count in line else "" for count in counts)]
        for (of, clip, name), line in lines.items()
    ]
    return "\n\n".join([f"{machine(results)} Medians, one thread.", table([header, *body], words=3), growth(results)])


def title(row):
    return f"SGD, momentum {rule(row)}" if "momentum" in row else rule(row)


def growth(results):
    """Returns a sentence on what a tensor costs among the most tensors, compared with one among 1,000."""
    medians = {}
    for row in results["cases"]:
        medians.setdefault(row["tensors"], []).append(row["ns_per_tensor"]["fastclip"]["median"])
    few, many = (medians.get(count, []) for count in (1_000, max(medians)))
    if not few or few is many:
        return "No 1,000 tensors to compare the most with."
    ratios = [b / a for a, b in zip(few, many, strict=True)]
    return f"Each of {max(medians):,} tensors costs {min(ratios):.1f} to {max(ratios):.1f} times each of 1,000."


def large(results):
    """Returns a row for each case; a norm clip in all."""
    threads = {row["threads"] for row in results["cases"]}
    body = [
        [
            row["model"],
            f"1 of {row['devices']:,}" if row["devices"] > 1 else "all",
            row["dtype"],
            title(row),
            f"{row['tensors']:,}",
            rounded(row["elements"]),
            f"{row['gib']:.2g}",
            f"{row['samples']:,}",
            duration(row["ms"]),
            f"{100 * row['of_limit']:.0f} %",
        ]
        for row in results["cases"]
    ]
    where = f"{machine(results)} Threads: {', '.join(map(str, sorted(threads)))}. Norm clip; medians."
    return f"{where}\n\n{table([LARGE_HEADER, *body], words=4)}"
