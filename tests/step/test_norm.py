"""The norm: right for every finite input, the same bits on any number of threads."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import LARGE, SHAPES, TINY, give_grads, make_params


def norm_of(grads, norm_type=2.0, **settings):
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer = fastclip.SGD(params, lr=0.0, max_norm=math.inf, norm_type=norm_type, **settings)
    optimizer.step()
    return optimizer.total_norm


def exact_norm(grads):
    """In Python's own arithmetic: no overflow, no order of summation."""
    values = [x for g in grads for x in g.double().flatten().tolist()]
    return math.hypot(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-3, 1.0, 3e19, 1e20, 3e37])
def test_norm_of_float32_range(scale, dtype, device):
    grads = [(torch.rand(s, dtype=torch.float64) * scale).to(device, dtype) for s in SHAPES]
    norm = norm_of(grads)
    assert norm.dtype == torch.float64 and norm.device.type == device
    assert math.isclose(norm.item(), exact_norm(grads), rel_tol=1e-12)


@pytest.mark.parametrize(
    "scales", [(1e-320,), (1e-300,), (1e-160, 1e-300), (1e150,), (1e300,), (1e307, 1.0, 1e-300), (1e160, 1e-160)]
)
def test_norm_of_float64_range(scales, device):
    grads = [torch.rand(3000, dtype=torch.float64, device=device) * scale for scale in scales]
    assert math.isclose(norm_of(grads).item(), exact_norm(grads), rel_tol=1e-12)


def test_norm_beyond_what_float32_holds():
    grads = [torch.full((100,), 3e38)]
    assert math.isclose(norm_of(grads).item(), exact_norm(grads), rel_tol=1e-12)


def test_norm_of_many_elements_does_not_drift():
    grads = [torch.rand(3_000_001)]
    expected = torch.linalg.vector_norm(grads[0].double()).item()
    assert math.isclose(norm_of(grads).item(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_same_bits_on_any_number_of_threads(norm_type):
    params = make_params(SHAPES + TINY + LARGE)
    give_grads(params)
    norms = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        norms |= {norm_of([p.grad for p in params], norm_type).item() for _ in range(5)}
    assert len(norms) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_inf_norm(dtype, device):
    grads = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in SHAPES]
    expected = max(g.abs().max().item() for g in grads if g.numel())
    assert norm_of(grads, math.inf).item() == expected
    assert norm_of(grads, "inf").item() == expected


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 5, 31, 32, 4095, 4096, 4999])
def test_non_finite_gradients_show_in_the_norm(place, dtype, norm_type, device):
    for bad, expected in ((math.nan, math.isnan), (math.inf, math.isinf), (-math.inf, math.isinf)):
        grad = torch.ones(5000, dtype=dtype, device=device)
        grad[place] = bad
        assert expected(norm_of([torch.ones(3, dtype=dtype, device=device), grad], norm_type).item())


def test_the_norm_is_taken_after_the_value_clip():
    assert norm_of([torch.full((4,), 100.0)], clip_value=0.5).item() == 1.0


def test_an_infinite_threshold_measures_and_does_not_clip():
    """Also where the norm is infinite: the trainer only wanted to log it."""
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.tensor([1.0, math.inf, 2.0])
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=math.inf)
    optimizer.step()
    assert optimizer.total_norm.item() == math.inf
    assert torch.equal(p.detach(), torch.tensor([-1.0, -math.inf, -2.0]))


def test_total_norm_is_a_value_of_its_step():
    p = torch.zeros(1, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
    assert optimizer.total_norm is None
    logged = []
    for value in (3.0, 4.0):
        p.grad = torch.tensor([value])
        optimizer.step()
        logged.append(optimizer.total_norm)
    assert [norm.item() for norm in logged] == [3.0, 4.0]
    optimizer.param_groups[0]["max_norm"] = None
    optimizer.step()
    assert optimizer.total_norm is None


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_gradients_without_elements(norm_type, device):
    p = torch.ones(0, 3, device=device, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = fastclip.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0, norm_type=norm_type)
    optimizer.step()
    assert optimizer.total_norm.item() == 0
    assert fastclip.clip_grad_norm_([p], 1.0, norm_type).item() == 0


def test_no_gradients_at_all(device):
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
    optimizer.step()
    assert optimizer.total_norm.item() == 0 and optimizer.total_norm.device.type == device
    assert torch.equal(p.detach(), torch.ones(3, device=device))
