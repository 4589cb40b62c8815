"""`make soak` in short, and that it notices what it looks for."""

import sys

import pytest
import torch

from . import soak

STEPS = 3000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_and_the_bits_are_torchs(capsys):
    assert soak.main(["--steps", str(STEPS)]) == 0
    assert "soak: passed, 3000 steps" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_planted_leak_is_found(capsys):
    """Of 4 KiB per step: 6 MiB from the second quarter to the last."""
    leak = []
    assert soak.main(["--steps", str(STEPS)], lambda training: leak.append(torch.zeros(1024))) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["parameter", "momentum", "skipped"])
def test_a_planted_difference_is_found(what, capsys):
    def plant(training):
        if what == "parameter":
            training.ours[2].data[0] += 1e-3
        elif what == "momentum":
            training.optimizer.state[training.ours[2]]["momentum_buffer"].zero_()
        else:
            training.skipped += 1

    assert soak.main(["--steps", str(soak.SAMPLES)], plant) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("samples", "grown"), [([9] * 8, 0), ([50, 1, 1, 2, 3, 3, 7, 8], 6), ([5, 5, 4, 4, 3, 3, 2, 2], -2)]
)
def test_growth_is_that_of_the_medians(samples, grown):
    assert soak.growth_of(samples) == pytest.approx(grown, abs=0.51)
