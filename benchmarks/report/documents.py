"""python -m benchmarks report: the tables of README and docs, from result files and nothing else."""

import argparse
import json
import sys
from pathlib import Path

from . import cpu, gpu, hot, peers, precision, states, tensors, training

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments=None):
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("results", type=Path, nargs="*", help="such as cpu.json; default: all in benchmarks/results")
    parser.add_argument(
        "--update",
        type=Path,
        nargs="+",
        metavar="DOCUMENT",
        help="replace what stands in these files between <!-- NAME --> and <!-- /NAME -->: benchmark:cpu for all rows "
        "of cpu.json, benchmark:cpu-summary for its short table, speed for the README's table",
    )
    options = parser.parse_args(arguments)
    try:
        found = {path.stem: json.loads(path.read_text()) for path in options.results or committed()}
        if not options.update:
            print("\n\n".join(markdown(results) for results in found.values()))
            return 0
        rehearsals = [name for name, results in found.items() if results.get("rehearsal")]
        if rehearsals:
            raise ValueError(f"{rehearsals[0]}.json is a rehearsal: its times are no GPU's, and go into no document")
        texts = tables(found)
        updated = {path: replaced(path.read_text(), texts, path) for path in options.update}
        for path, document in updated.items():
            path.write_text(document)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def committed():
    return sorted(RESULTS.glob("*.json"))


def reporter(results):
    if "gpu" in results:
        return gpu
    of_kind = {"hot": hot, "peers": peers, "precision": precision, "states": states, "training": training}
    if results.get("kind") in of_kind:
        return of_kind[results["kind"]]
    return tensors if "kind" in results else cpu


def markdown(results):
    return reporter(results).markdown(results)


def tables(found):
    """Returns the tables for documents, by the name of their markers; `found` holds results by file name."""
    texts = {f"benchmark:{name}": markdown(results) for name, results in found.items()}
    cpu_results = {name: results for name, results in found.items() if reporter(results) is cpu}
    texts |= {f"benchmark:{name}-summary": cpu.summary(results) for name, results in cpu_results.items()}
    speed = cpu.speed(cpu_results.values())
    return texts | ({"speed": speed} if speed else {})


def markers(name):
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def replaced(document, texts, path="the document"):
    """Puts each text between its markers in a document. ValueError: markers are missing, repeated, or out of order."""
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
