"""Tensors without values: on meta, fake ones, and traced operations. Estimators of memory step on such models."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastclip
from tests.support.cases import exact_square_roots

pytestmark = pytest.mark.falls_back
RULES = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"amsgrad": True}, "AdamW": {}}
OWN = {
    "no clip": {},
    "value": {"clip_value": 0.5},
    "norm": {"max_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "value, norm, skip": {"clip_value": 0.5, "max_norm": 1.0, "skip_nonfinite": True},
}
every_rule = pytest.mark.parametrize("rule", RULES)
every_clip = pytest.mark.parametrize("own", OWN)


def two_steps(make, params):
    optimizer = make(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return {name: (value.shape, value.dtype) for p in params for name, value in optimizer.state[p].items()}


@every_rule
@every_clip
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_states_are_those_of_torch(rule, own, kind):
    def steps(module, **settings):
        with FakeTensorMode() if kind == "fake" else torch.device("meta"):
            params = [torch.ones(3, 4, requires_grad=True), torch.ones(5, requires_grad=True)]
            return two_steps(lambda p: getattr(module, rule)(p, lr=0.1, **RULES[rule], **settings), params)

    assert steps(fastclip, **OWN[own]) == steps(torch.optim)


@every_rule
@every_clip
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_first_step_is_traced(rule, own, mode):
    """The graph computes what the step would: a clip is part of it, a verdict on values that are not there is not."""

    def step(weight, grad):
        p = weight.clone().requires_grad_()
        p.grad = grad.clone()
        getattr(fastclip, rule)([p], lr=0.1, **RULES[rule], **OWN[own]).step()
        return p.detach()

    traced = make_fx(step, tracing_mode=mode)(torch.ones(3), torch.ones(3))
    weight, grad = torch.randn(3), torch.tensor([0.2, -3.0, 0.7])
    with exact_square_roots():
        torch.testing.assert_close(traced(weight, grad), step(weight, grad), rtol=1e-6, atol=1e-7)


def test_what_a_step_leaves_has_no_values_either():
    p = torch.ones(3, device="meta", requires_grad=True)
    p.grad = torch.ones(3, device="meta")
    optimizer = fastclip.SGD([p], lr=0.1, clip_value=0.5, max_norm=1.0, skip_nonfinite=True, max_relative_change=0.03)
    optimizer.param_groups[0]["skip_norm"] = 9.0
    optimizer.step()
    assert {
        value.device.type for value in (*optimizer.clip_stats(), optimizer.total_norm, optimizer.skipped_steps)
    } == {"meta"}


@pytest.mark.parametrize("cls", [fastclip.SGD, torch.optim.SGD])
def test_fused_is_refused_on_meta_as_in_torch(cls):
    p = torch.ones(3, device="meta", requires_grad=True)
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of supported"
    ):
        cls([p], lr=0.1, fused=True).step()
