"""What torch.optim.SGD refuses in torch's own optimizer tests, fastclip.SGD refuses with the same words."""

import copy
import math

import pytest
import torch

import fastclip

from .cases import make_params
from .torch_optim_db import (
    INFO,
    INPUTS,
    Twins,
    assert_equal_trees,
    common_optimizers,
    every_clip,
)


def error_inputs(dtype=torch.float32):
    return INFO.optim_error_inputs_func("cpu", dtype)


def construct(cls, error_input, **clip):
    """Makes the optimizer; where the error is one of the step, takes a step, too."""
    given = error_input.optimizer_error_input
    params = [torch.zeros(1, 1, requires_grad=True)] if given.params is None else copy.deepcopy(given.params)
    optimizer = cls(params, **given.kwargs, **clip)
    if error_input.error_on == common_optimizers.OptimizerErrorEnum.STEP_ERROR:
        optimizer.step()


@every_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "index", range(len(error_inputs())), ids=[e.optimizer_error_input.desc for e in error_inputs()]
)
def test_error_inputs(index, dtype, clip):
    """The same error with the same words, and the same warnings; duplicates are an error where torch warns."""
    error_input = error_inputs(dtype)[index]
    expects = pytest.warns if issubclass(error_input.error_type, Warning) else pytest.raises
    with expects(error_input.error_type, match=error_input.error_regex):
        construct(torch.optim.SGD, error_input)
    if "duplicate parameters" in error_input.error_regex:
        with pytest.raises(ValueError, match="same parameter twice"):
            construct(fastclip.SGD, error_input, **clip)
    else:
        with expects(error_input.error_type, match=error_input.error_regex):
            construct(fastclip.SGD, error_input, **clip)


@pytest.mark.parametrize(
    ("params", "kwargs"),
    [
        ([], {}),
        ([3], {}),
        (3, {}),
        ([{"lr": 0.1}], {}),
        ([{"params": 3}], {}),
        ([{"params": {torch.zeros(1)}}], {}),
        ([torch.zeros(1, requires_grad=True) * 2], {}),
        ([torch.zeros(1)], {"foreach": True, "fused": True}),
        ([torch.zeros(1)], {"differentiable": True, "fused": True}),
        ([torch.zeros(1)], {"nesterov": True}),
        ([torch.zeros(1)], {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ([torch.zeros(1)], {"weight_decay": -1.0}),
        ([torch.zeros(1)], {"lr": -1.0}),
        ([torch.zeros(1)], {"unknown": 1}),
        ([torch.zeros(1), ("name", torch.zeros(1))], {}),
    ],
    ids=repr,
)
def test_other_errors_are_of_the_same_type_with_the_same_words(params, kwargs):
    raised = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        given = [dict(p) if isinstance(p, dict) else p for p in params] if isinstance(params, list) else params
        with pytest.raises(Exception) as error:  # noqa: B017, PT011  torch says which
            cls(given, **kwargs)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("sizes", [[2], [1, 1, 1], [1, 2]], ids=str)
def test_a_state_dict_of_other_groups_is_refused_and_changes_nothing(sizes):
    twins = Twins({"momentum": 0.9, "lr": 0.1}, shapes=[(2,), (3,)])
    twins.step()
    other = fastclip.SGD([{"params": make_params([(2,)] * size)} for size in sizes], lr=7.0)
    words = []
    if sizes == [2]:  # as many groups as there are, and as many parameters: taken
        for optimizer in twins.optimizers:
            optimizer.load_state_dict(other.state_dict())
            assert optimizer.param_groups[0]["lr"] == 7.0 and not optimizer.state
        return
    before = copy.deepcopy(twins.fastclip.state_dict())
    for optimizer in twins.optimizers:
        with pytest.raises(ValueError, match="loaded state dict") as error:
            optimizer.load_state_dict(other.state_dict())
        words.append(str(error.value))
    assert words[0] == words[1]
    assert_equal_trees(before, twins.fastclip.state_dict())
    twins.step(2)
    twins.check()


def test_the_inputs_are_torchs_and_cover_the_rule():
    """Guards the parametrisation: an empty list would make all tests above pass."""
    given = [p.values[0] for p in INPUTS]
    assert len(given) >= 9 and len(error_inputs()) >= 7
    assert {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"} <= {k for g in given for k in g}
    assert {"foreach", "fused", "differentiable"} <= set(INFO.supported_impls)
    assert all(math.isfinite(g["lr"]) for g in given if "lr" in g)
    assert any(isinstance(g.get("lr"), torch.Tensor) for g in given)
