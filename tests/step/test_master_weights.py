"""Weights that somebody writes to under master weights: the next step undoes it, and says so, once."""

import copy
import math
import warnings

import pytest
import torch

import fastclip
from tests.support.cases import give_grads, make_params


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def model_with_masters(**settings):
    params = make_params([(3, 4), (5,)], torch.bfloat16)
    optimizer = fastclip.AdamW([("weight", params[0]), ("bias", params[1])], lr=0.01, master_weights=True, **settings)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
    return optimizer, params


def test_weights_that_are_loaded_back_under_master_weights_are_told():
    """The master weights undo it, so somebody has to say so: at the next step, once."""
    optimizer, params = model_with_masters()
    with torch.no_grad():
        params[1].copy_(torch.zeros(5))  # as load_state_dict of a model does
    with pytest.warns(UserWarning, match=r"parameter 1 of group 0 \('bias'\) was written to.*master_param") as caught:
        for _ in range(2):
            optimizer.step()
            with torch.no_grad():
                params[1].zero_()
    assert len(caught) == 1 and caught[0].filename == __file__
    torch.testing.assert_close(optimizer.state[params[0]]["master_param"].bfloat16(), params[0].detach())


@pytest.mark.falls_back
@pytest.mark.parametrize("in_plain_torch", [False, True])
@pytest.mark.parametrize("when", ["between steps", "after loading"])
def test_it_is_told_on_every_way(when, in_plain_torch):
    optimizer, params = model_with_masters()
    if when == "after loading":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer, params = model_with_masters()
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p in params:
                p.copy_(optimizer.state[p]["master_param"])
    if in_plain_torch:
        params[0].grad = params[0].grad.t().contiguous().t()
    with torch.no_grad():
        params[1].fill_(3.0)
    with pytest.warns(UserWarning, match=r"\('bias'\) was written to") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__] * len(caught)


def test_the_way_out_that_is_told_works(no_warning):
    optimizer, params = model_with_masters()
    with torch.no_grad():
        for p in params:
            p.fill_(3.0)
            del optimizer.state[p]["master_param"]
    optimizer.step()
    for p in params:
        assert (p.detach().float() - 3).abs().max() < 0.05


@pytest.mark.falls_back
@pytest.mark.parametrize("what", ["nothing", "same values", "copy", "reload", "skip", "plain torch", "other tensors"])
def test_what_does_not_change_a_parameter_is_not_told(what):
    optimizer, params = model_with_masters(skip_nonfinite=True)
    if what == "same values":
        with torch.no_grad():
            params[1].copy_(params[1].clone())
    elif what == "copy":
        optimizer = copy.deepcopy(optimizer)
    elif what == "reload":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == "skip":
        params[0].grad = torch.full_like(params[0], math.nan)
        optimizer.step()
        give_grads(params)
    elif what == "plain torch":
        params[0].grad = params[0].grad.t().contiguous().t()
        optimizer.step()
        give_grads(params)
    elif what == "other tensors":
        optimizer.param_groups[0]["params"][1] = torch.zeros(5, dtype=torch.bfloat16, requires_grad=True)
        optimizer.param_groups[0]["params"][1].grad = torch.ones(5, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*written to.*")
        optimizer.step()
        optimizer.step()


def test_a_warning_that_is_an_error_changes_nothing():
    optimizer, params = model_with_masters()
    with torch.no_grad():
        params[1].zero_()
    before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="written to"):
            optimizer.step()
    assert all(map(torch.equal, before, [t for p in params for t in (p.detach(), *optimizer.state[p].values())]))
