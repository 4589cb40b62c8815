"""A step against the plain loop, for every rule, dtype, clip and adversarial size."""

import math

import pytest
import torch

import fastclip
from fastclip import reference
from tests.support.cases import (
    CLIPS,
    LARGE,
    RULES,
    SHAPES,
    TINY,
    assert_close,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
    pair,
)

BITWISE = ["none", "value", "pair"]


@pytest.mark.parametrize("clip", BITWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: " ".join(f"{k}={v}" for k, v in r.items() if v) or "plain")
def test_same_bits_as_the_loop(rule, dtype, clip, device):
    loop, theirs, optimizer, ours = pair(SHAPES, CLIPS[clip], dtype, device, **rule)
    for _ in range(6):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shapes", [TINY, LARGE, SHAPES + TINY + LARGE], ids=["tiny", "large", "all"])
def test_same_bits_over_many_and_large_tensors(shapes, threads):
    torch.set_num_threads(threads)
    loop, theirs, optimizer, ours = pair(shapes, CLIPS["value"], momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_same_bits_over_many_steps():
    loop, theirs, optimizer, ours = pair([(33, 7), (5,)], CLIPS["value"], momentum=0.9, weight_decay=1e-4)
    for step in range(500):
        give_grads(theirs, ours, scale=10 ** ((step % 9) - 4))
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("clip", ["norm", "inf norm", "loose norm", "value and norm"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize(
    "rule", [RULES[0], RULES[5], RULES[10], RULES[15]], ids=["plain", "momentum", "dampening", "nesterov"]
)
def test_norm_clip_agrees_with_the_loop(rule, dtype, rtol, clip, device):
    loop, theirs, optimizer, ours = pair(SHAPES, CLIPS[clip], dtype, device, **rule)
    for _ in range(4):
        give_grads(theirs, ours)
        norm = loop.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.total_norm, norm, rtol=1e-12, atol=0)
    assert_close(theirs, ours, rtol)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(dtype, clip, device):
    """Same bits as the reference, which says so in plain torch; and closer to float64 than torch's own step."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **CLIPS[clip]}
    ours = make_params(SHAPES, dtype, device)
    expected = copy_params(ours)
    optimizer = fastclip.SGD(ours, **settings)
    groups, state = fastclip.SGD(expected, **settings).param_groups, {p: {} for p in expected}
    for _ in range(4):
        give_grads(expected, ours)
        optimizer.step()
        reference.step_sgd(groups, state)
    exact = "norm" not in clip  # a norm summed in another order may round another coefficient
    for p, e in zip(ours, expected, strict=True):
        if exact:
            assert torch.equal(p, e)
        else:
            torch.testing.assert_close(p, e)
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == dtype
        torch.testing.assert_close(buffer, state[e]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_written_as_torch_does(dtype):
    """lr 1 from parameter 0: the parameter becomes minus the gradient, for each of the 65,536 bit patterns."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    p = torch.zeros(2**16, dtype=dtype, requires_grad=True)
    p.grad = bits.view(dtype)
    fastclip.SGD([p], lr=1.0).step()
    expected = 0 - bits.view(dtype).float()
    assert torch.equal(torch.nan_to_num(p.float(), nan=123.0), torch.nan_to_num(expected, nan=123.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_torchs(dtype):
    """A product of two 16-bit numbers has all kinds of bits to round: halves, subnormals, overflow."""
    torch.manual_seed(1)
    g = (torch.randn(200_000) * 10 ** torch.empty(200_000).uniform_(-9, 6)).to(dtype)
    p = torch.zeros_like(g).requires_grad_()
    p.grad = g
    fastclip.SGD([p], lr=0.7).step()
    expected = (g.float() * -torch.tensor(0.7)).to(dtype)
    assert torch.equal(p.detach(), expected)


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_are_left_as_they_were(clip, device):
    _, _, optimizer, ours = pair(
        SHAPES, CLIPS[clip], device=device, momentum=0.9, nesterov=True, maximize=True, weight_decay=0.1
    )
    give_grads(ours, scale=3)
    before = [p.grad.clone() for p in ours]
    optimizer.step()
    for p, grad in zip(ours, before, strict=True):
        assert torch.equal(p.grad, grad)


def test_groups_have_their_own_hyperparameters_and_value_clip_and_share_the_norm(device):
    settings = [{"lr": 0.1}, {"lr": 0.01, "momentum": 0.9}, {"lr": 1.0, "weight_decay": 0.1, "maximize": True}]
    clip_values = [0.5, None, (-0.2, 0.1)]
    ours = make_params([(5,), (70, 70), (9,)], device=device)
    theirs = copy_params(ours)
    optimizer = fastclip.SGD(
        [{"params": [p], "clip_value": c, **s} for p, c, s in zip(ours, clip_values, settings, strict=True)],
        max_norm=1.0,
    )
    plain = torch.optim.SGD([{"params": [p], **s} for p, s in zip(theirs, settings, strict=True)], foreach=False)
    for _ in range(3):
        give_grads(theirs, ours)
        for p, c in zip(theirs, clip_values, strict=True):
            if c is not None:
                p.grad.clamp_(*reference.bounds(c))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.total_norm.float(), norm)
    assert_close(theirs, ours, 2e-6)


def test_reference_agrees_with_the_loop():
    """The specification itself, against torch: it is the oracle of other tests, and the fallback."""
    for clip in CLIPS.values():
        loop, theirs, optimizer, ours = pair([(5, 3), (17,)], clip, torch.float64, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            give_grads(theirs, ours)
            norm = loop.step()
            stats = reference.step_sgd(optimizer.param_groups, optimizer.state)
            assert not stats.skipped
            assert (norm is None) == (stats.total_norm is None)
        assert_close(theirs, ours, 1e-14 if "max_norm" in clip else 0)


def test_a_norm_of_zero_and_a_threshold_of_zero(device):
    p = torch.ones(5, device=device, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.total_norm.item() == 0
    assert torch.equal(p.detach(), torch.ones_like(p))
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones_like(p))
    assert math.isclose(optimizer.total_norm.item(), 3 * 5**0.5)


@pytest.mark.parametrize("clip", CLIPS)
def test_no_temporary_of_the_size_of_a_gradient(clip):
    _, _, optimizer, ours = pair([(1000, 1000)], CLIPS[clip], momentum=0.9, weight_decay=0.1, nesterov=True)
    give_grads(ours)
    optimizer.step()  # makes the momentum buffer
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer._step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 0.01 * ours[0].numel() * ours[0].element_size()
