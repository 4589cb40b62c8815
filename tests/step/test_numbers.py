"""Numbers that other fused steps get wrong: infinities and NaN, signed zeros, denormals, large gradients, rounding."""

import math

import pytest
import torch

import fastclip
from fastclip.plain import rules
from fastclip.plain import step as reference
from tests.support.cases import CLIPS, RULES, assert_same_bits, flush_denormal, give_grads, pair, step_both
from tests.support.scripts import run_script


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_clamp_keeps_nan_clamps_inf_and_keeps_the_sign_of_zero(dtype, device):
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 0.3, -0.3, 2.0, -2.0] * 5)
    values = values.to(device, dtype)
    for bounds in (0.5, 0.0, (-0.0, 0.0), (0.0, 0.0), (-0.3, 0.3)):
        p = torch.zeros_like(values).requires_grad_()
        p.grad = values.clone()
        fastclip.clip_grad_value_(p, bounds)
        low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
        expected = values.clamp(low, high)
        assert torch.equal(torch.signbit(p.grad.nan_to_num()), torch.signbit(expected.nan_to_num()))
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0, equal_nan=True)


def test_negative_zero_parameters_and_gradients():
    """fma(0, p, g) would turn -0.0 into 0.0, and 0 * inf into NaN: with weight decay 0 the term is left out."""
    for rule in (*RULES, {"optimizer": "Adam"}, {"optimizer": "AdamW", "amsgrad": True}):
        loop, theirs, optimizer, ours = pair([(40,)], CLIPS["value"], **rule)
        with torch.no_grad():
            for p in (*theirs, *ours):
                p[::3], p[1::3] = -0.0, 0.0
        for _ in range(2):
            for p in (*theirs, *ours):
                p.grad = torch.full_like(p, -0.0)
                p.grad[::2] = 0.0
            step_both(loop, theirs, optimizer, ours)
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("clip", ["none", "value", "norm", "inf norm"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"optimizer": "Adam", "amsgrad": True}], ids=["sgd", "adam"])
def test_non_finite_gradients_do_what_they_do_in_plain_code(rule, bad, clip, device):
    loop, theirs, optimizer, ours = pair([(3,), (40,)], CLIPS[clip], device=device, **rule)
    for _ in range(2):
        give_grads(theirs, ours)
        for params in (theirs, ours):
            params[1].grad[7] = bad
        step_both(loop, theirs, optimizer, ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-6, equal_nan=True)
        for name, value in loop.optimizer.state[a].items():
            torch.testing.assert_close(optimizer.state[b][name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_infinite_parameters_without_weight_decay():
    p = torch.tensor([math.inf, 1.0], requires_grad=True)
    p.grad = torch.ones(2)
    fastclip.SGD([p], lr=0.1, momentum=0.9, nesterov=True).step()
    fastclip.Adam([p], lr=0.1).step()
    assert p[0].item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_squares_that_overflow_and_vanish_in_adam(dtype):
    """As in torch, to the bit: where an average is inf an update is 0, and where it is 0 eps alone divides."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for eps in (1e-8, 0.0):
        loop, theirs, optimizer, ours = pair([(48,)], dtype=dtype, optimizer="Adam", amsgrad=True, eps=eps)
        for scale in (1.0, 0.5, 1.0):
            for p in (*theirs, *ours):
                p.grad = torch.tensor([largest, -largest, smallest, -smallest, 0.0, 1.0] * 8, dtype=dtype) * scale
            step_both(loop, theirs, optimizer, ours)
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
            for name, value in loop.optimizer.state[a].items():
                torch.testing.assert_close(optimizer.state[b][name], value, rtol=0, atol=0, equal_nan=True)


def test_finite_gradients_of_1e20_do_not_vanish(device):
    """torch's float32 sum of squares overflows: the norm is inf and every gradient becomes 0."""
    p = torch.zeros(2, device=device, requires_grad=True)
    p.grad = torch.tensor([3e20, 4e20], device=device)
    fastclip.SGD([p], lr=1.0, max_norm=1.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8], device=device))


# Two gradients, and the norm that they are clipped to. The coefficients are subnormal, in float32 or float64.
SMALL_COEFFICIENTS = [
    (torch.float32, (6e37, -8e37), 0.5),
    (torch.float32, (1.8e38, -2.4e38), 1e-25),
    (torch.bfloat16, (6e37, -8e37), 0.5),
    (torch.float64, (6e307, -8e307), 0.5),
    (torch.float64, (6e307, -8e307), 1e-10),
]


