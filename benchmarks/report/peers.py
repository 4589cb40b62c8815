"""The table of fastclip beside the optimizers of others."""

from .cpu import machine
from .formats import duration, models, spread, table, times


def markdown(results):
    """A row for each dtype, model, rule, clip and number of threads; a column for each peer."""
    peers = list(results["peers"])
    header = ["dtype", "model", "rule", "clip", "threads", "µs per step", *(f"over {name}" for name in peers)]
    body = []
    for row in results["cases"]:
        first = [row["dtype"], row["model"], row["rule"], row["clip"], str(row["threads"])]
        ratios = [spread(row["speed_up"][name], times, "×") if name in row["speed_up"] else "" for name in peers]
        body.append([*first, duration(row["us_per_step"]["fastclip"]["median"]), *ratios])
    versions = ", ".join(f"{name} {version}" for name, version in results["peers"].items())
    largest = {}
    for row in results["cases"]:
        largest[row["dtype"]] = max([largest.get(row["dtype"], 0.0), *row["deviation"].values()])
    apart = ", ".join(f"{value:.1g} in {dtype}" for dtype, value in largest.items())
    notes = [
        f"{machine(results)} {models(results)} Peers: {versions}; with a clip, after torch's `clip_grad_norm_`.",
        "Medians, and the 10th and 90th percentile, of ratios within a round: above 1, fastclip is faster.",
        f"After three steps their changes differed from fastclip's by at most {apart}.",
        *(f"Left out: {name} ({why})." for name, why in results["left_out"].items()),
    ]
    return "\n\n".join([" ".join(notes), table([header, *body], words=4)])
