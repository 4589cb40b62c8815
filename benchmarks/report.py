"""python -m benchmarks.report cpu.json: the tables of README and docs, from measured results and nothing else."""

import argparse
import json
import sys
from pathlib import Path

from . import report_cpu, report_gpu, report_host, report_large


def main(arguments=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("results", type=Path, help="such as cpu.json or gpu.json")
    parser.add_argument(
        "--update",
        type=Path,
        nargs="+",
        metavar="DOCUMENT",
        help="replace what stands in these files between <!-- benchmark:NAME --> and <!-- /benchmark:NAME -->; NAME is "
        "that of the results, such as cpu, for all tables, or cpu-summary for the short one",
    )
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        if not options.update:
            print(markdown(results))
            return 0
        if results.get("rehearsal"):
            raise ValueError(f"{options.results} is a rehearsal: its times are no GPU's, and go into no document")
        texts = sections(results, options.results.stem)
        updated = {path: replaced(path.read_text(), texts, path) for path in options.update}
        for path, document in updated.items():
            path.write_text(document)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def reporter(results):
    if "gpu" in results:
        return report_gpu
    return {"host_time": report_host, "large": report_large}.get(results.get("kind"), report_cpu)


def markdown(results):
    return reporter(results).markdown(results)


def sections(results, name):
    """What documents quote of the results of this name, by marker."""
    texts = {name: markdown(results)}
    if reporter(results) is report_cpu:
        texts[f"{name}-summary"] = report_cpu.summary(results)
    return texts


def markers(name):
    return f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"


def replaced(document, texts, path="the document"):
    """The document with each text between its markers. ValueError where there are none, or not in order, once each."""
    present = [name for name in texts if any(marker in document for marker in markers(name))]
    if not present:
        raise ValueError(f"{path} has none of the markers {', '.join(markers(name)[0] for name in texts)}")
    for name in present:
        begin, end = markers(name)
        if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
            raise ValueError(f"{path} needs {begin} and, after it, {end}, once each")
        head, rest = document.split(begin)
        document = f"{head}{begin}\n{texts[name]}\n{end}{rest.split(end)[1]}"
    return document


if __name__ == "__main__":
    sys.exit(main())
