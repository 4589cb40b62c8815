"""fastclip.clipped_accumulation against plain torch: gradients of each micro-batch clipped, then added."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import copy_params

SHAPES = [(7, 5), (33,), (), (130, 70), (0, 3)]
CLIPS = [{"max_norm": 1.0}, {"max_norm": 1e9}, {"max_norm": 0.5, "norm_type": math.inf}, {"clip_value": 0.02}]
CLIPS += [{"clip_value": (-0.01, 0.03), "max_norm": 0.7}, {"max_norm": 1.0, "skip_nonfinite": True}, {}]


def params_of(dtype=torch.float32, device="cpu"):
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]


def give(params, size=1.0, seed=0):
    """Adds random gradients as a backward pass does, and returns them."""
    generator = torch.Generator().manual_seed(seed)
    grads = [size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]
    loss = sum((p * grad).sum() for p, grad in zip(params, grads, strict=True))
    loss.backward()
    return grads


def in_plain_torch(sums, grads, max_norm=None, clip_value=None, norm_type=2.0, skip_nonfinite=False, norm=None):
    """The next sums. `norm` is that of fastclip, which is more exact than torch's."""
    if skip_nonfinite and not all(grad.isfinite().all() for grad in grads):
        return sums
    if clip_value is not None:
        low, high = clip_value if isinstance(clip_value, tuple) else (-clip_value, clip_value)
        grads = [grad.clamp(low, high) for grad in grads]
    if max_norm is not None:
        flat = torch.cat([grad.flatten().double() for grad in grads])
        exact = torch.linalg.vector_norm(flat, norm_type).item()
        assert norm.item() == pytest.approx(exact, rel=1e-6)
        factor = min(1.0, max_norm / (norm.item() + 1e-6))
        grads = [grad * torch.tensor(factor, dtype=torch.float64).to(grad) for grad in grads]
    return [grad if total is None else total + grad for total, grad in zip(sums, grads, strict=True)]


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam, fastclip.SGD, fastclip.AdamW])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_as_plain_torch(clip, dtype, rule, device):
    params = params_of(dtype, device)
    optimizer = rule(params, lr=0.1)
    micro_batch = fastclip.clipped_accumulation(optimizer, **clip)
    for step in range(2):
        sums = [None] * len(params)
        for number, size in enumerate((1.0, 1e-3, 30.0, 0.0)):
            with micro_batch:
                grads = give(params, size, seed=10 * step + number)
            assert (micro_batch.total_norm is None) == ("max_norm" not in clip)
            # The first norm is of the gradients' dtype, as that of clip_grad_norm_: the clip has a more exact one.
            norm = micro_batch.total_norm
            if number == 0 and norm is not None:
                assert norm.item() == pytest.approx(total_norm(grads, clip), rel=1e-6)
                sums = [p.grad.clone() for p in params]
                assert_near(sums, in_plain_torch([None] * len(params), grads, **clip, norm=norm), dtype)
                continue
            sums = in_plain_torch(sums, grads, **clip, norm=norm)
            assert all(torch.equal(p.grad, total) for p, total in zip(params, sums, strict=True)), number
        optimizer.step()
        optimizer.zero_grad()


def total_norm(grads, clip):
    clipped = grads
    if "clip_value" in clip:
        low, high = clip["clip_value"]
        clipped = [grad.clamp(low, high) for grad in grads]
    flat = torch.cat([grad.flatten().double() for grad in clipped])
    return torch.linalg.vector_norm(flat, clip.get("norm_type", 2.0)).item()


def assert_near(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=8 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-6,
                                   atol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_sums_are_rounded_once(dtype):
    params = params_of(dtype)
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0)
    with micro_batch:
        give(params, 0.01)
    before = [p.grad.clone() for p in params]
    with micro_batch:
        grads = give(params, 1.0, seed=1)
    factor = torch.tensor(1.0 / (micro_batch.total_norm.item() + 1e-6)).float()
    for p, total, grad in zip(params, before, grads, strict=True):
        assert torch.equal(p.grad, (total.float() + grad.float() * factor).to(dtype))


