"""fastclip.clip_grad_value_ and clip_grad_norm_ against those of torch.nn.utils."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import LARGE, SHAPES, TINY, copy_params, give_grads, make_params, param

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def two(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    ours = make_params(shapes, dtype, device)
    theirs = copy_params(ours)
    give_grads(ours, theirs)
    return ours, theirs


def assert_same_grads(ours, theirs, rtol=0):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=rtol * 0.1, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_has_the_bits_of_torch(dtype, device):
    ours, theirs = two(dtype=dtype, device=device)
    for p in theirs:
        p.grad.clamp_(-0.3, 0.3)
    assert fastclip.clip_grad_value_(ours, 0.3) is None
    assert_same_grads(ours, theirs)


def test_value_bounds_are_rounded_like_those_of_clamp():
    for dtype in DTYPES:
        p = torch.zeros(4, dtype=dtype, requires_grad=True)
        p.grad = torch.tensor([-1, 1, 0.1, math.nan], dtype=dtype)
        expected = p.grad.clamp(-0.1, 0.1)
        fastclip.clip_grad_value_(p, 0.1)
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0, equal_nan=True)


def test_value_takes_a_pair():
    ours, theirs = two()
    for p in theirs:
        p.grad.clamp_(-0.1, 0.4)
    fastclip.clip_grad_value_(ours, (-0.1, 0.4))
    assert_same_grads(ours, theirs)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, "inf", 1.0, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_agrees_with_torch(norm_type, max_norm, dtype, device):
    ours, theirs = two([s for s in SHAPES if 0 not in s], dtype, device)  # torch has no inf norm of nothing
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    norm = fastclip.clip_grad_norm_(ours, max_norm, norm_type)
    rtol = 2e-6 if dtype == torch.float32 else 1e-12
    assert norm.dtype == expected.dtype and norm.device == expected.device and norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0)
    assert_same_grads(ours, theirs, rtol)


def test_a_norm_below_the_threshold_changes_no_bit():
    ours, theirs = two(SHAPES + TINY + LARGE)
    fastclip.clip_grad_norm_(ours, 1e6)
    assert_same_grads(ours, theirs)


def test_norm_of_16_bit_gradients_is_float32(device):
    """torch returns it in float16, where it overflows."""
    p = torch.zeros(1000, dtype=torch.float16, device=device, requires_grad=True)
    p.grad = torch.full_like(p, 3e4)
    norm = fastclip.clip_grad_norm_(p, 1.0)
    assert norm.dtype == torch.float32
    assert math.isclose(norm.item(), p.grad.new_tensor(3e4).item() * 1000**0.5, rel_tol=1e-6)
    torch.testing.assert_close(p.grad, torch.full_like(p.grad, 1 / 1000**0.5))


def test_generators_tensors_and_parameters_without_gradients(device):
    ours, theirs = two(device=device)
    ours[2].grad = theirs[2].grad = None
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    fastclip.clip_grad_norm_((p for p in ours), 1.0)
    fastclip.clip_grad_value_((p for p in ours), 0.05)
    fastclip.clip_grad_value_(ours[3], 0.01)
    for p in theirs:
        if p.grad is not None:
            p.grad.clamp_(-0.05, 0.05)
    theirs[3].grad.clamp_(-0.01, 0.01)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-8)


def test_no_gradients_is_a_no_op(device):
    p = torch.zeros(3, device=device, requires_grad=True)
    fastclip.clip_grad_value_([p], 0.1)
    norm = fastclip.clip_grad_norm_([p], 0.1)
    assert norm.item() == 0 and norm.device.type == device and p.grad is None
    assert fastclip.clip_grad_norm_([], 0.1).item() == 0


def test_a_gradient_given_twice_counts_once():
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0])
    assert fastclip.clip_grad_norm_([p, p], 1.0).item() == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_error_if_nonfinite_changes_nothing(bad):
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([bad, 4.0])
    for module in (torch.nn.utils, fastclip):  # in torch's words
        with pytest.raises(RuntimeError, match="total norm of order 2.0 for gradients from `parameters` is non-finite"):
            module.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad[1].item() == 4.0


def test_non_finite_gradients_as_in_torch():
    for bad in (math.inf, -math.inf, math.nan):
        results = []
        for clip in (torch.nn.utils.clip_grad_norm_, fastclip.clip_grad_norm_):
            p = torch.zeros(3, requires_grad=True)
            p.grad = torch.tensor([1.0, bad, 2.0])
            clip([p], 1.0)
            results.append(p.grad)
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("value", [-0.1, math.nan, (0.2, 0.1), (math.nan, 1.0), (1.0,), (1.0, 2.0, 3.0)])
def test_bad_clip_values_are_refused(value):
    (p,), _ = two([(3,)])
    before = p.grad.clone()
    with pytest.raises(ValueError, match="clip_value"):
        fastclip.clip_grad_value_([p], value)
    assert torch.equal(p.grad, before)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_bad_thresholds_are_refused(max_norm):
    (p,), _ = two([(3,)])
    before = p.grad.clone()
    with pytest.raises(ValueError, match="max_norm"):
        fastclip.clip_grad_norm_([p], max_norm)
    assert torch.equal(p.grad, before)


def test_layouts(device):
    """In place on whatever memory a gradient has: transposed, channels last, a strided view."""
    grads = [
        torch.randn(20, 30, device=device).t(),
        torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last),
        torch.randn(10, 10, device=device)[:, ::2],
    ]
    ours = [torch.zeros(g.shape, device=device, requires_grad=True) for g in grads]
    theirs = copy_params(ours)
    for p, q, g in zip(ours, theirs, grads, strict=True):
        p.grad, q.grad = g, g.clone()
    norm, expected = fastclip.clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected)
    fastclip.clip_grad_value_(ours, 0.01)
    torch.nn.utils.clip_grad_value_(theirs, 0.01)
    assert_same_grads(ours, theirs, 2e-6)
    assert all(p.grad is g for p, g in zip(ours, grads, strict=True))


def test_clip_functions_change_nothing_when_they_raise():
    a, c = param(2), torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    c.grad = torch.ones_like(c)
    a.grad *= 5
    with pytest.raises(TypeError, match="complex64"):
        fastclip.clip_grad_value_([a, c], 0.1)
    with torch.inference_mode():
        inference = torch.full((2,), 5.0)
    b = torch.zeros(2, requires_grad=True)
    b.grad = inference
    for clip in (fastclip.clip_grad_value_, fastclip.clip_grad_norm_):
        with pytest.raises(RuntimeError, match="inference tensor"):
            clip([a, b], 0.1)
    assert a.grad.tolist() == [5, 5] and inference.tolist() == [5, 5]


def test_the_norm_of_clip_grad_norm_holds_no_graph():
    z, w = torch.randn(4, 8, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    w.grad = (z * 2)[:, ::2]
    assert not fastclip.clip_grad_norm_([w], 1.0).requires_grad


@pytest.mark.parametrize("clip", [fastclip.clip_grad_value_, fastclip.clip_grad_norm_])
def test_gradients_that_can_not_be_clipped_are_named_and_no_other_is_changed(clip):
    """torch finds out when it has clipped those before them."""
    name = "max_norm" if clip is fastclip.clip_grad_norm_ else "clip_value"
    first, sparse, expanded = param(2), param(4), param(4)
    first.grad *= 5
    sparse.grad = torch.ones(4).to_sparse()
    expanded.grad = torch.ones(1).expand(4)
    with pytest.raises(TypeError, match=f"{name} .*gradient of parameter 1: torch.float32, torch.sparse_coo"):
        clip([first, sparse], 0.1)
    with pytest.raises(RuntimeError, match=f"{name} .*gradient of parameter 1 is an expanded view"):
        clip([first, expanded], 0.1)
    assert first.grad.tolist() == [5, 5] and expanded.grad.tolist() == [1] * 4


@pytest.mark.parametrize("clip", [fastclip.clip_grad_value_, fastclip.clip_grad_norm_])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.bool], ids=str
)
def test_gradients_of_other_dtypes_are_named_and_nothing_is_changed(dtype, clip):
    """Integers would be rounded to 0, without a word."""
    first, p = param(2), torch.ones(3).to(dtype)
    p.grad = torch.ones(3).to(dtype)
    first.grad *= 5
    with pytest.raises(TypeError, match=f"gradient of parameter 1: {dtype}"):
        clip([first, p], 0.1)
    assert first.grad.tolist() == [5, 5] and p.grad.float().tolist() == [1] * 3


def test_lazily_negated_and_conjugated_gradients():
    """Where the same memory means the opposite sign."""
    z = torch.randn(5, dtype=torch.complex64)
    for clip, expected in (
        (lambda p: fastclip.clip_grad_value_(p, 0.3), (-z.imag).clamp(-0.3, 0.3)),
        (lambda p: fastclip.clip_grad_norm_(p, 0.5), -z.imag * 0.5 / z.imag.norm()),
    ):
        for grad in (z.clone().conj().imag, torch._neg_view(z.imag.clone())):  # with gaps, and dense
            p = torch.zeros(5, requires_grad=True)
            p.grad = grad
            assert p.grad.is_neg()
            clip(p)
            torch.testing.assert_close(p.grad.resolve_neg(), expected, rtol=1e-5, atol=1e-7)
    q = torch.zeros(5, dtype=torch.complex64, requires_grad=True)
    q.grad = z.clone().conj()
    assert q.grad.is_conj()
    norm = fastclip.clip_grad_norm_(q, 0.5)
    torch.testing.assert_close(norm, torch.view_as_real(z).norm())
    torch.testing.assert_close(q.grad.resolve_conj(), z.conj() * 0.5 / norm)


def test_complex_gradients_are_scaled_by_the_norm_of_all():
    for norm_type in (2.0, math.inf, 1.0):
        results = []
        for module in (torch.nn.utils, fastclip):
            c, p = torch.zeros(3, dtype=torch.complex64, requires_grad=True), param(4)
            c.grad = torch.tensor([3 + 4j, 1j, -2])
            norm = module.clip_grad_norm_([p, c], 1.0, norm_type)
            results.append([norm, p.grad, c.grad])
        torch.testing.assert_close(*results, rtol=2e-6, atol=0)


def test_an_infinite_threshold_measures_and_does_not_clip():
    """torch makes NaN of all gradients where the norm is infinite."""
    p = param(3)
    p.grad = torch.tensor([1.0, math.inf, 2.0])
    assert fastclip.clip_grad_norm_(p, math.inf).item() == math.inf
    assert p.grad.tolist() == [1.0, math.inf, 2.0]


@pytest.mark.parametrize("scale", [3e19, 1e20, 1e37])
def test_very_large_gradients_are_scaled_and_do_not_vanish(scale, device):
    """torch's float32 sum of squares is infinite, and all gradients become 0."""
    p = torch.zeros(2, device=device, requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0], device=device) * scale
    assert math.isclose(fastclip.clip_grad_norm_(p, 1.0).item(), 5 * scale, rel_tol=1e-6)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8], device=device))
