"""python -m benchmarks.cpu: checks that all contenders agree, times them, writes NAME.json and NAME.png."""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import agreement, case, machine, memory, report_cpu, result_file
from .contenders import CLIPS
from .problem import Problem
from .rules import CASES
from .shapes import MODELS

DEFAULT = ["dnn", "gru-ctc", "tiny-600", "conformer-s", "conformer-m", "dense-100m"]
QUICK = ["dnn", "tiny-600", "conformer-s"]
MODEL_HELP = f"default: {', '.join(DEFAULT)}; others: {', '.join(model for model in MODELS if model not in DEFAULT)}"


def main(arguments=None):
    """Returns the exit code: 1 where contenders disagree, 2 where memory is short; nothing is timed then."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    states = max(1, *(len(rule.states) for rule in options.rules))
    shortage = memory.shortage(options.model, memory.available(), states=states)
    if shortage:
        print(f"Nothing was measured. {shortage}. --model names those to measure.", file=sys.stderr)
        return 2
    found = machine.describe(arguments)
    load = found["machine"]["load_before"][0]
    if load > 0.5:
        print(f"Load average {load}: other processes are at work, which all-thread times suffer from.", file=sys.stderr)
    torch.set_num_threads(options.threads[0])
    problems = [Problem(model, MODELS[model]) for model in options.model]
    try:
        found["agreement"] = check(problems, options.rules, options.threads)
    except agreement.Disagreement as error:
        print(f"The contenders disagree, nothing was timed. {error}", file=sys.stderr)
        return 1
    found["cases"] = measure(problems, options.rules, options.threads, options.rounds)
    print(report_cpu.console(found))
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / f"{options.name}.json", options.out / f"{options.name}.png"
    result_file.write(found, written[0])
    from . import plot  # only here: matplotlib is slow to load

    plot.speed_ups(found, written[1])
    print(f"\nWritten: {written[0]}, {written[1]}")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="the smaller models, few rounds")
    parser.add_argument("--model", nargs="+", choices=MODELS, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=["sgd"], help=f"of {', '.join(CASES)}; default: sgd"
    )
    parser.add_argument("--threads", type=thread_counts, default="1,all", help="as in 1,all (the default)")
    parser.add_argument("--rounds", type=int, help="default: 24, or 4 with --quick; half of it for the largest models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    parser.add_argument("--name", default="cpu", help="of the files that are written there; default: %(default)s")
    options = parser.parse_args(arguments)
    options.rules = [rule for case in options.cases for rule in CASES[case]]
    options.model = options.model or (QUICK if options.quick else DEFAULT)
    if options.rounds is None:
        options.rounds = 4 if options.quick else 24
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def thread_counts(text):
    """'1,all' -> [1, 8]."""
    counts = sorted({torch.get_num_threads() if word == "all" else int(word) for word in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return counts


def check(problems, rules, threads):
    """Rows of deviations; raises Disagreement."""
    rows = []
    combinations = list(itertools.product(problems, CLIPS, rules))
    for problem, clip, rule in tqdm(combinations, desc="agreement", unit="case"):
        rows.append(case.agreement_row(problem, clip, rule, threads))
    return rows


def measure(problems, rules, threads, rounds):
    """Rows of all cases."""
    count = {problem.model: max(1, rounds // 2) if problem.numel >= case.LARGE else rounds for problem in problems}
    total = sum(count.values()) * len(CLIPS) * len(rules) * len(threads)
    rows = []
    with tqdm(total=total, desc="timing", unit="round") as progress:
        for problem, clip, rule in itertools.product(problems, CLIPS, rules):
            progress.set_postfix_str(f"{problem.model} {clip} {rule.title}")
            rows += case.measure(problem, clip, rule, threads, count[problem.model], progress.update)
    return rows


if __name__ == "__main__":
    sys.exit(main())
