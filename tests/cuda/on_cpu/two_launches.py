"""A norm on a device that can't run all blocks of a launch at once. Run by tests/cuda/test_emulated.py."""

import pytest

from . import emulator
from .counts import NORM, SHAPES, stepped


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_launch_measures_and_the_next_one_updates(momentum):
    """16 bytes per parameter, 24 with momentum."""
    optimizer, _, numel = stepped(SHAPES, momentum=momentum, **NORM)
    counted = emulator.count(optimizer.step)
    arrays = 6 if momentum else 4
    assert (counted.launches, counted.cooperative_launches, counted.synchronizations) == (2, 0, 0)
    assert counted.bytes_read + counted.bytes_written == 4 * arrays * numel
