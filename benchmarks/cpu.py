"""python -m benchmarks cpu: checks that all contenders agree, times them, writes NAME.json and NAME.png."""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .core import agreement, limit, memory, record, rows, timing
from .core.contenders import CLIPS, RULES, Contender
from .core.models import MODELS, count
from .core.problem import Problem
from .report import cpu as report

DEFAULT = ["dnn", "gru-ctc", "tiny-600", "conformer-s", "conformer-m", "dense-100m"]
QUICK = ["dnn", "tiny-600", "conformer-s"]
SAME_STEPS = 1_000_000  # from this number of parameters on, all contenders take the same number of steps per block
MODEL_HELP = f"default: {', '.join(DEFAULT)}; others: {', '.join(model for model in MODELS if model not in DEFAULT)}"


def main(arguments=None):
    """Returns the exit code: 1 where contenders disagree, 2 where memory or a compiler is missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    states = max(1, *(len(rule.states) for rule in options.rules))
    shortage = memory.shortage(options.model, memory.available(), states=states)
    if shortage:
        print(f"Nothing was measured. {shortage}. --model names those to measure.", file=sys.stderr)
        return 2
    found = record.describe(arguments, "python -m benchmarks cpu")
    load = found["machine"]["load_before"][0]
    if load > 0.5:
        print(f"Load average {load}: other processes are at work, which all-thread times suffer from.", file=sys.stderr)
    torch.set_num_threads(options.threads[0])
    is_large = any(count(MODELS[model]) >= rows.LARGE for model in options.model)
    if lack := is_large and limit.lack(max(options.threads)):
        print(f"Nothing was measured: {lack}.", file=sys.stderr)
        return 2
    problems = [Problem(model, MODELS[model]) for model in options.model]
    try:
        found["agreement"] = check(problems, options.rules, options.threads)
    except agreement.Disagreement as error:
        print(f"The contenders disagree, nothing was timed. {error}", file=sys.stderr)
        return 1
    found["cases"] = measure(problems, options.rules, options.threads, options.rounds)
    print(report.console(found))
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / f"{options.name}.json", options.out / f"{options.name}.png"
    record.write(found, written[0])
    report.draw(found, written[1])
    print(f"\nWritten: {written[0]}, {written[1]}")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="the smaller models, few rounds")
    parser.add_argument("--model", nargs="+", choices=MODELS, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--cases", nargs="+", choices=RULES, default=["sgd"], help=f"of {', '.join(RULES)}; default: sgd"
    )
    parser.add_argument("--threads", type=thread_counts, default="1,all", help="as in 1,all (the default)")
    parser.add_argument("--rounds", type=int, help="default: 24, or 4 with --quick; half of it for the largest models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="default: %(default)s")
    parser.add_argument("--name", default="cpu", help="of the files that are written there; default: %(default)s")
    options = parser.parse_args(arguments)
    options.rules = [rule for case in options.cases for rule in RULES[case]]
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
    found = []
    combinations = list(itertools.product(problems, CLIPS, rules))
    for problem, clip, rule in tqdm(combinations, desc="agreement", unit="case"):
        found.append(rows.agreement_row(problem, clip, rule, threads))
    return found


def measure(problems, rules, threads, rounds):
    """Rows of all cases."""
    rounds_of = {problem.model: max(1, rounds // 2) if problem.numel >= rows.LARGE else rounds for problem in problems}
    total = sum(rounds_of.values()) * len(CLIPS) * len(rules) * len(threads)
    found = []
    with tqdm(total=total, desc="timing", unit="round") as progress:
        for problem, clip, rule in itertools.product(problems, CLIPS, rules):
            progress.set_postfix_str(f"{problem.model} {clip} {rule.title}")
            found += timed_rows(problem, clip, rule, threads, rounds_of[problem.model], progress.update)
    return found


def timed_rows(problem, clip, rule, thread_counts, rounds, on_round=None):
    """One row for each number of threads.

    Gradients are not set again between steps: what torch's clip functions leave in them is clipped already, but no
    step's time depends on the values.
    """
    contenders = rows.at_the_start(problem, clip, rule)
    actors = {name: contender.step for name, contender in contenders.items()}
    single_elements = Problem("host", [(1,)] * len(problem.params)).copies["fastclip"]
    actors["host"] = Contender("fastclip", single_elements, CLIPS[clip], rule).step
    if problem.numel >= rows.LARGE:
        actors["limit"] = limit_of(contenders["fastclip"], clip)
    found = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        steps = blocks(actors, problem.numel)
        timers = {name: timing.Timer(step, steps=steps[name]) for name, step in actors.items()}
        row = rows.head(problem, clip, rule) | {"threads": threads, "steps_per_block": steps}
        found.append(row | evaluate(row, timing.rounds(timers, rounds, on_round)))
    rows.require_normal(contenders, row)
    return found


def limit_of(contender, clip):
    """Returns what takes as long as memory takes for a step of a contender."""
    contender.step()  # makes the states
    states = [[contender.optimizer.state[p][name] for name in contender.rule.states] for p in contender.params]
    own = limit.Limit(contender.params, states)
    return own.norm_and_update if clip == "norm" else own.update


def blocks(actors, numel):
    """Steps per block of each actor."""
    steps = {name: timing.steps_per_block(step) for name, step in actors.items()}
    if numel >= SAME_STEPS:
        # The first step of a block meets a cache full of the previous contender's data: the same share for all.
        same = max(count for name, count in steps.items() if name != "host")
        steps = {name: count if name == "host" else same for name, count in steps.items()}
    return steps


def evaluate(row, samples):
    """Times, speed-ups and the part of the limit."""
    own = samples["fastclip"]
    found = {
        "us_per_step": rows.microseconds(samples),
        **rows.speed_ups(samples),
        "host_ns_per_tensor": rows.described(rows.scaled(1e9 / row["tensors"], samples["host"])),
    }
    if "limit" in samples:
        found["bytes_per_parameter"] = rows.least_bytes(row)
        moved = row["parameters"] * found["bytes_per_parameter"]
        found["limit_gb_per_s"] = rows.described([1e-9 * moved / seconds for seconds in samples["limit"]])
        found["of_limit"] = rows.described(timing.ratios(samples["limit"], own))
    return found