@pytest.mark.parametrize("flush", [False, True], ids=["", "flush"])
@pytest.mark.parametrize(("dtype", "grads", "max_norm"), SMALL_COEFFICIENTS, ids=str)
def test_a_small_coefficient_keeps_its_digits(dtype, grads, max_norm, flush, device):
    """Whatever is clipped before, in either direction, by a step, the clip function and the specification."""
    p, q, r = (torch.zeros(2, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    for param in (p, q, r):
        param.grad = torch.tensor(grads, dtype=dtype, device=device)
    exact = p.grad.double().cpu() / math.hypot(*p.grad.tolist()) * max_norm
    infinite = torch.finfo(dtype).max
    settings = {"lr": 1.0, "max_norm": max_norm, "maximize": True, "clip_value": (-infinite, infinite)}
    with flush_denormal(flush):
        optimizer = fastclip.SGD([p], **settings)
        optimizer.step()
        coefficient = optimizer.clip_stats().clip_coefficient
        fastclip.clip_grad_norm_([q], max_norm)
        other = fastclip.SGD([r], **settings)
        expected_coefficient = reference.step(rules.SGD, other.param_groups, other.state).clip_coefficient
    for found in (p, q.grad, r):
        torch.testing.assert_close(found.detach().cpu(), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(p, r)
    assert coefficient == expected_coefficient


@pytest.mark.parametrize("flush", [False, True], ids=["", "flush"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_a_small_coefficient_in_plain_torch(norm_type, flush):
    """Where the kernels do not cover a gradient, and for other norms."""
    p = torch.zeros(2, 2, requires_grad=True)
    p.grad = torch.full((2, 4), 5e37)[:, ::2]
    with flush_denormal(flush):
        norm = fastclip.clip_grad_norm_([p], 0.25, norm_type)
    torch.testing.assert_close(p.grad * (norm / 5e37), torch.full((2, 2), 0.25), rtol=1e-6, atol=0)


def test_a_norm_of_16_bit_gradients_does_not_overflow(device):
    """In float16 it ends at 65,504."""
    p = torch.zeros(10_000, dtype=torch.float16, device=device, requires_grad=True)
    p.grad = torch.full_like(p, 6e4)
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=50.0)
    optimizer.step()
    assert math.isclose(optimizer.total_norm.item(), 100 * p.grad[0].item(), rel_tol=1e-12)
    assert torch.equal(p.detach(), torch.full_like(p, -0.5))


def test_denormals_survive_as_they_do_in_torch():
    loop, theirs, optimizer, ours = pair([(50,)], {"clip_value": 1e-40}, lr=0.5, momentum=0.9)
    for _ in range(2):
        give_grads(theirs, ours, scale=1e-39)
        for p in (*theirs, *ours):
            p.data.mul_(1e-39)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_mixed_dtypes_share_one_norm(device):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    params = [torch.zeros(10, dtype=d, device=device, requires_grad=True) for d in dtypes]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fastclip.SGD(params, lr=1.0, max_norm=1.0)
    opt.step()
    assert math.isclose(opt.total_norm.item(), 40**0.5)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, -1 / 40**0.5))


def test_where_torch_rounds_twice_the_difference_is_one_ulp():
    """One ulp of the larger term. ATEN_CPU_CAPABILITY=default has no fma; fastclip's rule always has."""
    result = run_script(
        """if True:
        import torch, fastclip
        torch.manual_seed(0)
        p, g = torch.randn(10_000), torch.randn(10_000)
        ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
        ours.grad, theirs.grad = g.clone(), g.clone()
        fastclip.SGD([ours], lr=0.1).step()
        torch.optim.SGD([theirs], lr=0.1, foreach=False).step()
        ours, theirs = ours.detach(), theirs.detach()
        product = torch.tensor(0.1).double() * g.double()
        exact = (p.double() - product).float()
        wrong_bits = (ours.view(torch.int32) - exact.view(torch.int32)).abs().max().item()
        # p and the product may cancel: what is rounded twice is the product
        larger = torch.maximum(torch.maximum(p.abs(), product.abs().float()), theirs.abs())
        ulp = torch.nextafter(larger, torch.tensor(torch.inf)) - larger
        print(torch.backends.cpu.get_cpu_capability(), wrong_bits, ((ours - theirs).abs() / ulp).max().item())
        """,
        ATEN_CPU_CAPABILITY="default",
    )
    capability, wrong_bits, ulps = result.stdout.split()
    assert (capability, wrong_bits) == ("DEFAULT", "0"), result.stdout + result.stderr
    assert 0 < float(ulps) <= 1
