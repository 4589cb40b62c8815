"""fastclip.SGD under the inputs of torch's own optimizer tests, step by step against torch.optim.SGD."""

import copy

import pytest
import torch

import fastclip

from .cases import SHAPES as ADVERSARIES
from .cases import assert_close, assert_same_bits, give_grads, make_params
from .torch_optim_db import (
    LOOSE,
    Twins,
    as_torch_tests,
    both_precisions,
    every_clip,
    every_impl_for_leaves,
    every_input,
    falls_back,
)


@as_torch_tests("test_foreach_matches_forloop")
@every_clip
@every_impl_for_leaves
@both_precisions
@every_input
def test_every_input_steps_with_torchs_bits(kwargs, dtype, impl, clip):
    twins = Twins(kwargs, clip, dtype, ADVERSARIES, impl=impl)
    for _ in range(4):
        twins.step()
        twins.check()
    if "max_norm" in clip:
        grads = torch.cat([p.grad.double().flatten() for p in twins.theirs])
        torch.testing.assert_close(twins.fastclip.total_norm, grads.norm(), rtol=1e-12, atol=0)


@as_torch_tests("test_fused_matches_forloop")
@every_impl_for_leaves
@both_precisions
@every_input
def test_every_implementation_of_torch_agrees(kwargs, dtype, impl):
    """torch's default and foreach to the bit; its fused one rounds differently in the last elements of a tensor."""
    torch.set_num_threads(1)  # torch's threads wait for each other, for long on a busy machine
    twins = Twins(kwargs, dtype=dtype, shapes=ADVERSARIES, impl=impl)
    twins.torch = torch.optim.SGD(twins.theirs, **copy.deepcopy(kwargs), **impl)
    twins.step(4)
    if "fused" in impl:
        assert_close(twins.theirs, twins.ours, 8 * torch.finfo(dtype).eps)
    else:
        twins.check()


@every_clip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_input
def test_16_bit_parameters_agree_and_are_closer_to_the_truth(kwargs, dtype, clip):
    """Computed in float32 and rounded once, where torch's loop rounds after every operation."""
    twins = Twins({"lr": 0.1, **kwargs}, clip, dtype, ADVERSARIES)
    exact = [p.detach().double().requires_grad_() for p in twins.ours]
    oracle = torch.optim.SGD(exact, **{"lr": 0.1, **copy.deepcopy(kwargs)})
    give_grads(twins.theirs, twins.ours, exact)
    for p, e in zip(twins.ours, exact, strict=True):
        e.grad = p.grad.double()
    for optimizer in (*twins.optimizers, oracle):
        optimizer.step()
    distances = [
        sum((p.double() - e).abs().sum().item() for p, e in zip(params, exact, strict=True))
        for params in (twins.theirs, twins.ours)
    ]
    assert distances[1] <= distances[0]
    twins.step(3)
    assert_close(twins.theirs, twins.ours, 8 * torch.finfo(dtype).eps)
    buffers = [[state["momentum_buffer"] for state in o.state_dict()["state"].values()] for o in twins.optimizers]
    assert len(buffers[1]) == (len(twins.ours) if "momentum" in kwargs else 0)
    assert_close(*buffers, 16 * torch.finfo(dtype).eps)


@as_torch_tests("test_mixed_device_dtype")
@every_clip
@every_input
def test_dtypes_mixed_in_one_optimizer(kwargs, clip):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16] * 2
    params = [make_params([(7, 33)], dtype)[0] for dtype in dtypes]
    twins = Twins(kwargs, clip, params=params)
    twins.step(4)
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        assert a.dtype == b.dtype
        if a.dtype in (torch.float32, torch.float64):
            assert_same_bits([a], [b], *twins.optimizers)
        else:
            assert_close([a], [b], 8 * torch.finfo(a.dtype).eps)


@as_torch_tests("test_set_default_dtype_works_with_foreach")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@every_clip
@every_input
def test_another_default_dtype(kwargs, clip, default):
    torch.set_default_dtype(default)
    try:
        twins = Twins(kwargs, clip)
        twins.step(3)
        twins.check()
        if "max_norm" in clip:
            assert twins.fastclip.total_norm.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@falls_back
@as_torch_tests("test_complex")
@pytest.mark.parametrize("impl", [{}, {"foreach": True}], ids=["default", "foreach"])
@pytest.mark.parametrize("clip", ["no clip", "norm 1e30"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@every_input
def test_complex_parameters_step_as_in_torch(kwargs, dtype, clip, impl):
    params = [torch.randn(5, 5, dtype=dtype).requires_grad_(), torch.randn(9).requires_grad_()]
    twins = Twins(kwargs, LOOSE[clip], params=params, impl=impl)
    for _ in range(4):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.check()


@falls_back
@as_torch_tests("test_complex_2d")
@every_input
def test_a_complex_parameter_is_two_real_ones(kwargs):
    complex_param = torch.randn(5, 4, dtype=torch.complex64).requires_grad_()
    real_params = [part.detach().clone().requires_grad_() for part in (complex_param.real, complex_param.imag)]
    optimizers = [fastclip.SGD(p, **copy.deepcopy(kwargs), max_norm=0.5) for p in ([complex_param], real_params)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for z in (complex_param, torch.complex(*real_params)):
            ((z - (1 - 2j)) * (z + 3j)).abs().square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].total_norm, optimizers[1].total_norm, rtol=1e-6, atol=0)
        assert_close([complex_param.real, complex_param.imag], real_params, 1e-5)


@falls_back
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")], ids=str)
@every_input
def test_gradients_of_another_dtype(kwargs, dtypes):
    """`p.grad_dtype` allows them; the momentum buffer has the dtype that it has in torch."""
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes)
    twins = Twins(kwargs, dtype=dtype, shapes=[(10, 5), (7,)])
    for p in twins.theirs + twins.ours:
        p.grad_dtype = grad_dtype
    for _ in range(3):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn(a.shape).to(grad_dtype)
            b.grad = a.grad.clone()
        for optimizer in twins.optimizers:
            optimizer.step()
    tolerance = 8 * max(torch.finfo(d).eps for d in (dtype, grad_dtype))
    assert_close(twins.theirs, twins.ours, tolerance)
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        states = twins.torch.state.get(a, {}), twins.fastclip.state.get(b, {})
        assert {k: v.dtype for k, v in states[0].items()} == {k: v.dtype for k, v in states[1].items()}
