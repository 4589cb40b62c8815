"""python -m tests.long.fuzz: random optimizers, tensors and steps against the plain loop, for as long as you like.

The scenarios are those of tests/step/test_properties.py, with other seeds. A failing one is shrunk and printed; the
same command with the printed seed finds it again.
"""

import argparse
import secrets
import sys
import time
import traceback

from hypothesis import given, seed, settings
from tqdm import tqdm

from tests.support import limit_scenarios, scenarios
from tests.support.playback import check


def main(arguments=None):
    """Returns the exit code: 1 where a scenario differs."""
    profile = settings.get_profile("fuzz")
    parser = argparse.ArgumentParser(prog="python -m tests.long.fuzz", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--examples", type=int, default=profile.max_examples, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument(
        "--limits", action="store_true", help="limits on norms and changes instead, against plain torch"
    )
    options = parser.parse_args(arguments)
    drawn, look = (
        (limit_scenarios.scenarios(), limit_scenarios.check) if options.limits else (scenarios.scenarios(), check)
    )
    chosen = secrets.randbelow(2**32) if options.seed is None else options.seed
    again = f"python -m tests.long.fuzz --examples {options.examples} --seed {chosen}{' --limits' * options.limits}"
    print(f"fuzz: {options.examples} examples, seed {chosen}", flush=True)
    start, steps = time.monotonic(), 0
    with tqdm(total=options.examples, unit=" examples", mininterval=0.5) as progress:

        @seed(chosen)
        @settings(profile, max_examples=options.examples)
        @given(drawn)
        def run(scenario):
            nonlocal steps
            progress.update()
            look(scenario)
            steps += len(scenario.steps)

        try:
            run()
        except Exception:
            progress.close()
            traceback.print_exc()
            print(f"fuzz: FAILED, the smallest example is above. Again: {again}", flush=True)
            return 1
    seconds = time.monotonic() - start
    print(f"fuzz: passed, {progress.n} examples, {steps} steps in {seconds:.0f} s. Again: {again}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
