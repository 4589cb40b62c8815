"""The forms in which numbers and pairs come: of YAML and configuration libraries, of numpy, as tensors."""

import decimal
import fractions
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits, copy_params, give_grads, make_params

falls_back = pytest.mark.falls_back


class ConfigList(Sequence):
    """As OmegaConf's ListConfig: a sequence that is no list."""

    def __init__(self, items):
        self.items = list(items)

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


def float_only(number):
    """A number of a class of its own, which knows nothing but its float."""
    return type("Number", (), {"__float__": lambda self: number, "__repr__": lambda self: repr(number)})()


NUMBERS = {
    "numpy float64": np.float64,
    "numpy float32": lambda x: np.float32(x),
    "array of no dimensions": np.array,
    "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "Fraction": fractions.Fraction,
    "Decimal": decimal.Decimal,
    "a class of its own": float_only,
}
PAIRS = {
    "tuple": tuple,
    "list": list,
    "array": np.array,
    "tensor": lambda pair: torch.tensor(pair, dtype=torch.float64),
    "configuration": ConfigList,
    "tuple of tensors": lambda pair: tuple(map(torch.tensor, pair)),
}
SETTINGS = {
    "SGD": {"lr": 0.125, "momentum": 0.75, "dampening": 0.25, "weight_decay": 0.5},
    "Adam": {"lr": 0.125, "eps": 0.25, "weight_decay": 0.5},
    "AdamW": {"lr": 0.125, "eps": 0.25, "weight_decay": 0.5},
}


def transposed(params):
    for p in params:
        p.grad = p.grad.t().contiguous().t()


def steps_alike(optimizer, ours, twin, theirs, in_plain_torch):
    for _ in range(2):
        give_grads(ours, theirs)
        if in_plain_torch:
            transposed(ours)
            transposed(theirs)
        optimizer.step()
        twin.step()
    assert_same_bits(theirs, ours, twin, optimizer)


@falls_back
@pytest.mark.parametrize("in_plain_torch", [False, True], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize("rule", SETTINGS)
def test_numbers(rule, form, in_plain_torch):
    """All settings at once, set between steps, as schedulers and configurations do."""
    ours = make_params([(4, 5), (3, 2)])
    theirs = copy_params(ours)
    numbers = {**SETTINGS[rule], "clip_value": 0.5, "max_norm": 0.75}
    optimizer, twin = getattr(fastclip, rule)(ours), getattr(fastclip, rule)(theirs)
    twin.param_groups[0].update(numbers)
    optimizer.param_groups[0].update({name: NUMBERS[form](number) for name, number in numbers.items()})
    steps_alike(optimizer, ours, twin, theirs, in_plain_torch)
    assert torch.equal(optimizer.clip_stats().clamped_fraction, twin.clip_stats().clamped_fraction)


@falls_back
@pytest.mark.parametrize("in_plain_torch", [False, True], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("form", PAIRS)
def test_pairs(form, in_plain_torch):
    ours = make_params([(4, 5), (3, 2)])
    theirs = copy_params(ours)
    optimizer = fastclip.AdamW(ours, betas=PAIRS[form]((0.5, 0.75)), clip_value=PAIRS[form]((-0.125, 0.25)))
    twin = fastclip.AdamW(theirs, betas=(0.5, 0.75), clip_value=(-0.125, 0.25))
    steps_alike(optimizer, ours, twin, theirs, in_plain_torch)
    assert "clip_value" in repr(optimizer)


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_of_the_clip_function(form):
    p, q = make_params([(5,), (5,)])
    give_grads([p], [q])
    fastclip.clip_grad_value_([p], PAIRS[form]((-0.125, 0.25)))
    assert torch.equal(p.grad, q.grad.clamp(-0.125, 0.25))


@pytest.mark.parametrize("form", [*NUMBERS, "text"])
@pytest.mark.parametrize("clip", ["clip_grad_value_", "clip_grad_norm_"])
def test_numbers_of_the_clip_functions_as_in_torch(clip, form):
    """Which take the text of a number, too: YAML reads 1e-3 as one."""
    p, q = make_params([(5,), (5,)])
    give_grads([p], [q])
    threshold = "125e-3" if form == "text" else NUMBERS[form](0.125)
    getattr(torch.nn.utils, clip)([q], threshold)
    getattr(fastclip, clip)([p], threshold)
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", ["clip_grad_value_", "clip_grad_norm_"])
def test_text_that_is_no_number_is_refused(clip):
    (p,) = make_params([(5,)])
    give_grads([p])
    before = p.grad.clone()
    with pytest.raises(ValueError, match="must be a number, got 'much'"):
        getattr(fastclip, clip)([p], "much")
    assert torch.equal(p.grad, before)


@pytest.mark.parametrize("rule", SETTINGS)
def test_text_is_refused_by_optimizers_as_in_torch(rule):
    """Torch's compare it with 0. One that torch does not look at would fail in its first step."""
    for name in SETTINGS[rule]:
        with pytest.raises(TypeError):
            getattr(fastclip, rule)(make_params([(2,)]), **{name: "1e-3"})
        if name != "dampening":
            with pytest.raises(TypeError):
                getattr(torch.optim, rule)(make_params([(2,)]), **{name: "1e-3"})
    for name in ("clip_value", "max_norm"):
        with pytest.raises(TypeError, match=f"{name} in .* is the text '1e-3': write 1.0e-3"):
            getattr(fastclip, rule)(make_params([(2,)]), **{name: "1e-3"})


@pytest.mark.parametrize("pair", [np.ones(3), torch.ones(3), ConfigList([0.1]), iter((0.1, 0.2)), {0: 1, 1: 2}])
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises((ValueError, TypeError), match=r"clip_value in param_groups\[0\]"):
        fastclip.SGD(make_params([(2,)]), lr=0.1, clip_value=pair)
