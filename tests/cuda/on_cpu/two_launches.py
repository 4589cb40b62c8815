"""What is measured on a device that can't run all blocks of a launch at once. Run by tests/cuda/test_emulated.py."""

import pytest

import fastclip

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


@pytest.mark.parametrize(
    ("cls", "settings", "launches", "arrays"),
    [
        (fastclip.AdamW, {"max_update_rms": 1.0}, 2, 10),
        (fastclip.AdamW, {"max_update_rms": 1.0, **NORM}, 3, 10),
        (fastclip.LAMB, {}, 3, 12),
        (fastclip.ScaledAdam, {}, 2, 10),
    ],
    ids=["rms", "rms and norm", "LAMB", "ScaledAdam"],
)
def test_another_one_measures_what_is_added_after_a_clip(cls, settings, launches, arrays):
    optimizer, _, numel = stepped(SHAPES, cls=cls, steps=2, **settings)
    counted = emulator.count(optimizer.step)
    assert (counted.launches, counted.cooperative_launches, counted.synchronizations) == (launches, 0, 0)
    assert counted.bytes_read + counted.bytes_written == 4 * arrays * numel
