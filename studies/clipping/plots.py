"""The clipping study's pictures: error rates as heat maps, and curves over thresholds and steps."""

import math

import matplotlib

from examples.support.console import SpeechDataError

from .clips import clip_name
from .grids import HEADLINE
from .summary import best_of, groups_of, values_of, whole

# Okabe and Ito's colours can be told apart with any colour vision; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
CLIPPED = ("value", "norm", "change")  # with several thresholds each


def draw(rows, folder):
    """Draws a PNG file of all models, and two per model whose grid is whole; returns their paths.

    SpeechDataError if they cannot be written.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = {"rates": rates_of_clips(plt, rows)}
    for model in values_of(whole(rows), "model"):
        model_rows = [row for row in rows if row["model"] == model]
        pictures[f"heatmap_{model}"] = heat_maps(plt, model_rows, model)
        pictures[f"curves_{model}"] = curves(plt, model_rows, model)
    paths = {folder / f"{name}.png": figure for name, figure in pictures.items()}
    try:
        for path, figure in paths.items():
            figure.savefig(path, dpi=68)
    except OSError as error:
        raise SpeechDataError(f"{path}: {error.strerror}; the rows are safe") from None
    finally:
        plt.close("all")
    return list(paths)


def rates_of_clips(plt, rows):
    """Error rate over the learning rate, a line per clip and a panel per model."""
    groups, models = groups_of(rows), values_of(rows, "model")
    clips = [(kind, threshold) for kind in HEADLINE for threshold in HEADLINE[kind]]
    across = min(3, max(1, len(models)))
    figure, panels = plt.subplots(
        -(-len(models) // across), across, figsize=(4.3 * across, 6.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, model in zip(panels.flat, models, strict=False):
        for clip, colour, marker in zip(clips, COLOURS, MARKERS, strict=False):
            found = [lr for lr in values_of(rows, "lr") if (model, *clip, lr) in groups]
            of = [groups[(model, *clip, lr)] for lr in found]
            axes.plot(found, [group.median("wer") for group in of], color=colour, marker=marker, ms=5,
                      label=clip_name(*clip))  # fmt: skip
            low, high = ([extreme(group.values("wer")) for group in of] for extreme in (min, max))
            axes.fill_between(found, low, high, color=colour, alpha=0.12)
        axes.set(xscale="log", xlabel="learning rate", ylabel="word error rate, %", ylim=(0, 104), title=model)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(models) :]:
        axes.set_axis_off()
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(clips))
    figure.suptitle("Medians over the seeds, and their range; 100: diverged, or nothing learnt")
    return figure


def heat_maps(plt, rows, model):
    """Draws a panel per kind of clip, threshold over learning rate; the lowest line is without a clip."""
    groups, rates = groups_of(rows), values_of(rows, "lr")
    figure, panels = plt.subplots(1, len(CLIPPED), figsize=(16, 4), layout="constrained")
    for axes, kind in zip(panels, CLIPPED, strict=True):
        clips = [
            ("none", None),
            *((kind, threshold) for threshold in reversed(values_of(rows, "threshold", kind=kind))),
        ]
        cells = [[groups.get((model, *clip, lr)) for lr in rates] for clip in reversed(clips)]
        error = [[math.nan if cell is None else cell.median("wer") for cell in line] for line in cells]
        image = axes.imshow(error, cmap="cividis_r", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                if cell is not None:
                    label = f"{error[y][x]:.0f}" + (f"\n{cell.diverged}/{len(cell.rows)} div." if cell.diverged else "")
                    axes.text(x, y, label, ha="center", va="center", fontsize=9,
                              color="white" if error[y][x] > 55 else "black")  # fmt: skip
        axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axes.set_yticks(range(len(clips)), [clip_name(*clip) for clip in reversed(clips)])
        axes.set(xlabel="learning rate", title=f"{kind} clip")
    figure.colorbar(image, ax=panels, label="word error rate, %")
    figure.suptitle(f"{model}: median word error rate over the seeds (div.: runs that diverged)")
    return figure


def curves(plt, rows, model):
    """Error rate over the threshold, a line per learning rate; and the losses of the best cells."""
    groups, rates = groups_of(rows), values_of(rows, "lr")
    figure, (*panels, losses) = plt.subplots(1, len(CLIPPED) + 1, figsize=(17, 5), layout="constrained")
    for axes, kind in zip(panels, CLIPPED, strict=True):
        thresholds = values_of(rows, "threshold", kind=kind)
        for lr, colour, marker in zip(rates, COLOURS, MARKERS, strict=False):
            found = [t for t in thresholds if (model, kind, t, lr) in groups]
            errors = [groups[model, kind, t, lr].median("wer") for t in found]
            axes.plot(found, errors, color=colour, marker=marker, label=f"lr {lr:g}")
            if unclipped := groups.get((model, "none", None, lr)):
                axes.axhline(unclipped.median("wer"), color=colour, lw=1, ls=":")
        axes.set(xlabel=f"{kind} threshold", ylabel="word error rate, %", ylim=(0, 104),
                 title=f"{kind} clip (dotted: none, same lr)")  # fmt: skip
        if thresholds:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(rates), fontsize=9)
    for (label, row), colour, marker in zip(chosen(rows, model), COLOURS, MARKERS, strict=False):
        steps = [(i + 0.5) * row["steps"] / len(row["losses"]) for i in range(len(row["losses"]))]
        losses.plot(steps, row["losses"], color=colour, marker=marker, ms=4, label=label)
    losses.set(yscale="log", xlabel="step", ylabel="CTC loss per string", title="training loss, first seed")
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8)
    figure.suptitle(f"{model}: thresholds, learning rates and losses")
    return figure


def chosen(rows, model):
    """(label, row of the first seed): the best cell of each kind, and no clip at the learning rates of the others."""
    keys = []
    for kind in (*reversed(CLIPPED), "none"):
        if best := best_of(rows, model, kind):
            keys.append(best[0])
    keys += [(model, "none", None, key[3]) for key in keys]
    groups = groups_of(rows)
    for key in dict.fromkeys(keys):
        if key in groups:
            row = min(groups[key].rows, key=lambda row: row["seed"])
            end = " (diverged)" if row["diverged"] else ""
            yield f"{clip_name(*key[1:3])}, lr {key[3]:g}{end}", row
