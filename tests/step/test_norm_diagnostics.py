"""What an optimizer tells about norms: those of past steps, and those of each parameter."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import LARGE, SHAPES, TINY, give_grads, make_params

falls_back = pytest.mark.falls_back


def exact_norms(params, norm_type=2.0):
    """In float64, of gradients of any size."""
    grads = [
        p.grad.detach().cpu().double() if p.grad is not None and p.numel() else torch.zeros(1).double() for p in params
    ]
    sizes = [max(g.abs().max().item(), 1e-300) for g in grads]
    return [(g / size).norm(norm_type).item() * size for g, size in zip(grads, sizes, strict=True)]


def assert_norms(optimizer, expected, rel=1e-12):
    names, norms = optimizer.norms_by_parameter()
    assert norms.dtype == torch.float64 and norms.device.type == "cpu" and len(names) == len(norms)
    assert norms.tolist() == pytest.approx(expected, rel=rel, abs=0)
    return names


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", [SHAPES, LARGE, TINY], ids=["adversaries", "large", "tiny"])
def test_norms_by_parameter(shapes, dtype, norm_type, device):
    params = make_params(shapes, dtype, device)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, norm_type=norm_type)
    for step in range(2):
        give_grads(params)
        params[step].grad = None
        optimizer.step()
        names = assert_norms(optimizer, exact_norms(params, norm_type))
        assert names == [f"parameter {i} of group 0" for i in range(len(params))]
    _, norms = optimizer.norms_by_parameter()
    assert norms.norm(norm_type).item() == pytest.approx(optimizer.total_norm.item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e150])
def test_norms_of_extreme_gradients(scale, device):
    params = make_params([(5000,), (3,), (40, 50)], torch.float64, device)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=math.inf)
    give_grads(params, scale=scale)
    optimizer.step()
    assert_norms(optimizer, exact_norms(params))


@pytest.mark.parametrize("cls", [fastclip.SGD, fastclip.AdamW, fastclip.Lion])
def test_groups_of_other_dtypes_names_and_offsets(cls, device):
    memory = torch.randn(200, device=device)
    params = [memory[1:90].detach().requires_grad_(), *make_params([(7,), (33,)], torch.bfloat16, device)]
    groups = [{"params": [("a", params[0])]}, {"params": [("b.weight", params[1]), ("c", params[2])]}]
    optimizer = cls(groups, lr=0.1, max_norm=1.0)
    give_grads(params)
    params[0].grad = torch.randn(200, device=device)[3:92]
    optimizer.step()
    assert assert_norms(optimizer, exact_norms(params)) == ["a", "b.weight", "c"]


def test_they_are_those_after_unscaling_and_the_value_clip(device):
    params = make_params([(100,), (3, 5)], device=device)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, clip_value=0.5)
    give_grads(params)
    expected = [p.grad.clamp(-0.5, 0.5).double().norm().item() for p in params]
    for p in params:
        p.grad *= 1024
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1024.0], device=device), torch.zeros(1, device=device)
    optimizer.step()
    assert_norms(optimizer, expected, rel=1e-6)
    optimizer.found_inf = torch.ones(1, device=device)
    optimizer.step()
    assert optimizer.norms_by_parameter()[1].isnan().all(), "nothing was measured"


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=falls_back)], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_skipped_step_shows_where_it_was_not_finite(value, plain, device):
    params = make_params([(100,), (3, 5)], device=device)
    for settings in ({"skip_nonfinite": True}, {"max_norm": 1.0, "skip_nonfinite": True}, {"max_norm": "quantile"}):
        optimizer = fastclip.SGD(params, lr=0.1, **settings)
        give_grads(params)
        params[1].grad[1, 1] = value
        if plain:
            params[1].grad = params[1].grad.t().contiguous().t()
        optimizer.step()
        _, norms = optimizer.norms_by_parameter()
        assert optimizer.clip_stats().skipped and norms.isfinite().tolist() == [True, False]


@falls_back
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_step_in_plain_torch(norm_type, device):
    params = make_params([(100,), (3, 5), (4,)], device=device)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, norm_type=norm_type, clip_value=0.5)
    give_grads(params)
    params[2].grad = None
    optimizer.step()
    _, expected = optimizer.norms_by_parameter()
    params[1].grad = params[1].grad.t().contiguous().t()
    optimizer.step()
    assert_norms(optimizer, expected.tolist())
    give_grads(params)
    optimizer.step()
    assert_norms(optimizer, [p.grad.clamp(-0.5, 0.5).double().norm(norm_type).item() for p in params], rel=1e-12)


def test_where_there_are_no_norms():
    params = make_params([(3,)])
    give_grads(params)
    for settings in ({}, {"clip_value": 0.5}):
        optimizer = fastclip.SGD(params, lr=0.1, **settings)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the last step took no norm, raised, or there was none: norms_by"):
                optimizer.norms_by_parameter()
            optimizer.step()
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0)
    with pytest.raises(RuntimeError, match="the last step took no norm"):
        optimizer.norms_by_parameter()
    optimizer.step()
    optimizer.add_param_group({"params": make_params([(2,)])})
    with pytest.raises(RuntimeError, match="groups have changed since its last step"):
        optimizer.norms_by_parameter()
    optimizer.step()
    assert_norms(optimizer, exact_norms([*params, torch.zeros(2)]))


def test_after_a_step_that_raised_there_are_none():
    params = make_params([(3,), (5000,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0)
    params[0].grad = torch.ones(3)
    optimizer.step()
    params[1].grad = torch.ones(5000)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="the last step took no norm, raised"):
        optimizer.norms_by_parameter()
    optimizer.step()
    assert_norms(optimizer, exact_norms(params))


@falls_back
def test_a_step_in_plain_torch_that_amp_skips():
    params = make_params([(3, 4), (5,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0)
    give_grads(params)
    params[0].grad = params[0].grad.t().contiguous().t()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert optimizer.norms_by_parameter()[1].isnan().all()


def test_norm_history(device):
    params = make_params([(100,), (3, 5)], device=device)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=fastclip.QuantileNorm(window=4, warmup=2))
    history = optimizer.norm_history()
    assert (history.shape, history.dtype, history.device.type) == ((0,), torch.float64, device)
    norms = []
    for _ in range(7):
        give_grads(params)
        optimizer.step()
        norms.append(optimizer.total_norm.item())
        assert optimizer.norm_history().tolist() == norms[-4:]


def test_norm_history_of_a_skip_norm_and_of_none():
    params = make_params([(3,)])
    give_grads(params)
    optimizer = fastclip.SGD(params, lr=0.1, max_norm="ema", skip_norm="quantile")
    optimizer.step()
    assert optimizer.norm_history().tolist() == [optimizer.total_norm.item()]
    for max_norm in (None, 1.0, "ema"):
        with pytest.raises(RuntimeError, match="norm_history needs a fastclip.QuantileNorm"):
            fastclip.SGD(params, lr=0.1, max_norm=max_norm).norm_history()


@pytest.mark.parametrize("settings", [{}, {"max_norm": 2.0}, {"skip_norm": 9.0}, {"max_norm": math.inf}])
def test_thresholds_that_are_numbers(settings, device):
    params = make_params([(3,)], device=device)
    optimizer = fastclip.SGD(params, lr=0.1, **settings)
    give_grads(params)
    for _ in range(2):
        optimizer.step()
        stats = optimizer.clip_stats()
        for name, number in (("max_norm", stats.threshold), ("skip_norm", stats.skip_threshold)):
            assert (number is None) == (name not in settings)
            assert number is None or (number == settings[name] and number.device.type == device)
        optimizer.zero_grad()
