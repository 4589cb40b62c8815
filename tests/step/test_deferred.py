"""A clip that is deferred to the step: the bits of the same clip at once, in any place, and nothing left over."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch

import fastclip
from fastclip.deferred import owner_of
from tests.support.cases import (
    LARGE,
    SHAPES,
    assert_close,
    assert_same_bits,
    copy_params,
    give_grads,
)
from tests.support.deferral import RULES, clip, step_alike, two


@pytest.mark.parametrize("kind", ["tight", "loose", "zero", "inf", "value"])
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_has_the_bits_of_the_same_clip_at_once(optimizer, kind, dtype, device):
    opt, ours, plain, theirs = two(optimizer, SHAPES + LARGE, dtype, device)
    for _ in range(3):
        give_grads(ours, theirs)
        before = [p.grad.clone() for p in ours]
        norm, expected = clip(ours, kind, defer=True), clip(theirs, kind)
        assert norm is None if kind == "value" else torch.equal(norm, expected)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))
        step_alike(opt, ours, plain, theirs)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_16_bit_gradients_are_not_rounded_in_between(dtype, settings, device):
    """So the step is that on the clipped gradients in float32."""
    opt, ours, *_ = two("SGD", [(5,), (4097,)], dtype, device, momentum=0, **settings)
    theirs = copy_params(ours)
    plain = fastclip.SGD(theirs, lr=0.1, weight_decay=0.01, **settings)
    for p in theirs:
        p.grad_dtype = torch.float32
    for _ in range(2):
        give_grads(ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()
        clip(ours, "tight", defer=True)
        clip(theirs, "tight")
        opt.step()
        plain.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)


def test_the_optimizers_own_clips_come_afterwards(device):
    for own in ({"clip_value": 0.1}, {"max_norm": 0.1}, {"clip_value": (-0.2, 0.05), "max_norm": 0.2},
                {"max_norm": "quantile"}, {"max_relative_change": 0.01}):  # fmt: skip
        opt, ours, plain, theirs = two(device=device, **own)
        for kind in ("tight", "value", "loose"):
            give_grads(ours, theirs)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                clip(ours, kind, defer=True)
            assert [("two clips" in str(w.message) and [*own][0] in str(w.message)) for w in said] == (
                [True] if kind == "tight" else []
            )  # once
            clip(theirs, kind)
            step_alike(opt, ours, plain, theirs)
            if "max_norm" in own:
                assert torch.equal(opt.total_norm, plain.total_norm)


@pytest.mark.parametrize("own", [(0.5, 1.0), (-1.0, -0.5), (-0.1, 0.2), (-9.0, 9.0)], ids=str)
def test_two_value_clips_need_not_overlap(own):
    opt, ours, plain, theirs = two(clip_value=own)
    give_grads(ours, theirs)
    with pytest.warns(UserWarning, match="two clips"):
        clip(ours, "value", defer=True)
    clip(theirs, "value")
    step_alike(opt, ours, plain, theirs)
    assert opt.param_groups[0]["clip_value"] == own


def test_clips_one_after_the_other_on_the_same_gradients():
    """Only the last is deferred: it has to see what the others have done."""
    for kinds in (("value", "tight"), ("tight", "value"), ("loose", "tight"), ("tight", "tight", "inf")):
        opt, ours, plain, theirs = two()
        give_grads(ours, theirs)
        for kind in kinds:
            norm, expected = clip(ours, kind, defer=True), clip(theirs, kind)
            assert norm is expected is None or torch.equal(norm, expected)
        step_alike(opt, ours, plain, theirs)


def test_a_clip_at_once_after_a_deferred_one():
    opt, ours, plain, theirs = two()
    give_grads(ours, theirs)
    clip(ours, "tight", defer=True)
    clip(theirs, "tight")
    assert torch.equal(clip(ours, "inf"), clip(theirs, "inf"))
    clip(ours[3:], "value")
    clip(theirs[3:], "value")
    step_alike(opt, ours, plain, theirs)


def test_a_measure_without_a_step_leaves_nothing_behind():
    """As after a norm that is not finite: whichever way the gradients are made anew."""

    def of_the_model(opt, params):
        model = torch.nn.Module()
        model.a, model.b = params
        model.zero_grad()

    ways = {
        "zero_grad of the optimizer": lambda opt, params: opt.zero_grad(),
        "in place": lambda opt, params: opt.zero_grad(set_to_none=False),
        "of the model": of_the_model,
        "by hand": lambda opt, params: [setattr(p, "grad", None) for p in params],
    }
    for way, zero in ways.items():
        *_, theirs = two(shapes=[(7,), (3, 5)])
        ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
        opt, plain = fastclip.SGD(ours, lr=0.1), fastclip.SGD(theirs, lr=0.1)
        for p in ours:
            p.grad = torch.full_like(p, math.nan)
        assert clip(ours, "tight", defer=True).isnan(), way
        grads = [weakref.ref(p.grad) for p in ours]
        zero(opt, ours)
        if way != "in place":
            gc.collect()
            assert not any(grad() is not None for grad in grads), way  # and no memory
        for p, q in zip(ours, theirs, strict=True):
            (p * torch.arange(p.numel()).view_as(p)).sum().backward()
            q.grad = p.grad.clone()
        step_alike(opt, ours, plain, theirs)


def test_accumulation_clips_the_sum():
    opt, ours, plain, theirs = two(shapes=[(7,), (3, 5)])
    for _ in range(2):
        for params, defer in ((ours, True), (theirs, False)):
            for k in range(3):
                for p in params:
                    (p.square() * (k + 1)).sum().backward()
            clip(params, "tight", defer=defer)
        opt.step()
        plain.step()
        opt.zero_grad()
        plain.zero_grad()
        assert_same_bits(theirs, ours, plain, opt)


def test_two_steps_on_the_same_gradients():
    opt, ours, plain, theirs = two()
    give_grads(ours, theirs)
    for _ in range(2):
        clip(ours, "tight", defer=True)
        clip(theirs, "tight")
        for _ in range(2):
            opt.step()
            plain.step()
        assert_same_bits(theirs, ours, plain, opt)


def test_gradients_zeroed_in_place_by_hand_after_a_step():
    opt, ours, plain, theirs = two(shapes=[(7,)])
    for k in range(3):
        for params, defer in ((ours, True), (theirs, False)):
            (params[0] * (k + 1)).sum().backward()
            clip(params, "tight", defer=defer)
        opt.step()
        plain.step()
        for params in (ours, theirs):
            params[0].grad.zero_()
        assert_same_bits(theirs, ours, plain, opt)


CHANGES = {
    "in place": lambda p: p.grad.add_(1),
    "by a backward pass": lambda p: p.sum().backward(),
    "replaced": lambda p: setattr(p, "grad", 2 * p.grad),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["tight", "value"])
def test_a_gradient_that_was_changed_in_between_is_an_error(how, kind):
    opt = fastclip.SGD(
        [("first", torch.ones(3, requires_grad=True)), ("second", torch.ones(2, requires_grad=True))], 0.1
    )
    params = opt.param_groups[0]["params"]
    give_grads(params)
    clip(params, kind, defer=True)
    CHANGES[how](params[1])
    before = [p.detach().clone() for p in params]
    for act in (opt.step, lambda: clip(params, "tight", defer=True), lambda: clip(params, "tight")):
        with pytest.raises(
            RuntimeError, match=r"parameter 1 of group 0 \('second'\) was changed after its clip.*defer"
        ):
            act()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    opt.zero_grad()
    give_grads(params)
    opt.step()


def test_a_gradient_that_was_taken_away_is_left_out():
    opt, ours, plain, theirs = two()
    give_grads(ours, theirs)
    clip(ours, "tight", defer=True)
    clip(theirs, "tight")
    ours[4].grad = theirs[4].grad = None
    step_alike(opt, ours, plain, theirs)


def test_a_step_that_raises_keeps_the_clip():
    opt, ours, plain, theirs = two()
    give_grads(ours, theirs)
    clip(ours, "tight", defer=True)
    clip(theirs, "tight")
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    step_alike(opt, ours, plain, theirs)


@pytest.mark.parametrize("sequence", ["unscale, clip, step", "clip, step"])
@pytest.mark.parametrize("overflows", [False, True])
def test_with_a_gradient_scaler(sequence, overflows, device):
    """The right sequence, and that of trainers that clip scaled gradients by mistake: as with the clip at once."""
    opt, ours, plain, theirs = two(device=device)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in range(2)]
    for k in range(3):
        give_grads(ours, theirs, scale=1024.0)
        if overflows and k == 1:
            ours[6].grad[0] = theirs[6].grad[0] = math.inf
        for scaler, optimizer, params, defer in zip(scalers, (opt, plain), (ours, theirs), (True, False), strict=True):
            scaler.scale(torch.ones((), device=device))
            if sequence == "unscale, clip, step":
                scaler.unscale_(optimizer)
            clip(params, "tight", defer=defer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same_bits(theirs, ours, plain, opt)
    assert opt.skipped_steps == plain.skipped_steps == (1 if overflows else 0)


@pytest.mark.falls_back
@pytest.mark.filterwarnings("ignore:fastclip falls back")
def test_in_plain_torch():
    for dtype, shape in ((torch.complex64, (5,)), (torch.float32, (6, 4))):
        ours = [torch.randn(shape, dtype=dtype).requires_grad_()]
        theirs = copy_params(ours)
        if dtype == torch.float32:
            ours, theirs = ([p.detach().t()[::2].requires_grad_() for p in params] for params in (ours, theirs))
        opt, plain = fastclip.SGD(ours, lr=0.1), fastclip.SGD(theirs, lr=0.1)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = clip(ours, "tight", defer=True)
        torch.testing.assert_close(norm, clip(theirs, "tight"))
        opt.step()
        plain.step()
        assert_close(theirs, ours, 1e-6)


def test_is_forgotten_by_copies_and_checkpoints():
    opt, ours, *_ = two(shapes=[(3,)])
    give_grads(ours)
    clip(ours, "tight", defer=True)
    state = opt.state_dict()
    assert copy.deepcopy(opt)._deferred is None
    assert state.keys() == {"state", "param_groups"} and not state["state"]


def test_bad_input_defers_nothing():
    opt, ours, plain, theirs = two()
    give_grads(ours, theirs)
    for bad in (-1.0, math.nan, "x", None):
        with pytest.raises((ValueError, TypeError), match="max_norm"):
            fastclip.clip_grad_norm_(ours, bad, defer=True)
        if bad is not None:
            with pytest.raises((ValueError, TypeError), match="clip_value"):
                fastclip.clip_grad_value_(ours, bad, defer=True)
    ours[3].grad[0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True, defer=True)
    ours[3].grad[0] = theirs[3].grad[0]
    step_alike(opt, ours, plain, theirs)


def test_not_in_step_in_backward():
    model = torch.nn.Module()
    model.p = p = torch.nn.Parameter(torch.ones(3))
    handle = fastclip.step_in_backward(model, fastclip.SGD([p], lr=0.1))
    p.grad = torch.ones(3)
    assert owner_of([p])[0] is None
    fastclip.clip_grad_norm_([p], 0.5, defer=True)
    assert p.grad.norm() == pytest.approx(0.5)
    del handle
