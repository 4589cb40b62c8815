"""Steps in the backward pass whose optimizer was dropped, or handed over to another one."""

import copy
import pickle

import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits
from tests.support.in_backward_cases import assert_same, losses, pair, take_ordinary_step

GONE = "the optimizer of step_in_backward is gone, and nothing has updated this model.*call remove"


def gone():
    """A model whose optimizer was dropped, and an equal one that had none."""
    (ordinary, (model, _)), _ = pair()
    return ordinary[0], model


@pytest.mark.parametrize("cls", [torch.optim.SGD, fastclip.SGD], ids=["torch", "fastclip"])
def test_an_optimizer_that_is_gone_is_told_once(cls):
    """Before anything goes on untrained; another optimizer then finds the model as it was."""
    both = gone()
    optimizers = [cls(model.parameters(), lr=0.1, momentum=0.9) for model in both]
    first, *more = losses(3)
    before = copy.deepcopy(both[1])
    with pytest.raises(RuntimeError, match=GONE):
        first(both[1]).backward()
    assert_same_bits(before.parameters(), both[1].parameters())
    for loss in more:
        for model, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        assert_same_bits(both[0].parameters(), both[1].parameters())
    assert not torch.equal(before.out.bias, both[1].out.bias)


def test_an_optimizer_that_is_gone_gives_way_to_another_in_the_backward_pass():
    """The new optimizer has all parameters: no error. It has some: nothing updates the others."""
    for all_of_them in (True, False):
        ordinary, model = gone()
        optimizers = [fastclip.SGD((m if all_of_them else m.twice).parameters(), lr=0.1) for m in (ordinary, model)]
        fastclip.step_in_backward(model, optimizers[1])
        if not all_of_them:
            with pytest.raises(RuntimeError, match=GONE):
                losses(1)[0](model).backward()
            model.zero_grad()
        for loss in losses(2):
            loss(ordinary).backward()
            optimizers[0].step()
            ordinary.twice.zero_grad()
            if all_of_them:
                ordinary.zero_grad()
            loss(model).backward()
            assert_same_bits(ordinary.parameters(), model.parameters())


def test_what_is_returned_keeps_the_optimizer_and_need_not_be_kept():
    (ordinary, stepped), in_backward = pair()
    model = stepped[0]
    del stepped
    first, second = losses(2)
    for loss in (first, second):
        loss(ordinary[0]).backward()
        take_ordinary_step(*ordinary)
    first(model).backward()
    optimizer = in_backward._optimizer
    del in_backward
    second(model).backward()
    assert_same(ordinary, (model, optimizer))


def test_removed_on_purpose():
    (ordinary, stepped), in_backward = pair()
    model = stepped[0]
    in_backward.remove()
    del stepped, in_backward
    for each in (ordinary[0], model):
        losses(1)[0](each).backward()
    for p, q in zip(ordinary[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_copies():
    """A copied or unpickled model has no hooks, and its optimizer takes ordinary steps."""
    (_, (model, optimizer)), in_backward = pair()
    losses(1)[0](model).backward()
    for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        with pytest.raises(TypeError, match="call it for the copies of model and optimizer"):
            copied(in_backward)
        other, own = copied((model, optimizer))
        losses(1)[0](other).backward()
        assert all(p.grad is not None for p in other.parameters())
        own.step()
        with fastclip.step_in_backward(other, own):
            losses(1)[0](other).backward()
