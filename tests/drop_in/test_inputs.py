"""The optimizers under the inputs of torch's own optimizer tests, step by step against torch's."""

import copy

import pytest
import torch

import fastclip
from tests.support.cases import SHAPES as ADVERSARIES
from tests.support.cases import assert_close, assert_equal_trees, assert_same_bits, copy_params, give_grads, make_params
from tests.support.torch_optim_db import (
    ADAM,
    INPUTS,
    LOOSE,
    SGD,
    Twins,
    as_torch_tests,
    both_precisions,
    every_clip,
    every_input,
    every_input_and_impl_for_leaves,
    every_optimizer,
    falls_back,
)


@as_torch_tests("test_foreach_matches_forloop")
@every_clip
@both_precisions
@every_input_and_impl_for_leaves
def test_every_input_steps_with_torchs_bits(optim, kwargs, dtype, impl, clip):
    twins = Twins(optim, kwargs, clip, dtype, ADVERSARIES, impl=impl)
    for _ in range(4):
        twins.step()
        twins.check()
    if "max_norm" in clip:
        grads = torch.cat([p.grad.double().flatten() for p in twins.theirs])
        torch.testing.assert_close(twins.fastclip.total_norm, grads.norm(), rtol=1e-12, atol=0)


@as_torch_tests("test_fused_matches_forloop")
@both_precisions
@every_input_and_impl_for_leaves
def test_every_implementation_of_torch_agrees(optim, kwargs, dtype, impl):
    """SGD's default and foreach to the bit; its fused one rounds differently in the last elements of a tensor, as all
    of Adam do in their square roots."""
    torch.set_num_threads(1)  # torch's threads wait for each other, for long on a busy machine
    twins = Twins(optim, kwargs, dtype=dtype, shapes=ADVERSARIES, impl=impl)
    if "foreach" in impl and optim is not SGD and "lr" in kwargs:
        kwargs = {**kwargs, "lr": float(kwargs["lr"])}  # torch's foreach refuses a tensor
    twins.torch = optim.torch(twins.theirs, **copy.deepcopy(kwargs), **impl)
    twins.step(4)
    if "fused" in impl or optim is not SGD:
        assert_close(twins.theirs, twins.ours, 8 * torch.finfo(dtype).eps)
    else:
        twins.check()


@every_clip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_input
def test_16_bit_parameters_agree_and_are_closer_to_the_truth(optim, kwargs, dtype, clip):
    """Computed in float32 and rounded once, where torch's loop rounds after every operation."""
    kwargs = {"lr": 0.1, **optim.moderate, **kwargs}
    twins = Twins(optim, kwargs, clip, dtype, ADVERSARIES)
    exact = [p.detach().double().requires_grad_() for p in twins.ours]
    oracle = optim.torch(exact, **copy.deepcopy(kwargs))
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
    states = [o.state_dict()["state"].values() for o in twins.optimizers]
    assert len(states[1]) == (len(twins.ours) if optim.keeps_state(kwargs) else 0)
    for theirs, ours in zip(*states, strict=True):
        assert_close(theirs.values(), ours.values(), 16 * torch.finfo(dtype).eps)


@as_torch_tests("test_mixed_device_dtype")
@every_clip
@every_input
def test_dtypes_mixed_in_one_optimizer(optim, kwargs, clip):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16] * 2
    params = [make_params([(7, 33)], dtype)[0] for dtype in dtypes]
    twins = Twins(optim, {**optim.moderate, **kwargs}, clip, params=params)
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
def test_another_default_dtype(optim, kwargs, clip, default):
    torch.set_default_dtype(default)
    try:
        twins = Twins(optim, kwargs, clip)
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
def test_complex_parameters_step_as_in_torch(optim, kwargs, dtype, clip, impl):
    params = [torch.randn(5, 5, dtype=dtype).requires_grad_(), torch.randn(9).requires_grad_()]
    twins = Twins(optim, kwargs, LOOSE[clip], params=params, impl=impl)
    for _ in range(4):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        twins.step_as_given()
        twins.check()


