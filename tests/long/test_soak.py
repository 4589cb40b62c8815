"""`make soak` in short, and that it notices what it looks for."""

import subprocess
import sys

import pytest

from tests.support.project import ROOT

pytest.importorskip("tqdm")

from . import soak  # noqa: E402  after the check

STEPS = 3000


def soak_in_a_new_process(each_step):
    """Here, memory that earlier tests have given back would hide what grows."""
    code = f"import sys, torch; from tests.long import soak; kept = []; sys.exit(soak.main(sys.argv[1:], {each_step}))"
    command = [sys.executable, "-c", code, "--steps", str(STEPS)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_and_the_bits_are_torchs():
    result = soak_in_a_new_process("lambda training: None")
    assert result.returncode == 0 and "soak: passed, 3000 steps" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_planted_leak_is_found():
    """A leak of 4 KiB per step makes 6 MiB from the second quarter to the last."""
    result = soak_in_a_new_process("lambda training: kept.append(torch.ones(1024))")
    assert result.returncode == 1 and "FAILED" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("what", ["parameter", "momentum", "count", "skipped"])
def test_a_planted_difference_is_found(what, capsys):
    def plant(training):
        if what == "parameter":
            training.ours[2].data[0] += 1e-3
        elif what == "momentum":
            training.optimizer.state[training.ours[1]]["momentum_buffer"].zero_()
        elif what == "count":
            training.adam.state[training.ours[2]]["step"] += 1
        else:
            training.skipped += 1

    assert soak.main(["--steps", str(soak.SAMPLES)], plant) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("samples", "grown"), [([9] * 8, 0), ([50, 1, 1, 2, 3, 3, 7, 8], 6), ([5, 5, 4, 4, 3, 3, 2, 2], -2)]
)
def test_growth_is_that_of_the_medians(samples, grown):
    assert soak.growth_of(samples) == pytest.approx(grown, abs=0.51)
