"""What clip_stats() says a step did to the gradients, against what plain torch finds in them."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import CLIPS, LARGE, SHAPES, TINY, give_grads, make_params

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
falls_back = pytest.mark.falls_back


def count_clamped(params, low, high):
    """How many elements `clamp_` moves: a NaN is not equal to itself, and not moved."""
    grads = [p.grad for p in params]
    return sum(((g.clamp(low, high) != g) & ~g.isnan()).sum().item() for g in grads), sum(g.numel() for g in grads)


RULES = {"plain": (fastclip.SGD, {}), "momentum": (fastclip.SGD, {"momentum": 0.9}), "adam": (fastclip.AdamW, {})}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_it_says_what_the_clip_did(clip, dtype, rule, device):
    params = make_params(SHAPES + LARGE, dtype, device)
    cls, settings = RULES[rule]
    optimizer = cls(params, lr=0.1, **settings, **CLIPS[clip])
    for scale in (3.0, 1e-4, 1.0):
        give_grads(params, scale=scale)
        optimizer.step()
        stats = optimizer.clip_stats()
        value = CLIPS[clip].get("clip_value")
        if value is None:
            assert stats.clamped_fraction is None
        else:
            low, high = value if isinstance(value, tuple) else (-value, value)
            moved, of = count_clamped(params, low, high)
            assert stats.clamped_fraction.item() == moved / of and (moved > 0) == (scale > 1e-3)
        if "max_norm" not in CLIPS[clip]:
            assert stats.total_norm is stats.clip_coefficient is None
        else:
            assert torch.equal(stats.total_norm, optimizer.total_norm)
            expected = min(1.0, CLIPS[clip]["max_norm"] / (stats.total_norm.item() + 1e-6))
            assert stats.clip_coefficient.item() == expected
        assert stats.skipped.dtype == torch.bool and not stats.skipped and stats.skipped_steps == 0
        for number in stats:
            assert number is None or number.device.type == device and number.shape == ()


@pytest.mark.parametrize("threads", [1, 2])
def test_clamped_elements_of_many_tensors_and_threads_are_all_counted(threads, device):
    torch.set_num_threads(threads)
    params = make_params(TINY + LARGE * 3, device=device)
    optimizer = fastclip.SGD(params, lr=0.1, clip_value=0.7, max_norm=1.0)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
        moved, of = count_clamped(params, -0.7, 0.7)
        assert optimizer.clip_stats().clamped_fraction.item() == moved / of


def test_nan_is_not_clamped_and_inf_is(device):
    p = torch.zeros(1000, device=device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    p.grad[::10] = math.nan
    p.grad[1::10] = math.inf
    p.grad[2::10] = 0.5  # the bound itself
    optimizer = fastclip.SGD([p], clip_value=0.5)
    optimizer.step()
    assert optimizer.clip_stats().clamped_fraction.item() == 0.1


def test_the_fraction_is_of_the_groups_with_a_value_clip(device):
    params = make_params([(100,), (300,), (1000,), (50,)], device=device)
    groups = [
        {"params": params[:1], "clip_value": 0.5},
        {"params": params[1:2], "clip_value": (-math.inf, 0.0)},
        {"params": params[2:3]},
        {"params": params[3:], "clip_value": 0.5},
    ]
    optimizer = fastclip.SGD(groups, lr=0.1)
    give_grads(params)
    params[3].grad = None
    optimizer.step()
    moved = count_clamped(params[:1], -0.5, 0.5)[0] + count_clamped(params[1:2], -math.inf, 0.0)[0]
    assert optimizer.clip_stats().clamped_fraction.item() == moved / 400
    for group in optimizer.param_groups:
        group["clip_value"] = None
    optimizer.step()
    assert optimizer.clip_stats().clamped_fraction is None, "of an earlier step"


@falls_back
@pytest.mark.parametrize("transposed", [False, True], ids=["kernels", "plain torch"])
def test_clamped_elements_are_counted_under_an_infinite_norm(transposed, device):
    """Gradients so small that they would vanish in the units that a small coefficient asks for."""
    wild, tiny = make_params([(3, 2), (4, 5)], device=device)
    wild.grad, tiny.grad = torch.full_like(wild, math.inf), torch.full_like(tiny, 1e-20)
    tiny.grad[0] = 1e-31
    if transposed:
        tiny.grad = tiny.grad.t().contiguous().t()
    optimizer = fastclip.SGD([{"params": [wild]}, {"params": [tiny], "clip_value": 1e-30}], lr=0.1, max_norm=1.0)
    optimizer.step()
    moved, of = count_clamped([tiny], -1e-30, 1e-30)
    assert optimizer.total_norm.item() == math.inf and moved == 15
    assert optimizer.clip_stats().clamped_fraction.item() == moved / of


@pytest.mark.parametrize("clip", ["value", "norm", "value and norm"])
def test_skipped_steps_say_so(clip, device):
    params = make_params(SHAPES, device=device)
    optimizer = fastclip.SGD(params, lr=0.1, skip_nonfinite=True, **CLIPS[clip])
    for bad, skips in ((1.0, 0), (math.inf, 1), (1.0, 1), (math.nan, 2)):
        give_grads(params, scale=3.0)
        params[6].grad[5] = bad
        optimizer.step()
        stats = optimizer.clip_stats()
        assert bool(stats.skipped) == (not math.isfinite(bad)) and stats.skipped_steps == skips
        if "clip_value" in CLIPS[clip]:
            assert (stats.clamped_fraction == 0) == stats.skipped
        if "max_norm" in CLIPS[clip]:
            assert stats.total_norm.isfinite() != stats.skipped


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize(
    "settings", [{"clip_value": 0.5}, {"max_norm": 1.0}, {"clip_value": 0.5, "max_norm": math.inf}]
)
def test_amp_unscales_first_and_its_skips_are_told(settings, momentum, device):
    params = make_params(SHAPES, device=device)
    optimizer = fastclip.SGD(params, lr=0.1, momentum=momentum, **settings)
    optimizer.grad_scale = torch.tensor(1024.0, device=device)
    for found in (1.0, 0.0, 2.0):  # the first step too, where there is no momentum yet
        optimizer.found_inf = torch.tensor(found, device=device)
        give_grads(params)
        expected = count_clamped(params, -0.5, 0.5)
        for p in params:
            p.grad *= 1024
        optimizer.step()
        stats = optimizer.clip_stats()
        assert bool(stats.skipped) == (found != 0)
        if "clip_value" in settings:
            assert stats.clamped_fraction.item() == (0 if found else expected[0] / expected[1])
        if "max_norm" in settings:
            assert bool(stats.total_norm.isinf()) == (found != 0)
            coefficient = settings["max_norm"] / (stats.total_norm.item() + 1e-6)
            assert stats.clip_coefficient.item() == (1.0 if settings["max_norm"] == math.inf else min(1.0, coefficient))
    assert stats.skipped_steps == 2
    del optimizer.found_inf, optimizer.grad_scale
    optimizer.step()
    assert not optimizer.clip_stats().skipped, "left over from AMP"


def test_the_numbers_are_of_their_step(device):
    """Whoever logs may look later; a step that raises has changed nothing, and this neither."""
    params = make_params([(100,), (7,)], device=device)
    optimizer = fastclip.SGD(params, lr=0.1, clip_value=0.5, max_norm=1.0, max_change=0.2, skip_norm=1e9)
    give_grads(params)
    optimizer.step()
    first = optimizer.clip_stats()
    kept = [number.clone() for number in first]
    give_grads(params, scale=100.0)
    optimizer.step()
    second = optimizer.clip_stats()
    assert all(map(torch.equal, first, kept)) and not torch.equal(first.total_norm, second.total_norm)
    optimizer.param_groups[0]["lr"] = math.nan
    give_grads(params)
    with pytest.raises(ValueError):
        optimizer.step()
    assert all(map(torch.equal, optimizer.clip_stats(), second))


def test_before_the_first_step_and_without_gradients(device):
    params = make_params([(100,)], device=device)
    optimizer = fastclip.SGD(params, clip_value=0.5, max_norm=0.25, max_relative_change=0.03, skip_norm=9.0)
    before = optimizer.clip_stats()
    assert before.total_norm is before.clip_coefficient is before.clamped_fraction is before.change is None
    assert not before.skipped and before.skipped_steps == 0
    optimizer.step()
    stats = optimizer.clip_stats()
    assert (stats.total_norm, stats.clip_coefficient, stats.clamped_fraction, stats.change) == (0, 1, 0, 0)
    assert (stats.threshold, stats.skip_threshold) == (0.25, 9)
    assert {number.device.type for number in stats} == {device}


@falls_back
@pytest.mark.parametrize("clip", [clip for clip in CLIPS if clip != "none"])
def test_plain_torch_says_the_same(clip):
    """A gradient in another memory layout than its parameter leaves the kernels."""
    params = make_params([(20, 30), (500,)])
    optimizer = fastclip.SGD(params, lr=0.1, **CLIPS[clip])
    give_grads(params)
    optimizer.step()
    expected = optimizer.clip_stats()
    params[0].grad = params[0].grad.t().contiguous().t()
    optimizer.step()
    found = optimizer.clip_stats()
    for ours, plain in zip(expected, found, strict=True):
        assert (ours is None) == (plain is None)
        assert ours is None or torch.allclose(ours.double(), plain.double(), rtol=1e-6, atol=0)


@falls_back
def test_plain_torch_tells_of_its_skips():
    params = make_params([(20, 30), (500,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, clip_value=0.5, skip_nonfinite=True)
    give_grads(params)
    params[0].grad = params[0].grad.t().contiguous().t()
    params[1].grad[3] = math.nan
    optimizer.step()
    stats = optimizer.clip_stats()
    assert stats.skipped and stats.clamped_fraction == 0 and stats.total_norm.isnan() and stats.skipped_steps == 1
    give_grads(params)
    optimizer.step()
    stats = optimizer.clip_stats()
    assert not stats.skipped and stats.clamped_fraction > 0 and stats.skipped_steps == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nonfinite_gradient_is_named(bad, device):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)).to(device)
    named = list(model.named_parameters())
    groups = [{"params": named[:1]}, {"params": named[1:]}]
    optimizer = fastclip.SGD(groups, lr=0.1, skip_nonfinite=True)
    assert optimizer.first_nonfinite() is None, "no gradients yet"
    give_grads(list(model.parameters()))
    model[0].weight.grad = None
    optimizer.step()
    assert optimizer.first_nonfinite() is None
    model[1].weight.grad[1, 3] = bad
    model[2].bias.grad[0] = bad
    optimizer.step()
    assert optimizer.clip_stats().skipped
    assert optimizer.first_nonfinite() == "parameter 1 of group 1 ('1.weight')"
    unnamed = fastclip.SGD(model.parameters(), lr=0.1)
    assert unnamed.first_nonfinite() == "parameter 2 of group 0"


def test_sparse_gradients_are_looked_through():
    p = torch.zeros(10, 3, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=0.1)
    for value, found in ((1.0, None), (math.inf, "parameter 0 of group 0")):
        p.grad = torch.sparse_coo_tensor([[2, 5]], torch.full((2, 3), value), (10, 3))
        assert optimizer.first_nonfinite() == found


@pytest.fixture
def another_default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


# How the last step was taken: found_inf of AMP, and whether in plain torch.
LAST_STEPS = {"taken": (0.0, False), "skipped": (1.0, False), "plain torch": (0.0, True), "both": (1.0, True)}


@falls_back
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("last", [None, "no gradients", "int", *LAST_STEPS])
def test_all_is_on_the_parameters_device(last, steps_before, momentum, device, another_default_device):
    """Whatever the last step was, and whatever torch's default device is."""
    params = [torch.zeros(4, 3, device=device, requires_grad=True) for _ in range(2)]
    optimizer = fastclip.SGD(params, lr=0.1, momentum=momentum, clip_value=0.5, max_norm=1.0)
    for p in params:
        p.grad = torch.ones(4, 3, device=device)
    for _ in range(steps_before):
        optimizer.step()
    if last == "no gradients":
        optimizer.zero_grad()
        optimizer.step()
    elif last == "int":  # GradScaler's sum over no gradients
        optimizer.zero_grad()
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), 0
        optimizer.step()
    elif last is not None:
        found_inf, in_plain_torch = LAST_STEPS[last]
        if in_plain_torch:
            params[1].grad = torch.ones(3, 4, device=device).t()
        optimizer.grad_scale = torch.ones((), device=device)
        optimizer.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()
    numbers = [optimizer.skipped_steps, optimizer.total_norm, *optimizer.clip_stats()]
    assert {number.device.type for number in numbers if number is not None} == {device}
    assert optimizer.skipped_steps == (last in ("skipped", "both"))


@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that this torch can use")
    params = make_params(SHAPES, device="cuda")
    optimizer = fastclip.SGD(params, lr=0.1, clip_value=0.5, max_norm=1.0, skip_nonfinite=True)
    give_grads(params)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        stats = optimizer.clip_stats()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.clamped_fraction > 0 and stats.clip_coefficient < 1 and not stats.skipped