@falls_back
@as_torch_tests("test_complex_2d")
@every_input
def test_a_complex_parameter_is_two_real_ones(optim, kwargs):
    complex_param = torch.randn(5, 4, dtype=torch.complex64).requires_grad_()
    real_params = [part.detach().clone().requires_grad_() for part in (complex_param.real, complex_param.imag)]
    optimizers = [optim.fastclip(p, **copy.deepcopy(kwargs), max_norm=0.5) for p in ([complex_param], real_params)]
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
@pytest.mark.parametrize(("optim", "kwargs"), [p for p in INPUTS if p.values[0] is SGD])
def test_sgd_takes_gradients_of_another_dtype(optim, kwargs, dtypes):
    """`p.grad_dtype` allows them; the momentum buffer has the dtype that it has in torch."""
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes)
    twins = Twins(optim, kwargs, dtype=dtype, shapes=[(10, 5), (7,)])
    for p in twins.theirs + twins.ours:
        p.grad_dtype = grad_dtype
    for _ in range(3):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn(a.shape).to(grad_dtype)
            b.grad = a.grad.clone()
        twins.step_as_given()
    tolerance = 8 * max(torch.finfo(d).eps for d in (dtype, grad_dtype))
    assert_close(twins.theirs, twins.ours, tolerance)
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        states = twins.torch.state.get(a, {}), twins.fastclip.state.get(b, {})
        assert {k: v.dtype for k, v in states[0].items()} == {k: v.dtype for k, v in states[1].items()}


@falls_back
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_adam_takes_gradients_of_another_dtype(dtype, grad_dtype, max_norm):
    """torch's raises in the middle of its step: as with gradients of the parameter's dtype."""
    p = torch.randn(9).to(dtype).requires_grad_()
    expected = copy_params([p])
    p.grad_dtype = grad_dtype
    ours, theirs = (fastclip.AdamW(params, lr=0.1, max_norm=max_norm) for params in ([p], expected))
    for _ in range(3):
        expected[0].grad = torch.randn(9).to(torch.bfloat16).to(dtype)
        p.grad = (expected[0].grad.real if dtype.is_complex else expected[0].grad).to(grad_dtype)
        for optimizer in (ours, theirs):
            optimizer.step()
    assert {k: v.dtype for k, v in ours.state[p].items()} == {k: v.dtype for k, v in theirs.state[expected[0]].items()}
    assert_close(expected, [p], 4 * max(torch.finfo(d).eps for d in (dtype, grad_dtype, torch.float32)))


@falls_back
@every_optimizer
def test_a_complex_gradient_of_a_real_parameter_is_refused_and_changes_nothing(optim):
    first, second = make_params([(3,), (2,)])
    second.grad_dtype = torch.complex64
    first.grad, second.grad = torch.ones(3), torch.ones(2, dtype=torch.complex64)
    optimizer = optim.fastclip([first, second], **optim.stateful)
    before, state = copy_params([first]), copy.deepcopy(list(optimizer.state.values()))
    with pytest.raises(TypeError, match="gradient of parameter 1 of group 0 is complex, and the parameter is not"):
        optimizer.step()
    assert_same_bits(before, [first])
    assert_equal_trees(state, [entry for entry in optimizer.state.values() if entry or state])


def in_numbers(settings):
    """With the tensors among them read."""
    tensors = {k: float(v) for k, v in settings.items() if isinstance(v, torch.Tensor)}
    betas = {"betas": tuple(map(float, settings["betas"]))} if "betas" in settings else {}
    return {**settings, **tensors, **betas}


def test_adam_takes_tensors_where_torch_does():
    """Betas and lr, on the CPU with `capturable`, too, which torch takes on a GPU only."""
    for settings in (
        {"lr": torch.tensor(0.1, dtype=torch.float64)},
        {"betas": (torch.tensor(0.8), torch.tensor(0.75))},
        {"betas": (torch.tensor([0.5]), torch.tensor([0.875])), "lr": torch.tensor(0.125)},
    ):
        for capturable in (False, True):
            twins = Twins(ADAM, in_numbers(settings))
            twins.fastclip = fastclip.Adam(twins.ours, **settings, capturable=capturable)
            twins.step(3)
            twins.check()
    settings["betas"][0].fill_(0.25)
    twins.torch.param_groups[0]["betas"] = (0.25, 0.875)
    twins.step(2)
    twins.check()


@pytest.mark.parametrize("kwargs", [i.kwargs for i in ADAM.info.optim_inputs_func("cuda") if "capturable" in i.kwargs])
def test_capturable_inputs_on_the_cpu(kwargs):
    """A GPU's: torch takes them there only, and the bits are those without."""
    twins = Twins(ADAM, {k: v for k, v in in_numbers(kwargs).items() if k != "capturable"})
    twins.fastclip = fastclip.Adam(twins.ours, **copy.deepcopy(kwargs))
    twins.step(3)
    twins.check()
