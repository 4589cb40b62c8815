"""Bad input: a clear error that names the thing, and nothing is changed."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits, give_grads, make_params, pair, param

NAN = math.nan


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"clip_value": -0.1}, ValueError, ["clip_value", "-0.1"]),
        ({"clip_value": NAN}, ValueError, ["clip_value", "nan"]),
        ({"clip_value": (0.2, 0.1)}, ValueError, ["clip_value", "low <= high", "(0.2, 0.1)"]),
        ({"clip_value": (0.2, NAN)}, ValueError, ["clip_value", "nan"]),
        ({"clip_value": (1, 2, 3)}, ValueError, ["clip_value", "(1, 2, 3)"]),
        ({"clip_value": "0.1"}, TypeError, ["clip_value", "'0.1'", "write 0.1"]),
        ({"max_norm": -1}, ValueError, ["max_norm", "-1"]),
        ({"max_norm": NAN}, ValueError, ["max_norm", "nan"]),
        ({"max_norm": [1]}, TypeError, ["max_norm", "[1]", "list"]),
        ({"max_norm": 1.0, "norm_type": 3}, ValueError, ["norm_type", "3"]),
        ({"max_norm": 1.0, "norm_type": "two"}, TypeError, ["norm_type", "'two'"]),
        ({"norm_type": 3}, ValueError, ["norm_type", "3"]),
        ({"lr": NAN}, ValueError, ["lr", "NaN"]),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, ["lr", "1-element"]),
        ({"lr": -1.0}, ValueError, ["learning rate", "-1.0"]),
        ({"momentum": NAN}, ValueError, ["momentum", "NaN"]),
        ({"momentum": -1.0}, ValueError, ["momentum", "-1.0"]),
        ({"weight_decay": NAN}, ValueError, ["weight_decay", "NaN"]),
        ({"dampening": "much"}, TypeError, ["dampening", "'much'", "str"]),
        ({"dampening": NAN}, ValueError, ["dampening", "NaN"]),
        ({"nesterov": True}, ValueError, ["Nesterov"]),
        ({"fused": True, "foreach": True}, RuntimeError, ["fused", "foreach"]),
    ],
)
def test_bad_arguments_are_refused_at_construction(settings, error, words):
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(error) as raised:
        fastclip.SGD([p], **{"lr": 0.1, **settings})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        (iter([]), ValueError, "empty parameter list"),  # a generator that was read before
        (torch.zeros(2), TypeError, "iterable"),
        ([1], TypeError, "Tensors"),
        ([{"params": [torch.zeros(2)], "clip_value": -1}], ValueError, r"clip_value in param_groups\[0\]"),
        (
            [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2)], "max_norm": 3.0}],
            ValueError,
            "max_norm.*all groups",
        ),
    ],
)
def test_bad_parameters_are_refused(params, error, words):
    with pytest.raises(error, match=words):
        fastclip.SGD(params, lr=0.1)


def test_a_parameter_in_two_groups_is_refused():
    p, _ = make_params([(2,), (3,)])
    opt = fastclip.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


def broken_shape(p):
    p.grad.data = torch.ones(7)


def broken_dtype(p):
    p.grad.data = torch.ones(3, dtype=torch.float64)


def resized_parameter(p):
    p.data = torch.ones(5)


def nan_threshold(p, opt):
    opt.param_groups[0]["clip_value"] = NAN


def negative_threshold(p, opt):
    opt.param_groups[0]["max_norm"] = -1.0


def nan_lr(p, opt):
    opt.param_groups[0]["lr"] = NAN


def missing_key(p, opt):
    del opt.param_groups[0]["momentum"]


def other_norm_in_a_group(p, opt):
    opt.param_groups[1]["max_norm"] = 17.0


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (broken_shape, ValueError, r"gradient of parameter 1 of group 1 \('b'\) has another shape.*\[7\].*\[3\]"),
        (broken_dtype, ValueError, r"gradient of parameter 1 of group 1 \('b'\) has another dtype.*float64.*float32"),
        (resized_parameter, ValueError, r"parameter 1 of group 1 \('b'\) has another shape"),
        (nan_threshold, ValueError, r"clip_value in param_groups\[0\].*nan"),
        (negative_threshold, ValueError, r"max_norm in param_groups\[0\].*-1"),
        (nan_lr, ValueError, r"lr in param_groups\[0\] is NaN"),
        (missing_key, KeyError, r"momentum in param_groups\[0\] is missing"),
        (other_norm_in_a_group, ValueError, r"max_norm must be the same in all groups: .*param_groups\[1\]"),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_step_that_raises_has_changed_nothing(broken, error, words, stepped):
    first, a, b = make_params([(4,), (2,), (3,)])
    opt = fastclip.SGD(
        [{"params": [("first", first)]}, {"params": [("a", a), ("b", b)]}], lr=0.1, momentum=0.9, clip_value=0.5
    )
    params = [first, a, b]
    for p in params:
        p.grad = torch.ones_like(p)
    if stepped:
        opt.step()
    broken(b, opt) if broken.__code__.co_argcount == 2 else broken(b)
    before = [p.detach().clone() for p in params]
    versions = [p._version for p in params]
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in params] if stepped else []
    with pytest.raises(error, match=words):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [p._version for p in params] == versions
    assert len(opt.state) == len(buffers)
    assert all(
        torch.equal(opt.state[p]["momentum_buffer"], c) for p, c in zip(params[: len(buffers)], buffers, strict=True)
    )
    assert first.grad is not None and torch.equal(first.grad, torch.ones(4))


def test_inference_state_and_parameters_are_refused_outside():
    p = torch.ones(3, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    with torch.inference_mode():
        buffer = torch.zeros(3)
    opt.state[p]["momentum_buffer"] = buffer
    with pytest.raises(RuntimeError, match="InferenceMode"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_an_interrupted_first_step_leaves_no_momentum_buffers(monkeypatch):
    """Making state entries runs Tensor.__hash__, in Python, where Ctrl-C can arrive."""
    loop, theirs, optimizer, ours = pair([(5,)] * 20, momentum=0.9)
    calls = iter(range(1000))

    def interrupted(self):
        if next(calls) == 30:
            raise KeyboardInterrupt
        return id(self)

    give_grads(theirs, ours)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__hash__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert not any(optimizer.state.values())
    for _ in range(2):
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_state_that_makes_no_entries():
    a, b = param(5), param(2)
    optimizer = fastclip.SGD([a, b], lr=0.1, momentum=0.9)
    optimizer.state = {a: {}}
    with pytest.raises(KeyError):
        optimizer.step()
    assert optimizer.state == {a: {}} and torch.equal(a.detach(), torch.zeros(5))


def test_a_momentum_buffer_of_another_shape_is_refused_before_anything_changes():
    a, b = param(2), param(3)
    optimizer = fastclip.SGD([a, b], lr=0.1, momentum=0.9)
    optimizer.step()
    b.data, b.grad = torch.zeros(5), None
    b.grad = torch.ones(5)
    before = a.detach().clone()
    with pytest.raises(ValueError, match="momentum_buffer of parameter 1 of group 0 has another shape"):
        optimizer.step()
    assert torch.equal(a, before)


def test_numbers_that_change_their_list_or_their_parameter():
    class Number:
        def __float__(self):
            values.clear()
            a.grad = None
            a.data = torch.zeros(2)
            return -1.0

    a = param(4)
    values = [Number(), float("0.12345")]
    optimizer = fastclip.SGD([{"params": [a]}, {"params": [param(3)]}], lr=0.1)
    optimizer.param_groups[1]["clip_value"] = values
    optimizer.step()
    assert torch.equal(a.detach(), torch.zeros(2))


@pytest.mark.parametrize("how", ["data", "grad", "assignment"])
def test_torch_itself_refuses_gradients_on_another_device(how):
    """So a step never sees one: all three ways to give one raise."""
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    elsewhere = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError):
        if how == "data":
            p.data = elsewhere
        elif how == "grad":
            p.grad.data = elsewhere
        else:
            p.grad = elsewhere
