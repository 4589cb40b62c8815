"""The effect of clipping on training: threshold x learning rate x kind of clip x model, on spoken digits.

    python -m studies.clipping

Trains a small recogniser once per cell of the grid with fastclip.SGD (momentum 0.9). Each finished cell is a row of
clipping.csv in --out; the same command goes on where a run was stopped. At the end come pictures and a table.
"""

import contextlib
import fcntl
import json
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.core import record
from examples.speech.batches import BATCH
from examples.support import lockstep, safe_files
from examples.support.console import SpeechDataError, progress
from examples.support.options import add_device, count, make_folder, make_parser

from . import page, plots
from .cell import MODELS, MOMENTUM, load_data, train_cell
from .grids import grid, situation_grid
from .results import COLUMNS, OF_SITUATIONS, cell_of, read_rows, write_rows
from .situation import SITUATIONS
from .summary import summary


def key_of(row):
    return row.get("situation"), cell_of(row)


def run(options):
    """Trains the missing cells; returns the exit code."""
    torch.set_num_threads(1)
    columns = OF_SITUATIONS if options.situations else COLUMNS
    table = options.out / ("situations.csv" if options.situations else "clipping.csv")
    with alone_in(options.out):
        rows = read_rows(table, columns)
        jobs = situation_grid(options) if options.situations else [(None, cell) for cell in grid(options)]
        done = set(map(key_of, rows))
        missing = [job for job in jobs if job not in done]
        print(f"{len(jobs)} cells, {len(jobs) - len(missing)} of them in {table} already.", flush=True)
        if missing:
            fill(missing, rows, options, table, columns)
        wanted = set(jobs)
        rows = [row for row in rows if key_of(row) in wanted]
        pictures = [] if options.situations else plots.draw(rows, options.out)
    print("\n" + (page.situations(rows) if options.situations else summary(rows)) + "\n")
    print(", ".join(map(str, [table, *pictures])))
    return 0


def report(options):
    """Pictures and the page's tables from the rows there are; returns the exit code."""
    rows = page.update(options.report, options.out)
    print(", ".join(map(str, [options.report, *plots.draw(rows, options.out)])))
    return 0


def fill(missing, rows, options, table, columns):
    """Trains the cells, and saves each as a row when it is done."""
    found = record.describe(options.arguments, "python -m studies.clipping")
    commit = (found["commit"] or "unknown") + ("+changes" if found["dirty"] else "")
    origin = {"torch": torch.__version__, "fastclip": found["versions"]["fastclip"],
              "machine": machine_of(found, options.device), "commit": commit}  # fmt: skip
    data, loaded_seed, failed = None, None, 0
    with progress(total=len(missing), desc="study", unit="cell") as bar:
        for situation, cell in missing:
            if cell.seed != loaded_seed:
                data = load_data(options.data, options.cache, cell.seed, options.strings, options.device)
                keep_settings(options, data, found if loaded_seed is None else None, table)
                loaded_seed = cell.seed
            threshold = "" if cell.threshold is None else f" {cell.threshold:g}"
            of = [situation] if situation else []
            name = ", ".join([*of, f"{cell.model} {cell.kind}{threshold} lr {cell.lr:g}"])
            bar.set_postfix_str(f"{name}, {failed} diverged", refresh=False)
            row = train_cell(cell, data, options.epochs, *(SITUATIONS[name] for name in of))
            rows.append({**({"situation": situation} if situation else {}), **vars(cell), **row, **origin})
            failed += row["diverged"]
            write_rows(table, rows, columns)
            bar.update()


def machine_of(found, device):
    return found["machine"]["cpu"] if device.type == "cpu" else lockstep.name_of(device)


def keep_settings(options, data, started, table):
    """Writes the settings of all rows, and each start, beside the CSV; SpeechDataError if the rows have others."""
    path = table.with_suffix(".json")
    settings = {"data": data.speech.caption, "train": len(data.train), "test": len(data.test),
                "test_new_voice": len(data.unheard), "epochs": options.epochs, "batch": BATCH,
                "momentum": MOMENTUM}  # fmt: skip
    kept = {"settings": settings, "starts": []}
    try:
        if path.exists():
            kept = json.loads(path.read_text())
        changed = [f"{key} {kept['settings'].get(key)!r}, now {value!r}" for key, value in settings.items()
                   if kept["settings"].get(key) != value]  # fmt: skip
        if started:
            kept["starts"].append(started)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SpeechDataError(f"{path}: not the settings of a clipping study ({error!r})") from None
    if changed:
        raise SpeechDataError(f"{path}: its rows were made with {', '.join(changed)}; give another --out")
    if started:
        safe_files.write(path, (json.dumps(kept, indent=1) + "\n").encode())


@contextlib.contextmanager
def alone_in(folder):
    """Makes the folder; two studies that write one file would lose each other's rows."""
    make_folder(folder)
    try:
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held open as long as it is locked
    except OSError as error:
        raise SpeechDataError(f"--out {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SpeechDataError(f"--out {folder}: another study is writing there") from None
        yield


def parse_arguments(arguments=None):
    parser = make_parser("studies.clipping", __doc__, out="study_output")
    add_device(parser)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cells: two learning rates, one threshold of each kind")
    add("--headline", action="store_true", help="only the clips that are compared on all models, with more seeds")
    add("--situations", action="store_true",
        help="another grid: other losses, momenta, widths, optimizers, bad data; it fills situations.csv")  # fmt: skip
    add("--models", nargs="+", choices=MODELS, default=["gru", "cnn"], metavar="M",
        help=f"of {', '.join(MODELS)} (default: gru cnn)")  # fmt: skip
    add("--seeds", type=count, metavar="N", default=3, help="0 to N-1: data, held-out voice, model (default: 3)")
    add("--strings", type=count, metavar="N", default=320, help="of digits to train on (default: %(default)s)")
    add("--epochs", type=count, metavar="N", default=20, help="default: %(default)s")
    add("--report", type=Path, metavar="PAGE",
        help="no training: draw the results in --out again, and write their tables into this page")  # fmt: skip
    options = parser.parse_args(arguments)
    options.arguments = [shlex.quote(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    return options


def main(arguments=None):
    """Returns the exit code."""
    options = parse_arguments(arguments)
    try:
        return report(options) if options.report else run(options)
    except (SpeechDataError, ImportError) as error:
        missing = ": pip install -r requirements.txt brings it" if isinstance(error, ImportError) else ""
        print(f"error: {error}{missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(f"\nStopped. What is done is in {options.out}; the same command goes on there.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
