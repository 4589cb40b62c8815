"""skip_nonfinite=True: an inf or NaN in any gradient leaves everything as it was, and is counted."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch

import fastclip
from fastclip import reference
from tests.support.cases import CLIPS, LARGE, SHAPES, TINY, assert_same_bits, copy_params, give_grads, make_params

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def skipping(params, **settings):
    return fastclip.SGD(params, **{"lr": 0.1, "skip_nonfinite": True, **settings})


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_changes_nothing_and_is_counted(clip, bad, device):
    params = make_params(SHAPES + TINY, device=device)
    optimizer = skipping(params, momentum=0.9, weight_decay=0.01, **CLIPS[clip])
    give_grads(params)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    adam = fastclip.AdamW(copy_params(params), amsgrad=True, skip_nonfinite=True, **CLIPS[clip])
    (group,) = adam.param_groups
    give_grads(group["params"])
    adam.step()
    before_adam = copy_params(group["params"]), copy.deepcopy(adam.state_dict()["state"])
    before = copy_params(params), [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    for count, place in enumerate((0, -1), start=1):
        give_grads(params)
        params[12 if place else 3].grad.view(-1)[place] = bad
        optimizer.step()
        assert_same_bits(params, before[0])
        assert_same_bits([optimizer.state[p]["momentum_buffer"] for p in params], before[1])
        assert optimizer.skipped_steps.item() == count
        for p, q in zip(group["params"], params, strict=True):
            p.grad = q.grad
        adam.step()
        assert_same_bits(group["params"], before_adam[0])
        now = adam.state_dict()["state"]
        for index, state in before_adam[1].items():
            assert all(torch.equal(now[index][name], value) for name, value in state.items())
        assert adam.skipped_steps.item() == count
    give_grads(params)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 2 and not torch.equal(params[12], before[0][12])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_finite_gradients_are_stepped_as_without(clip, dtype, device):
    ours = make_params(SHAPES + LARGE, dtype, device)
    theirs = copy_params(ours)
    settings = {"lr": 0.1, "momentum": 0.9, **CLIPS[clip]}
    skips, plain = skipping(ours, **settings), fastclip.SGD(theirs, **settings)
    for _ in range(3):
        give_grads(ours, theirs)
        skips.step()
        plain.step()
    assert_same_bits(theirs, ours, plain, skips)
    assert (skips.total_norm is None) == (plain.total_norm is None)
    assert skips.total_norm is None or torch.equal(skips.total_norm, plain.total_norm)
    assert skips.skipped_steps.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_the_largest_finite_gradients_are_not_taken_for_infinite(clip, dtype, device):
    params = [torch.zeros(5000, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad = torch.full_like(p, torch.finfo(dtype).max)
    optimizer = skipping(params, lr=1e-30, **CLIPS[clip])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize("clip", CLIPS)
def test_a_skipped_first_step_leaves_no_momentum(clip, device):
    """Else the next one would dampen what torch takes as it is."""
    ours = make_params([(7,), (33,)], device=device)
    theirs = copy_params(ours)
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, **CLIPS[clip]}
    skips, plain = skipping(ours, **settings), fastclip.SGD(theirs, **settings)
    give_grads(ours)
    ours[1].grad[0] = math.nan
    skips.step()
    assert not any("momentum_buffer" in skips.state[p] for p in ours)
    for _ in range(2):
        give_grads(ours, theirs)
        skips.step()
        plain.step()
    assert_same_bits(theirs, ours, plain, skips)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_reference_skips_the_same_steps(clip, device):
    ours = make_params(SHAPES, device=device)
    expected = copy_params(ours)
    settings = {"momentum": 0.9, **CLIPS[clip]}
    optimizer = skipping(ours, **settings)
    groups, state = skipping(expected, **settings).param_groups, {p: {} for p in expected}
    skipped = 0
    for bad in (1.0, math.inf, 1.0, math.nan, 1.0):
        give_grads(ours, expected)
        for p in (ours[6], expected[6]):
            p.grad[5] = bad
        optimizer.step()
        stats = reference.step_sgd(groups, state)
        skipped += int(stats.skipped)
        if stats.total_norm is not None:
            torch.testing.assert_close(optimizer.total_norm.cpu(), stats.total_norm.cpu(), equal_nan=True)
    assert skipped == optimizer.skipped_steps.item() == 2
    for p, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, e)


@pytest.mark.falls_back
def test_plain_torch_skips_and_counts_too():
    p = torch.zeros(4, dtype=torch.complex64, requires_grad=True)
    optimizer = skipping([p])
    for value in (1.0, math.nan):
        p.grad = torch.full_like(p, value)
        with pytest.warns(UserWarning, match="plain torch") if value == 1.0 else nullcontext():
            optimizer.step()
    assert optimizer.skipped_steps.item() == 1 and torch.equal(p.detach(), torch.full((4,), -0.1 + 0j))


def test_amp_counts_the_steps_it_skips(device):
    p = torch.zeros(3, device=device, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0)
    for found_inf in (1.0, 0.0, 1.0):
        p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf, device=device)
        optimizer.step()
    assert optimizer.skipped_steps.item() == 2 and optimizer.total_norm.item() == math.inf


def test_holds_for_all_groups_together():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError, match="skip_nonfinite"):
        fastclip.SGD([{"params": params[:1], "skip_nonfinite": True}, {"params": params[1:]}])


def test_loading_a_checkpoint_keeps_the_count():
    """And the memory that a CUDA graph may hold."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = skipping([p])
    p.grad = torch.full((3,), math.nan)
    optimizer.step()
    optimizer.load_state_dict(skipping([torch.zeros(3, requires_grad=True)]).state_dict())
    assert optimizer.skipped_steps.item() == 1
