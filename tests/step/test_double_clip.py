"""A clip in front of the optimizer's own one: said once."""

import math
import warnings

import pytest
import torch

import fastclip
from tests.support.cases import give_grads, make_params


def norms_warned_of(settings, before=None, steps=45, scale=lambda step: 1 + 0.1 * step):
    """Takes steps with random gradients; returns what was warned of, and after how many steps."""
    params = make_params([(40,), (7, 3)])
    optimizer = fastclip.SGD(params, lr=1e-3, **settings)
    said = []
    for step in range(1, steps + 1):
        give_grads(params, scale=scale(step))
        if before is not None:
            torch.nn.utils.clip_grad_norm_(params, before)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        said += [(step, str(warning.message)) for warning in found]
    return said


@pytest.mark.parametrize("setting", ["max_norm", "skip_norm", "max_relative_change"])
def test_a_clip_before_the_optimizers_own_is_said_once(setting):
    ((step, words),) = norms_warned_of({setting: 9.0}, before=1.0)
    assert step == 20
    for part in (
        f"before the optimizer's {setting} does",
        "or they never change",
        "total_norm was 1 in each of the last 20 steps",
        "grad_clip",
    ):
        assert part in words


def test_it_need_not_act_from_the_first_step_on():
    ((step, _),) = norms_warned_of({"max_norm": 9.0}, before=10.0, scale=lambda step: 1.0 if step < 10 else 100.0)
    assert step == 29


@pytest.mark.parametrize(
    ("settings", "before"),
    [({"max_norm": 1.0}, None), ({"max_norm": 1.0}, 1e6), ({}, 1.0), ({"clip_value": 0.1}, 1.0)],
    ids=str,
)
def test_says_nothing_where_there_is_one_clip(settings, before):
    assert norms_warned_of(settings, before) == []


def test_says_nothing_of_norms_that_are_zero_or_not_finite():
    assert norms_warned_of({"max_norm": 1.0}, scale=lambda _: 0.0) == []
    assert norms_warned_of({"max_norm": 1.0}, scale=lambda _: math.inf) == []


def test_stops_looking():
    optimizer = fastclip.SGD(params := make_params([(5,)]), lr=1e-3, max_norm=1.0)
    for step in range(100):
        assert optimizer._double_clip is not None
        give_grads(params, scale=1 + step % 7)
        optimizer.step()
    assert optimizer._double_clip is None
