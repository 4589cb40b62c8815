"""python -m benchmarks.report cpu.json: the tables of the README, from measured results and nothing else."""

import argparse
import json
import sys
from pathlib import Path

from . import report_cpu, report_gpu


def main(arguments=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("results", type=Path, help="a cpu.json or gpu.json")
    parser.add_argument(
        "--update",
        type=Path,
        metavar="README",
        help="replace what stands between <!-- benchmark:cpu --> and its end in this file, or benchmark:gpu",
    )
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        text = markdown(results)
        if options.update:
            if results.get("rehearsal"):
                raise ValueError(f"{options.results} is a rehearsal: its times are no GPU's, and go into no document")
            document = options.update.read_text()
            options.update.write_text(replaced(document, text, kind(results), options.update))
        else:
            print(text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def kind(results):
    """ "cpu" or "gpu"."""
    return "gpu" if "gpu" in results else "cpu"


def markdown(results):
    return {"cpu": report_cpu, "gpu": report_gpu}[kind(results)].markdown(results)


def markers(of_kind):
    return f"<!-- benchmark:{of_kind} -->", f"<!-- /benchmark:{of_kind} -->"


def replaced(document, text, of_kind, name="the document"):
    """The document with text between the markers. ValueError where they are not there once each, in order."""
    begin, end = markers(of_kind)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"{name} needs {begin} and, after it, {end}, once each")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    sys.exit(main())