def test_a_large_micro_batch_moves_the_sum_by_no_more_than_the_limit():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0)
    with micro_batch:
        give(params, 0.01)
    before = [p.grad.clone() for p in params]
    with micro_batch:
        give(params, 1e6, seed=1)
    change = torch.cat([(p.grad - total).flatten() for p, total in zip(params, before, strict=True)])
    assert change.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_parameters_without_gradients_in_some_micro_batches():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1e9)
    with micro_batch:
        give(params[:2])
    first = [p.grad.clone() for p in params[:2]]
    assert params[3].grad is None
    with micro_batch:
        second = give(params[1:], seed=1)
    assert torch.equal(params[0].grad, first[0])
    assert torch.equal(params[1].grad, first[1] + second[0])
    assert torch.equal(params[3].grad, second[2])
    with micro_batch:
        pass
    assert torch.equal(params[0].grad, first[0])


def test_sums_stay_the_same_tensors_and_gradients_from_before_count():
    params = params_of()
    give(params)
    sums, values = [p.grad for p in params], [p.grad.clone() for p in params]
    with fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1e9):
        grads = give(params, seed=1)
    for p, total, value, grad in zip(params, sums, values, grads, strict=True):
        assert p.grad is total and total.grad is None
        assert torch.equal(total, value + grad)


@pytest.mark.parametrize("number", [0, 1])
def test_a_nonfinite_micro_batch_is_left_out_and_counted(number):
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0, skip_nonfinite=True)
    taken = []
    for k in range(3):
        with micro_batch:
            taken.append(give(params, 1e-3, seed=k))
            if k == number:
                params[1].grad[3] = math.nan
    expected = [sum(each) for each in zip(*(g for k, g in enumerate(taken) if k != number), strict=True)]
    for p, total in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, total)
    assert micro_batch.skipped.item() == 1


def test_an_error_in_the_backward_pass_leaves_the_sums():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0)
    with micro_batch:
        give(params)
    before = [(p.grad, p.grad.clone()) for p in params]
    with pytest.raises(ZeroDivisionError), micro_batch:
        give(params, seed=1)
        raise ZeroDivisionError
    for p, (total, value) in zip(params, before, strict=True):
        assert p.grad is total and torch.equal(total, value)
    with micro_batch:  # goes on
        give(params, seed=2)
    assert not torch.equal(params[0].grad, before[0][1])


@pytest.mark.falls_back
@pytest.mark.parametrize("number", [0, 1])
def test_a_gradient_that_cannot_be_added_leaves_the_sums(number):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    linear = torch.nn.Linear(3, 2)
    params = [*linear.parameters(), embedding.weight]
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0)
    if number:
        with micro_batch:
            linear(torch.ones(3)).sum().backward()
    before = [p.grad if p.grad is None else p.grad.clone() for p in params]
    with pytest.raises((TypeError, ValueError), match="sparse"), micro_batch:
        linear(embedding(torch.tensor([1, 2]))).sum().backward()
    for p, value in zip(params, before, strict=True):
        assert (p.grad is None) if value is None else torch.equal(p.grad, value)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-3])
def test_with_a_scaler_limits_are_unscaled_and_sums_stay_scaled(scale):
    params, twins = params_of(), None
    twins = copy_params(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))
    scaled = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1.0, scaler=scaler)
    plain = fastclip.clipped_accumulation(torch.optim.SGD(twins, 0.1), max_norm=1.0, clip_value=1e30)
    for k in range(3):
        with scaled:
            give(params, scale * 10**k, seed=k)
        with plain:
            give(twins, 10**k, seed=k)
        torch.testing.assert_close(scaled.total_norm, plain.total_norm, rtol=1e-6, atol=0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, scale * q.grad)


def test_an_overflow_reaches_the_scaler():
    params = params_of()
    optimizer = fastclip.SGD(params, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    micro_batch = fastclip.clipped_accumulation(optimizer, max_norm=1.0, scaler=scaler)
    scaler.scale(torch.ones(1))
    before = [p.detach().clone() for p in params]
    for k in range(2):
        with micro_batch:
            give(params, seed=k)
            if k == 0:
                params[0].grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm"),
        ({"max_norm": math.nan}, ValueError, "max_norm"),
        ({"clip_value": (1.0, -1.0)}, ValueError, "clip_value"),
        ({"max_norm": 1.0, "norm_type": 3.0}, ValueError, "norm_type"),
        ({"max_norm": [1.0]}, TypeError, "max_norm"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, error, match):
    with pytest.raises(error, match=match):
        fastclip.clipped_accumulation(torch.optim.SGD(params_of(), 0.1), **settings)


def test_what_is_no_optimizer_is_named():
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        fastclip.clipped_accumulation(params_of(), max_norm=1.0)


def test_entering_twice_is_refused_and_loses_nothing():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm=1e9)
    with micro_batch:
        give(params)
        with pytest.raises(RuntimeError, match="at work already"):
            micro_batch.__enter__()
    assert all(p.grad is not None for p in params)


