"""The file of the clipping study: a CSV with one row per cell, replaced as a whole when a cell is done."""

import csv
import dataclasses
import io

from examples.support import safe_files
from examples.support.console import SpeechDataError

from .cell import Cell

NUMBERS = {
    "threshold": float, "lr": float, "seed": int, "diverged": int, "wer": float, "wer_new_voice": float,
    "final_loss": float, "steps": int, "clipped": float, "norm_median": float, "norm_p90": float, "parameters": int,
    "cpu_seconds": float,
}  # fmt: skip
COLUMNS = ["model", "kind", *NUMBERS, "losses", "torch", "fastclip", "machine", "commit"]
OF_SITUATIONS = ["situation", *COLUMNS]


def cell_of(row):
    return Cell(*(row[field.name] for field in dataclasses.fields(Cell)))


def read_rows(path, columns=COLUMNS):
    """Returns a list of dicts, empty without a file; raises SpeechDataError where the file is no such CSV."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SpeechDataError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpeechDataError(f"{path}: not a CSV of the clipping study ({error})") from None
    if not lines or lines[0] != columns:
        raise SpeechDataError(f"{path}: its first line is not that of a clipping study; move it away to start again")
    return [_parsed(line, columns, f"{path}, line {number}") for number, line in enumerate(lines[1:], 2)]


def _parsed(line, columns, where):
    if len(line) != len(columns):
        raise SpeechDataError(f"{where}: {len(line)} columns instead of {len(columns)}; remove the line to go on")
    row = dict(zip(columns, line, strict=True))
    try:
        for name, number in NUMBERS.items():
            row[name] = number(row[name]) if row[name] else None
        row["losses"] = [float(loss) for loss in row["losses"].split()]
    except ValueError as error:
        raise SpeechDataError(f"{where}: {error}; remove the line to go on") from None
    return row


def write_rows(path, rows, columns=COLUMNS):
    """Replaces the file at once: whatever breaks off, it holds the old rows or the new ones."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_text(row[name]) for name in columns])
    safe_files.write(path, text.getvalue().encode())


def _text(value):
    if isinstance(value, list):
        return " ".join(f"{number:.4g}" for number in value)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
