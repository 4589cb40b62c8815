"""Python that runs in the middle of a step, as another thread's may: what was found stays, and nothing crashes."""

import collections
import warnings

import pytest
import torch

import fastclip
from tests.support.threads import Number, param


@pytest.fixture
def run_in_look_up(monkeypatch):
    """run_in_look_up(optimizer, call, meddle): a step, and `meddle` in its look-up number `call` of a tensor's state.

    Such a look-up runs Tensor.__hash__, in Python: for each parameter, and again to make its entry.
    """

    def step(optimizer, call, meddle):
        calls = 0

        def meddling_hash(self):
            nonlocal calls
            if calls == call:
                meddle()
            calls += 1
            return id(self)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__hash__", meddling_hash)
            optimizer.step()
        assert calls > call

    return step


@pytest.mark.parametrize("call", range(6))
def test_gradients_dropped_while_a_state_is_looked_up(call, run_in_look_up):
    params = [param(1000) for _ in range(3)]
    garbage = []

    def drop():
        for p in params:
            p.grad = None
            garbage.extend(torch.full((1000,), 1e9) for _ in range(2))

    run_in_look_up(fastclip.SGD(params, lr=1.0, momentum=0.9), call, drop)
    for index, p in enumerate(params):
        found = index < call  # before it was dropped
        assert torch.equal(p.detach(), torch.full_like(p, -1.0 if found else 0.0))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("call", range(2))
def test_the_state_of_adam_replaced_while_it_is_looked_up(call, stepped, run_in_look_up):
    """What the step has found, or makes, is whole. With gradients of ones every update is of 1, the first or not."""
    params = [param(1000) for _ in range(3)]
    optimizer = fastclip.Adam(params, lr=1.0, betas=(0.5, 0.75), eps=0.0)
    if stepped:
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())  # into another dict: all are looked up again
    garbage = []

    def drop():
        optimizer.state = collections.defaultdict(dict)
        garbage.extend(torch.full((1000,), 1e9) for _ in range(6))

    run_in_look_up(optimizer, call, drop)
    optimizer.step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -2.0 - stepped))


@pytest.mark.parametrize("call", range(6))
def test_parameters_dropped_while_a_state_is_looked_up(call, run_in_look_up):
    optimizer = fastclip.SGD([param(1000) for _ in range(3)], lr=1.0, momentum=0.9)
    params = optimizer.param_groups[0]["params"]
    memory = [p.detach() for p in params]
    run_in_look_up(optimizer, call, params.clear)
    for index, values in enumerate(memory):
        found = index <= call
        assert torch.equal(values, torch.full_like(values, -1.0 if found else 0.0))


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize(
    "settings", [{"master_weights": True}, {"stochastic_rounding": True}], ids=lambda s: next(iter(s))
)
def test_parameters_without_a_state_dropped_while_it_is_looked_up(settings, call, run_in_look_up):
    """Nothing is made of the parameter that could hold it."""
    optimizer = fastclip.SGD([param(1000) for _ in range(3)], lr=1.0, **settings)
    params = optimizer.param_groups[0]["params"]
    memory = [p.detach() for p in params]
    garbage = []

    def drop():
        params.clear()
        garbage.extend(param(1000) for _ in range(6))

    run_in_look_up(optimizer, call, drop)
    for index, values in enumerate(memory):
        found = index <= call
        assert torch.equal(values, torch.full_like(values, -1.0 if found else 0.0))
    assert all(torch.equal(p, torch.zeros(1000)) and p._version == 0 for p in garbage)


# What happens to the groups, and what is left of a step of two groups.
CHANGES = {
    "another list of parameters": (lambda optimizer, group: group.update(params=[]), [-1, -1]),
    "an emptied list of parameters": (lambda optimizer, group: group["params"].clear(), [0, -1]),
    "another number": (lambda optimizer, group: group.update(lr=1.0, clip_value=4.0, max_norm=1e9), [-1, -1]),
    "a checkpoint loaded": (lambda optimizer, group: optimizer.load_state_dict(optimizer.state_dict()), [-1, -1]),
    "no groups": (lambda optimizer, group: optimizer.param_groups.clear(), [-1, 0]),
}


@pytest.mark.parametrize("name", ["lr", "clip_value", "max_norm"])
@pytest.mark.parametrize("change", CHANGES)
def test_groups_changed_while_a_number_is_read(change, name):
    """The step goes on with what it has found, which nobody else may hold any more."""
    meddle, expected = CHANGES[change]
    params = [param(5), param(5)]
    numbers = {"lr": 1.0, "clip_value": 4.0, "max_norm": 1e9}
    optimizer = fastclip.SGD([{"params": [p]} for p in params], **numbers)
    first = optimizer.param_groups[0]
    first[name] = Number(numbers[name], lambda: meddle(optimizer, first))
    optimizer.param_groups[1][name] = Number(numbers[name], lambda: meddle(optimizer, first))
    optimizer.step()
    assert [p[0].item() for p in params] == expected


def test_gradients_dropped_while_a_warning_is_shown(monkeypatch):
    """The memory of a gradient that nobody holds is used again at once."""
    p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=1.0, master_weights=True)
    p.grad = torch.ones(64, dtype=torch.bfloat16)
    optimizer.step()
    with torch.no_grad():
        p.fill_(7)  # the step changes it back, and warns
    others = []

    def drop(*_, **__):
        p.grad = None
        others.extend(torch.full((64,), 100.0, dtype=torch.bfloat16) for _ in range(8))

    monkeypatch.setattr("warnings.showwarning", drop)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        optimizer.step()
    assert others and torch.equal(p.detach(), torch.full((64,), -1.0, dtype=torch.bfloat16))