def test_step_in_backward_is_refused():
    model = torch.nn.Linear(3, 2)
    optimizer = fastclip.SGD(model.parameters(), 0.1)
    micro_batch = fastclip.clipped_accumulation(optimizer, max_norm=1.0)
    fastclip.step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="step_in_backward"), micro_batch:
        pass


RULES = {
    "quantile": fastclip.QuantileNorm(0.5, scale=0.8, window=5, warmup=2),
    "ema": {"rule": "ema", "z": 0.0, "decay": 0.8, "warmup": 2},
}
SIZES = (1.0, 3.0, 2.0, 0.5, 30.0, math.nan, 1.0, 4.0, 2.0, 0.0, 5.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cls", [torch.optim.SGD, fastclip.AdamW])
def test_a_rule_looks_at_the_norms_of_micro_batches(cls, rule, device):
    """As an optimizer that steps on each of them; over steps, in which the sums are other tensors."""
    params = params_of(torch.float64, device)
    micro_batch = fastclip.clipped_accumulation(cls(params, lr=0.1), max_norm=RULES[rule], skip_norm=1e9)
    alone = fastclip.SGD([torch.zeros(1, dtype=torch.float64, device=device, requires_grad=True)], max_norm=RULES[rule])
    (one,) = alone.param_groups[0]["params"]
    expected = [torch.zeros_like(p) for p in params]
    for number, size in enumerate(SIZES):
        if number % 4 == 0:
            for p, total in zip(params, expected, strict=True):
                p.grad = None
                total.zero_()
        with micro_batch:
            grads = give(params, size, seed=number)
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        one.grad = norm.reshape(1)
        alone.step()
        stats = alone.clip_stats()
        torch.testing.assert_close(micro_batch.threshold, stats.threshold, rtol=1e-12, atol=0)
        if math.isfinite(size):
            torch._foreach_add_(expected, torch._foreach_mul(grads, stats.clip_coefficient.item()))
        for p, total in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, total, rtol=1e-10, atol=1e-12)
    assert micro_batch.skipped == 1 and micro_batch.threshold < math.inf


def test_what_a_rule_remembers_is_saved_and_loaded(tmp_path):
    params = params_of()
    optimizer = torch.optim.SGD(params, 0.1)
    settings = {"max_norm": "quantile", "skip_norm": {"rule": "ema", "warmup": 2}}
    first = fastclip.clipped_accumulation(optimizer, **settings)
    for number in range(12):
        with first:
            give(params, seed=number)
    assert first.state_dict().keys() == {"clip_history", "skip_history"}
    torch.save(first.state_dict(), tmp_path / "micro_batch.pt")
    second = fastclip.clipped_accumulation(optimizer, **settings)
    second.load_state_dict(torch.load(tmp_path / "micro_batch.pt"))
    for number in range(12, 15):
        for micro_batch in (first, second):
            with micro_batch:
                give(params, seed=number)
        assert torch.equal(first.threshold, second.threshold)
    assert first.threshold < math.inf


def test_micro_batches_above_skip_norm_are_left_out():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), skip_norm=500.0)
    for size in (1.0, 1e6, 1.0):
        with micro_batch:
            give(params, size)
    expected = [2 * p.grad for p in params]
    for p in params:
        p.grad = None
    for _ in range(2):
        grads = give(params)
    assert micro_batch.skipped == 1
    for total, grad in zip(expected, grads, strict=True):
        torch.testing.assert_close(total, 4 * grad)


def test_limits_of_0_and_bounds_that_are_arrays():
    params = params_of()
    for settings, largest in (
        ({"clip_value": 0, "max_norm": 1.0}, 0.0),
        ({"skip_norm": 0.0}, 0.0),
        ({"clip_value": torch.tensor([-1.0, 1.0])}, 1.0),
    ):
        micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), **settings)
        with micro_batch:
            give(params, 10.0)
        assert max(p.grad.abs().max().item() for p in params if p.numel()) == largest
        for p in params:
            p.grad = None


def test_a_micro_batch_without_gradients_forgets_nothing():
    params = params_of()
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, 0.1), max_norm="quantile")
    for number in range(3):
        with micro_batch:
            give(params, seed=number)
    before = micro_batch.state_dict()["clip_history"]
    with micro_batch:
        pass
    assert torch.equal(micro_batch.state_dict()["clip_history"], before) and before[0] == 3
