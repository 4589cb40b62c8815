"""Norm clips in the backward pass: each parameter's own, by a number or by its past norms."""

import math
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from tests.support.in_backward_cases import assert_same, groups, losses, net

RULES = {
    "number": 0.05,
    "measured": math.inf,
    "quantile": fastclip.QuantileNorm(0.5, scale=0.9, window=5, warmup=2),
    "ema": fastclip.EmaNorm(z=0.5, decay=0.8, warmup=2),
}


def settings(limit, **others):
    """A rule implies skip_nonfinite, which needs all gradients."""
    return {"max_norm": RULES[limit], "norm_scope": "parameter", "skip_nonfinite": False, **others}


@pytest.mark.parametrize("bucket_cap_mb", [0, 1e-3, 4])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("limit", RULES)
def test_same_bits_as_ordinary_steps(limit, optimizer, norm_type, bucket_cap_mb):
    """Parameters, states and histories; and the statistics of the pass are those of the step."""
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    models = [net(), net()]
    cls = getattr(fastclip, optimizer)
    ordinary, stepped = [(m, cls(groups(m), lr=0.1, **settings(limit, norm_type=norm_type), **more)) for m in models]
    fastclip.step_in_backward(*stepped, bucket_cap_mb=bucket_cap_mb)
    for loss in losses(6):
        for model in (ordinary[0], stepped[0]):
            loss(model).backward()
        ordinary[1].step()
        ordinary[1].zero_grad()
        assert_same(ordinary, stepped)
        expected, found = ordinary[1].clip_stats(), stepped[1].clip_stats()
        torch.testing.assert_close(found.total_norm, expected.total_norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(stepped[1].total_norm, expected.total_norm, rtol=1e-12, atol=0)
        assert found.clip_coefficient == expected.clip_coefficient
    assert limit == "measured" or expected.clip_coefficient < 1


def test_norms_by_parameter_are_of_one_step():
    model = net()
    optimizer = fastclip.SGD(model.parameters(), lr=0.1, max_norm=1.0, norm_scope="parameter")
    with fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0):
        next(iter(losses(1)))(model).backward()
        with pytest.raises(RuntimeError, match="the backward pass took several steps"):
            optimizer.norms_by_parameter()
    with fastclip.step_in_backward(model, optimizer, bucket_cap_mb=math.inf):
        next(iter(losses(1)))(model).backward()
        assert (optimizer.norms_by_parameter()[1] > 0).all()


def test_what_it_refuses():
    model = net()
    for limits, message in [
        ({"max_norm": 1.0}, "the max_norm of .*: the norm is that of several gradients"),
        ({"max_norm": 1.0, "norm_scope": "group"}, "the max_norm of .*: the norm is that of several gradients"),
        ({"max_norm": 1.0, "norm_scope": "parameter", "skip_norm": 5.0}, "the skip_norm of"),
        ({"max_norm": "ema", "norm_scope": "parameter"}, "a rule implies it, if you do not set it to False"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastclip.step_in_backward(model, fastclip.SGD(model.parameters(), lr=0.1, **limits))


def test_a_pass_in_plain_torch_leaves_no_states_behind():
    """Parameters that wait for their step stand as empty tensors among the others."""
    model = net()
    optimizer = fastclip.AdamW(model.parameters(), lr=0.1, **settings("ema"))
    with (
        fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0),
        FlopCounterMode(display=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        next(iter(losses(1)))(model).backward()
    assert len(optimizer.state_dict()["state"]) == len([*model.parameters()])
