"""The picture of the results: fastclip's speed-up in every case."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend that needs no screen

from . import rules  # noqa: E402

PANELS = {"vs_loop": "over the Python loop", "vs_best_of_torch": "over the best of torch"}


def speed_ups(results, path):
    """Bars of the medians with the spread between rounds, one colour for each number of threads."""
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
    return f"{row['model']}, {row['clip']}, {rules.of_row(row).title}"
