"""How numbers and tables are written, for the README and for a terminal."""


def commit(results):
    """Returns the first ten digits of the commit, and whether the code differed from it."""
    if not results["commit"]:
        return "unknown" + (" with changes" if results["dirty"] else "")
    return results["commit"][:10] + {True: " with changes", False: "", None: " (as told)"}[results["dirty"]]


def models(results):
    sizes = {row["model"]: (row["tensors"], row["parameters"]) for row in results["cases"]}
    return "Models: " + "; ".join(f"{name}, {n} tensors, {rounded(size)}" for name, (n, size) in sizes.items()) + "."


def table(lines, words):
    """Markdown: the first line is the header, the first columns are words, the others numbers."""
    rule = words * ["---"] + (len(lines[0]) - words) * ["---:"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def columns(lines):
    """Returns the same for a terminal."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


def deviations(results):
    """Returns how far the contenders' norm clips are from a step in float64, at most."""
    rows = [row["deviation"] for row in results["agreement"] if row["clip"] == "norm"]
    largest = {} if rows else {"not checked": 0}
    for row in rows:
        for name, value in row.items():
            largest[name] = max(value, largest.get(name, 0))
    return "norm clip, off a float64 step by at most: " + ", ".join(f"{k} {v:.1g}" for k, v in largest.items())


def rule(row):
    """SGD by its momentum, others by name."""
    return f"{row['momentum']:g}" if "momentum" in row else row["rule"]


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
