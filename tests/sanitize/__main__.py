"""python -m tests.sanitize: the C++ under GCC's sanitizers, and the tests that run most of it under each.

First address together with undefined behaviour, then thread. Before the tests run, bugs are planted into the C++ and
have to be found. Logs and reports are in build/sanitize; the exit code is 1 where anything else was found.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.support.project import ROOT

from .build import SANITIZERS, run
from .planted import BUGS, plant

# What runs most of the C++: all kinds of steps, errors and their cleaning up, other threads and processes.
TESTS = {
    "address": [
        "step/test_step.py",
        "step/test_norm.py",
        "step/test_clip_grad.py",
        "step/test_skip_nonfinite.py",
        "step/test_errors.py",
        "step/test_atomic_failure.py",
        "step/test_freed_memory.py",
        "step/test_layouts.py",
        "step/test_numbers.py",
        "step/test_between_steps.py",
        "step/test_not_covered.py",
        "step/test_clip_stats.py",
        "step/test_norm_scope.py",
        "step/test_novograd.py",
        "step/test_scaled_adam.py",
        "drop_in/test_amp.py",
        "concurrency/test_threads.py",
        "concurrency/test_meanwhile.py",
        "concurrency/test_processes.py",
        "drop_in/test_drop_in.py",
        "cuda/test_devices.py",
        "step/test_properties.py",
        "package/test_build.py::test_every_instruction_set_gives_the_same_bits",
    ],
    # Tests that step with several threads. Without test_processes.py: ThreadSanitizer loses count of the threads that a
    # forked child makes ("dup thread with used id").
    "thread": [
        "concurrency/test_threads.py",
        "concurrency/test_meanwhile.py",
        "step/test_norm.py",
        "step/test_step.py",
        "step/test_clip_grad.py",
        "step/test_layouts.py",
        "step/test_between_steps.py",
        "step/test_clip_stats.py",
    ],
}
LINES_OF_A_REPORT = 40
LINE_OF_DOTS = r"^[.sxXFE]+ +\[ *\d+%\]$"  # pytest's progress


@dataclass
class Row:
    sanitizer: str
    what: str
    result: str
    good: bool
    seconds: float

    def __str__(self):
        return f"{self.sanitizer:8} {self.what:46} {self.result:34} {self.seconds:4.0f} s"


def main(arguments=None):
    """Returns the exit code: 1 where anything was found, 2 where nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--only", choices=list(TESTS), help="default: both")
    options = parser.parse_args(arguments)
    chosen = [sanitizer for sanitizer in SANITIZERS if options.only in (None, sanitizer.name)]
    reasons = {sanitizer.why_not(): None for sanitizer in chosen}
    if any(reasons):
        print(*(f"sanitize: {reason}" for reason in reasons if reason), sep="\n")
        return 2
    start = time.monotonic()
    rows = [row for sanitizer in chosen for row in check(sanitizer)]
    failed = [row for row in rows if not row.good]
    print("", *rows, sep="\n")
    print(f"sanitize: {'FAILED' if failed else 'passed'} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def check(sanitizer):
    """The build, the planted bugs, the tests; stops at the first that is not as it should be. Returns their rows."""
    sanitizer.folder.mkdir(parents=True, exist_ok=True)
    rows = [timed(sanitizer, f"build with -fsanitize={sanitizer.kinds}", build)]
    if rows[-1].good:
        bugs = [bug for bug in BUGS if bug.sanitizer == sanitizer.name]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count()))) as pool:
            rows += pool.map(lambda bug: timed(sanitizer, f"planted: {bug.name}", find, bug), bugs)
    if all(row.good for row in rows):  # else the tests would show nothing
        rows.append(timed(sanitizer, "tests", run_tests))
    return rows


def timed(sanitizer, what, work, *arguments):
    print(f"{sanitizer.name}: {what} ...", flush=True)
    start = time.monotonic()
    try:
        result, good = work(sanitizer, *arguments)
    except subprocess.CalledProcessError as error:
        result, good = f"{error.cmd[0]} failed, see the log", False
    row = Row(sanitizer.name, what, result, good, time.monotonic() - start)
    print(row, flush=True)
    return row


def build(sanitizer):
    log = sanitizer.folder / "build.log"
    log.unlink(missing_ok=True)
    sanitizer.build(log)
    return "done", True


def find(sanitizer, bug):
    """Whether the sanitizer reports a planted bug."""
    folder = sanitizer.folder / "planted" / re.sub(r"\W+", "-", bug.name)
    plant(bug, sanitizer, folder)
    run_pytest(sanitizer, folder, [bug.test], folder, halt=1)
    found = any(re.search(bug.report, report) for report in reports_in(folder).values())
    return ("found" if found else f"NOT FOUND, see {folder.relative_to(ROOT)}"), found


def run_tests(sanitizer):
    tests = [f"tests/{name}" for name in TESTS[sanitizer.name]]
    log = run_pytest(sanitizer, sanitizer.project, tests, sanitizer.folder, show=LINE_OF_DOTS)
    reports = reports_in(sanitizer.folder)
    for file, text in reports.items():
        print(f"\n{file.relative_to(ROOT)}:", *text.splitlines()[:LINES_OF_A_REPORT], sep="\n")
    if reports:
        return f"{len(reports)} REPORTS", False
    text = log.read_text()
    summaries = re.findall(r"^(?:\d+ \w+, )*\d+ \w+ in .*$", text, re.M)  # "7 passed, 2 skipped in 1 s"
    passed = re.search(r"(\d+) passed", summaries[-1]) if summaries else None
    if not passed or re.search("failed|error", summaries[-1]):
        print(*text.splitlines()[-LINES_OF_A_REPORT:], sep="\n")
        return f"FAILED, see {log.relative_to(ROOT)}", False
    return f"no report in {passed[1]} tests", True


def run_pytest(sanitizer, project, tests, folder, show=None, halt=0):
    """Runs `tests` on the fastclip in `project`, and leaves reports in `folder`. Returns its log.

    `halt`: at the first data race; the other sanitizers always do.
    """
    log = folder / "tests.log"
    for old in (log, *folder.glob("report.*")):
        old.unlink(missing_ok=True)
    plugins = [f"-p{name}" for name in ("no:cacheprovider", "no:faulthandler", *sanitizer.plugins)]
    # What is undefined is reported to stderr only, past Python's own.
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-mnot cuda", *plugins, *tests]
    run(command, log, show, check=False, cwd=project, env=sanitizer.environment(project, folder / "report", halt))
    return log


def reports_in(folder):
    """What the sanitizer has said, by the file where it is."""
    reports = {file: file.read_text(errors="replace") for file in sorted(folder.glob("report.*"))}
    log = folder / "tests.log"
    undefined = re.search(r"^.*: runtime error: [\s\S]*", log.read_text(), re.M)
    return {**reports, log: undefined[0]} if undefined else reports


if __name__ == "__main__":
    sys.exit(main())
