"""What torch's optimizers refuse in torch's own optimizer tests, fastclip's refuse with the same words."""

import copy
import math

import pytest
import torch

from tests.support.cases import assert_equal_trees, make_params
from tests.support.torch_optim_db import (
    ADAM,
    ADAMW,
    INPUTS,
    OPTIMIZERS,
    SGD,
    Twins,
    common_optimizers,
    every_clip,
    every_optimizer,
)


def error_inputs(optim, dtype=torch.float32):
    return optim.info.optim_error_inputs_func("cpu", dtype)


ERROR_INPUTS = [
    pytest.param(optim, index, id=f"{optim} {error.optimizer_error_input.desc}")
    for optim in OPTIMIZERS
    for index, error in enumerate(error_inputs(optim))
]


def construct(cls, error_input, **clip):
    """Makes the optimizer; where the error is one of the step, takes a step, too."""
    given = error_input.optimizer_error_input
    params = [torch.zeros(1, 1, requires_grad=True)] if given.params is None else copy.deepcopy(given.params)
    optimizer = cls(params, **given.kwargs, **clip)
    if error_input.error_on == common_optimizers.OptimizerErrorEnum.STEP_ERROR:
        optimizer.step()


@every_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(("optim", "index"), ERROR_INPUTS)
def test_error_inputs(optim, index, dtype, clip):
    """The same error with the same words, and the same warnings."""
    error_input = error_inputs(optim, dtype)[index]
    expects = pytest.warns if issubclass(error_input.error_type, Warning) else pytest.raises
    with expects(error_input.error_type, match=error_input.error_regex):
        construct(optim.torch, error_input)
    with expects(error_input.error_type, match=error_input.error_regex):
        construct(optim.fastclip, error_input, **clip)


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
        ([torch.zeros(1)], {"weight_decay": -1.0}),
        ([torch.zeros(1)], {"lr": -1.0}),
        ([torch.zeros(1)], {"unknown": 1}),
        ([torch.zeros(1), ("name", torch.zeros(1))], {}),
    ],
    ids=repr,
)
@every_optimizer
def test_other_errors_are_of_the_same_type_with_the_same_words(optim, params, kwargs):
    raised = []
    for cls in optim.classes:
        given = [dict(p) if isinstance(p, dict) else p for p in params] if isinstance(params, list) else params
        with pytest.raises(Exception) as error:  # noqa: B017, PT011  torch says which
            cls(given, **kwargs)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    ("optim", "kwargs"),
    [
        (SGD, {"nesterov": True}),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        (ADAM, {"lr": torch.ones(2)}),
        (ADAM, {"eps": -1.0}),
        (ADAM, {"betas": (0.9, 1.0)}),
        (ADAM, {"betas": (-0.1, 0.9)}),
        (ADAM, {"betas": (torch.ones(2), torch.ones(2))}),
        (ADAM, {"betas": (0.9,)}),
        (ADAM, {"betas": 0.9}),
        (ADAMW, {"decoupled_weight_decay": False}),
    ],
    ids=str,
)
def test_settings_of_one_optimizer_are_refused_in_the_same_words(optim, kwargs):
    raised = []
    for cls in optim.classes:
        with pytest.raises(Exception) as error:  # noqa: B017, PT011  torch says which
            cls([torch.zeros(1)], **kwargs)
        raised.append((type(error.value), str(error.value).replace("AdamW.__init__()", "__init__()")))
    assert raised[0] == raised[1]


@every_optimizer
@pytest.mark.parametrize("sizes", [[2], [1, 1, 1], [1, 2]], ids=str)
def test_a_state_dict_of_other_groups_is_refused_and_changes_nothing(sizes, optim):
    twins = Twins(optim, optim.stateful, shapes=[(2,), (3,)])
    twins.step()
    other = optim.fastclip([{"params": make_params([(2,)] * size)} for size in sizes], lr=7.0)
    words = []
    if sizes == [2]:  # as many groups as there are, and as many parameters: taken
        for optimizer in twins.optimizers:
            optimizer.load_state_dict(other.state_dict())
            assert optimizer.param_groups[0]["lr"] == 7.0 and bool(optimizer.state) == optim.has_state_at_once
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
    for optim in OPTIMIZERS:
        given = [p.values[1] for p in INPUTS if p.values[0] is optim]
        assert len(given) >= 5 and len(error_inputs(optim)) >= 7
        assert {"lr", "weight_decay", "maximize"} <= {k for g in given for k in g}
        assert {"foreach", "differentiable"} <= set(optim.info.supported_impls)
        assert all(math.isfinite(g["lr"]) for g in given if "lr" in g)
    assert any(isinstance(p.values[1].get("lr"), torch.Tensor) for p in INPUTS)
