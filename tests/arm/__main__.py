"""python -m tests.arm: builds fastclip for aarch64, and runs the tests of the step there, in emulation.

1. The bits of all rules, dtypes and clips have to be those of this machine, on which fastclip is built as usual.
2. A build with -ffp-contract=fast, which fuses what the code does not, has to have others: so the first can fail.
3. The tests of the step, of the norm and of plans in C pass.

Needs apt, a compiler for aarch64, and qemu-user; where they are not there, says so and exits with 77. Speed is not
measured.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.support.project import ROOT

from .build import build, build_planted, make_wheel
from .machine import Machine, Unavailable

SKIPPED = 77  # as automake has it
TESTS = ["tests/step/test_step.py", "tests/step/test_norm.py", "tests/c/test_plan.py"]
PLANTED = ("baseline.cpp", "AdamW")  # a source to compile with -ffp-contract=fast, and a rule whose bits that changes


def digest(command, cwd=ROOT):
    """Returns the instruction set, and {rule: its digest}."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the digest failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    capability, *lines = done.stdout.splitlines()
    return capability, dict(line.split() for line in lines)


def test(machine, file):
    """Returns whether the tests of a file pass, and pytest's last line."""
    # importlib: pytest would put the project, and its folder fastclip, first in the path.
    options = ["-p", "no:cacheprovider", "-q", "-o", "addopts=--strict-markers", "--import-mode=importlib"]
    done = subprocess.run(machine.command("-m", "pytest", *options, file), cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines() or [done.stderr[-2000:]]
    return done.returncode == 0, "\n".join(lines[-40:] if done.returncode else lines[-1:])


def main():
    parser = argparse.ArgumentParser("python -m tests.arm", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "arm", help="what is fetched and built")
    parser.add_argument("--required", action="store_true", help="fail where it can't run, in place of a skip")
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="make a wheel there, and try that")
    options = parser.parse_args()
    began = time.perf_counter()

    def say(text):
        print(f"{time.perf_counter() - began:4.0f} s  {text}", flush=True)

    options.folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(options.folder.resolve(), torch.__version__.partition("+")[0])
    try:
        machine.make(say)
    except Unavailable as error:
        print(f"{'failed' if options.required else 'skipped'}: {error}")
        return 1 if options.required else SKIPPED
    objects = machine.folder / "objects"
    if options.wheel:
        say("a wheel, by a compiler for aarch64")
        say(make_wheel(machine, machine.package, objects, options.wheel.resolve()))
    else:
        say("fastclip, by a compiler for aarch64")
        build(machine, machine.package, objects)
    planted = machine.folder / "planted"
    source, rule = PLANTED
    size = build_planted(machine, planted, objects, source, "-ffp-contract=fast")
    say(f"libfastclip.so, all rules: {size / 1e3:.0f} KB")
    failed = False
    with ThreadPoolExecutor(2) as pool:
        say("the bits of all rules, here and there")
        here = pool.submit(digest, [sys.executable, "-m", "tests.support.digest"])
        there = pool.submit(digest, machine.command("-m", "tests.support.digest"))
        other = pool.submit(digest, machine.command("-m", "tests.support.digest", rule, package=planted))
        (capability, expected), (arm, found), (_, changed) = here.result(), there.result(), other.result()
        say(f"{capability} here, {arm} there: {'the same bits' if found == expected else 'DIFFERENT BITS'}")
        for name in expected:
            if found.get(name) != expected[name]:
                print(f"        {name}: {expected[name]} here, {found.get(name)} there")
        failed |= found != expected or arm != "NEON"
        if changed[rule] == expected[rule]:
            say("a build with fused arithmetic was NOT FOUND")
            failed = True
        else:
            say("a build with fused arithmetic has other bits, as it should")
        for file, (passed, last) in zip(TESTS, pool.map(lambda file: test(machine, file), TESTS), strict=True):
            say(f"{file}: {last}")
            failed |= not passed
    say("FAILED" if failed else "all as it should be")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
