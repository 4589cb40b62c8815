"""max_change and max_relative_change: limits on the change that a gradient makes in the end."""

import copy
import math

import pytest
import torch

import fastclip
from tests.support.cases import (
    LARGE,
    SHAPES,
    assert_close,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
    reference_step,
)

R = 0.03
CLOSE = 1e-7  # parameters of float32 are summed in float32
MOMENTUMS = {
    "none": {},
    "dampening alone": {"dampening": 0.3},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
LIMITS = {
    "change": {"max_change": 0.05},
    "relative": {"max_relative_change": R},
    "both": {"max_change": 0.5, "max_relative_change": R},
    "all": {"max_change": 0.05, "max_relative_change": R, "max_norm": 1.0, "clip_value": 0.5},
    "inf": {"max_change": 0.01, "max_relative_change": R, "norm_type": math.inf},
    "loose": {"max_change": 1e6, "max_relative_change": 1e6},
    "measured": {"max_change": math.inf, "max_relative_change": math.inf},
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True},
}
falls_back = pytest.mark.falls_back
every_limit = pytest.mark.parametrize("limit", LIMITS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_sgd(kind, shapes=SHAPES, **settings):
    """An optimizer, and its parameters."""
    settings = {"lr": 0.1, **KINDS[kind], **settings}
    params = make_params(shapes, settings.pop("dtype", torch.float32))
    return fastclip.SGD(params, **settings), params


def alike(optimizer, params):
    """An optimizer of other parameters, with the settings of this one."""
    return fastclip.SGD(params, **{k: v for k, v in optimizer.param_groups[0].items() if k != "params"})


def norm_of(tensors, norm_type=2.0):
    return torch.linalg.vector_norm(torch.cat([t.detach().double().flatten() for t in tensors]), norm_type).item()


def factor(group):
    momentum = group["momentum"]
    return group["lr"] * (1 - group["dampening"]) / (1 - momentum) if momentum else group["lr"]


def unlimited(optimizer):
    """The change of the gradients as they are, by the definition."""
    norms = []
    for group in optimizer.param_groups:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if group["clip_value"] is not None:
            grads = [grad.clamp(-group["clip_value"], group["clip_value"]) for grad in grads]
        norms.append(factor(group) * norm_of(grads, group["norm_type"]) if grads else 0.0)
    return norm_of([torch.tensor(norms, dtype=torch.float64)], optimizer.param_groups[0]["norm_type"])


def allowed(optimizer, params):
    group = optimizer.param_groups[0]
    limits = [math.inf]
    if group["max_change"] is not None:
        limits.append(group["max_change"])
    if group["max_relative_change"] is not None:
        limits.append(group["max_relative_change"] * norm_of(params, group["norm_type"]))
    return min(limits)


@pytest.mark.parametrize("momentum", MOMENTUMS)
@every_limit
def test_the_change_is_the_one_defined(limit, momentum):
    """By hand, at every step; and the step is torch's with gradients scaled by the factor that the step tells."""
    optimizer, ours = make_sgd("float32", **MOMENTUMS[momentum], **LIMITS[limit], weight_decay=0.01)
    theirs = copy_params(ours)
    plain = torch.optim.SGD(theirs, lr=0.1, **MOMENTUMS[momentum], weight_decay=0.01, foreach=False)
    for step in range(6):
        give_grads(theirs, ours, scale=10.0 ** (step % 4 - 2))
        of_all, most = unlimited(optimizer), allowed(optimizer, ours)
        total = norm_of([p.grad.clamp(-0.5, 0.5) if limit == "all" else p.grad for p in ours], 2.0)
        optimizer.step()
        stats = optimizer.clip_stats()
        coefficient = min(1.0, most / of_all)
        if limit == "all":
            coefficient = min(coefficient, 1.0 / (total + 1e-6))
        assert stats.clip_coefficient.item() == pytest.approx(coefficient, rel=CLOSE)
        assert stats.change.item() == pytest.approx(coefficient * of_all, rel=CLOSE)
        for p in theirs:
            grad = p.grad.clamp(-0.5, 0.5) if limit == "all" else p.grad
            p.grad = grad * stats.clip_coefficient.to(grad.dtype)
        plain.step()
        assert_same_bits(theirs, ours, plain, optimizer)


def test_groups_count_by_their_own_settings_and_all_are_read_at_every_step():
    params = make_params([(50,), (60,), (70,)])
    groups = [
        {"params": params[:1], "lr": 0.5},
        {"params": params[1:2], "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True},
        {"params": params[2:], "lr": 0.01, "momentum": 0.5, "nesterov": True, "clip_value": 0.3},
    ]
    optimizer = fastclip.SGD(groups, max_change=0.1, max_relative_change=R)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(8):
        give_grads(params)
        if step == 3:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.7)
            optimizer.param_groups[1]["momentum"] = 0.5
        if step == 5:
            for group in optimizer.param_groups:
                group["max_change"], group["max_relative_change"] = None, R / 10
        of_all, most = unlimited(optimizer), allowed(optimizer, params)
        optimizer.step()
        stats = optimizer.clip_stats()
        assert stats.change.item() == pytest.approx(min(of_all, most), rel=1e-6 if step >= 3 else CLOSE)
        if step < 3:
            scheduler.step()


@every_kind
@every_limit
def test_plain_torch_takes_the_same_steps(kind, limit):
    optimizer, ours = make_sgd(kind, momentum=0.9, **LIMITS[limit])
    theirs = copy_params(ours)
    plain = alike(optimizer, theirs)
    for step in range(5):
        give_grads(theirs, ours, scale=10.0 ** (step % 3 - 1))
        for params in (theirs, ours):
            params[step].grad = None
        optimizer.step()
        reference_step(plain)
        assert_close(theirs, ours, 1e-6 if ours[0].dtype.itemsize > 2 else 2e-2)


@falls_back
def test_a_step_that_the_kernels_do_not_cover_agrees():
    optimizer, params = make_sgd("float32", [(20, 30), (7,)], momentum=0.9, max_relative_change=R)
    for step in range(6):
        give_grads(params)
        if step % 3 == 2:
            params[0].grad = params[0].grad.t().contiguous().t()
        most = allowed(optimizer, params)
        optimizer.step()
        assert optimizer.clip_stats().change.item() == pytest.approx(most, rel=CLOSE)


@every_kind
def test_scaling_the_gradients_changes_no_bit_where_the_limit_acts(kind):
    """No loss scale, no reduction and no number of frames matters."""
    first, ours = make_sgd(kind, momentum=0.9, max_relative_change=R / 100)
    theirs = copy_params(ours)
    second = alike(first, theirs)
    for _ in range(4):
        give_grads(theirs, ours)
        for p in theirs:
            p.grad = p.grad * 2.0**6
        first.step()
        second.step()
        assert first.clip_stats().clip_coefficient == second.clip_stats().clip_coefficient * 2.0**6 < 1
        assert_same_bits(theirs, ours, second, first)


def test_the_learning_rate_does_not_matter_where_the_limit_acts():
    for momentum in (0, 0.9):
        results = []
        for lr in (2.0**-4, 2.0**4):
            torch.manual_seed(0)
            optimizer, params = make_sgd("float32", lr=lr, momentum=momentum, max_relative_change=1e-4)
            for _ in range(3):
                give_grads(params)
                optimizer.step()
            results.append(params)
        assert_close(*results, 1e-6)


# ---- the norm of the parameters ------------------------------------------------------------------


def check_norm(optimizer, params, counted=None, rel=CLOSE, masters=False):
    """One step under a limit that acts, by the norm that the parameters have now."""
    give_grads(params, scale=100.0)
    now = [p for p in (params if counted is None else counted)]
    if masters:
        now = [optimizer.state.get(p, {}).get("master_param", p) for p in now]
    expected = R * norm_of(now)
    optimizer.step()
    assert optimizer.clip_stats().clip_coefficient < 1
    assert optimizer.clip_stats().change.item() == pytest.approx(expected, rel=rel)


@every_kind
def test_the_norm_is_that_of_the_parameters_as_they_are(kind):
    """The update measures what it stores; and whoever writes in between is noticed."""
    optimizer, params = make_sgd(kind, momentum=0.9, max_relative_change=R)
    masters = kind == "master weights"
    for _ in range(3):
        check_norm(optimizer, params, masters=masters)
    with torch.no_grad():
        target = optimizer.state[params[-1]]["master_param"] if masters else params[-1]
        target.mul_(3.0)
        params[-1].copy_(target)
    check_norm(optimizer, params, masters=masters)
    check_norm(optimizer, params, masters=masters)


def test_writes_of_all_kinds_are_noticed():
    optimizer, params = make_sgd("float32", LARGE, max_relative_change=R)
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList(params)
    check_norm(optimizer, params)
    before = copy.deepcopy(model.state_dict())
    params[0].data = params[0].detach() * 2
    check_norm(optimizer, params)
    model.load_state_dict(before)
    check_norm(optimizer, params)
    torch.nn.init.normal_(params[1], std=5.0)
    check_norm(optimizer, params)
    model.double()
    check_norm(optimizer, params)
    model.float()
    check_norm(optimizer, params)
    replaced = make_params([(500, 3)])[0]
    optimizer.param_groups[0]["params"][1] = params[1] = replaced
    check_norm(optimizer, params)
    del optimizer.param_groups[0]["params"][0], params[0]
    check_norm(optimizer, params)
    optimizer.add_param_group({"params": make_params([(9, 9)])})
    check_norm(optimizer, [p for group in optimizer.param_groups for p in group["params"]])


def test_a_write_past_the_version_counter_is_right_again_after_a_step():
    optimizer, params = make_sgd("float32", max_relative_change=R)
    check_norm(optimizer, params)
    params[3].data.fill_(100.0)  # `.data` has a counter of its own
    give_grads(params)
    optimizer.step()
    check_norm(optimizer, params)


def test_parameters_without_a_gradient_count_and_frozen_ones_do_not():
    params = make_params([(300,), (5000,), (20, 20), (7,)])
    frozen = make_params([(400,)])[0].requires_grad_(False)
    optimizer = fastclip.SGD([*params, frozen], lr=0.1, momentum=0.9, max_relative_change=R)
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = None if i in (step % 4, (step + 1) % 3) else torch.full_like(p, 10.0)
        expected = R * norm_of(params)
        optimizer.step()
        assert optimizer.clip_stats().change.item() == pytest.approx(expected, rel=CLOSE)
        if step == 4:
            with torch.no_grad():
                params[step % 4].mul_(2)  # while it has no gradient


@falls_back
def test_plain_torch_counts_the_same_parameters():
    params = make_params([(300,), (50,), (20, 20)])
    frozen = make_params([(400,)])[0].requires_grad_(False)
    optimizer = fastclip.SGD([*params, frozen], lr=0.1, max_relative_change=R)
    params[2].grad = torch.full((20, 20), 10.0).t().contiguous().t()[:, torch.arange(20)].t()
    params[0].grad = torch.full((300,), 10.0)
    expected = R * norm_of(params)
    optimizer.step()
    assert optimizer.clip_stats().change.item() == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("fallback", [False, True])
def test_a_model_of_zeros_moves(fallback):
    """It is limited as a model whose elements have the size 1e-3, and grows from there."""
    params = [torch.zeros(40, 30, requires_grad=True), torch.zeros(7, requires_grad=True)]
    optimizer = fastclip.SGD(params, lr=0.1, momentum=0.9, max_relative_change=R)
    take = (lambda: reference_step(optimizer)) if fallback else optimizer.step
    sizes = []
    for _ in range(200):
        for p in params:
            p.grad = torch.full_like(p, 5.0)
        take()
        sizes.append(norm_of(params))
    assert sizes[0] == pytest.approx(0.1 * R * 1e-3 * math.sqrt(1207), rel=1e-5)  # the first part of ten
    assert all(a < b for a, b in zip(sizes, sizes[1:], strict=False)) and sizes[-1] > 0.03 * math.sqrt(1207)


def test_a_few_zeros_do_not_hinder_the_rest():
    params = make_params([(100,)]) + [torch.zeros(100, requires_grad=True)]
    optimizer = fastclip.SGD(params, lr=0.1, max_relative_change=R)
    check_norm(optimizer, params)


@pytest.mark.parametrize(
    ("of_params", "of_grads", "dtype"),
    [
        (1e17, 1e18, torch.float32),
        (1e-18, 1e-18, torch.float32),
        (1e30, 1e-30, torch.float32),
        (1e200, 1e150, torch.float64),
        (1e-2, 1e200, torch.float64),
    ],
)
def test_all_finite_numbers_have_a_norm(of_params, of_grads, dtype):
    p = (torch.randn(1000, dtype=torch.float64) * of_params).to(dtype).requires_grad_()
    optimizer = fastclip.SGD([p], lr=1.0, max_relative_change=R)
    for _ in range(2):
        p.grad = (torch.randn(1000, dtype=torch.float64) * of_grads).to(dtype)
        norm = p.detach().double().div(of_params).norm().item() * of_params
        most = R * max(norm, 1e-3 * math.sqrt(1000))
        whole = p.grad.double().div(of_grads).norm().item() * of_grads
        optimizer.step()
        assert optimizer.clip_stats().change.item() == pytest.approx(min(most, whole), rel=1e-6)
        assert p.isfinite().all()


def test_parameters_that_are_not_finite_limit_nothing():
    """An unused parameter may hold anything; `max_change` still holds."""
    params = make_params([(10,), (10,)])
    with torch.no_grad():
        params[1].fill_(math.nan)
    optimizer = fastclip.SGD(params, lr=1.0, max_relative_change=R, max_change=0.5)
    params[0].grad = torch.ones(10)
    optimizer.step()
    assert optimizer.clip_stats().change.item() == pytest.approx(0.5) and params[0].isfinite().all()


# ---- skipped steps, threads, checkpoints ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "master weights"])
def test_a_skipped_step_changes_nothing_and_the_norm_stays_right(kind):
    optimizer, params = make_sgd(kind, momentum=0.9, max_relative_change=R, skip_nonfinite=True)
    masters = kind == "master weights"
    for step in range(5):
        give_grads(params)
        if step in (0, 3):
            params[4].grad.view(-1)[0] = math.nan
            before = copy_params(params)
            optimizer.step()
            assert optimizer.clip_stats().skipped and optimizer.clip_stats().change == 0
            assert_same_bits(before, params)
        check_norm(optimizer, params, masters=masters)


@pytest.mark.parametrize("on_device", [False, True], ids=["host decides", "kernel decides"])
def test_a_step_that_amp_skips(on_device):
    """Also the first one, and one after somebody wrote."""
    optimizer, params = make_sgd("float32", momentum=0.9 if not on_device else 0, max_relative_change=R)
    for step in range(4):
        if step in (0, 2):
            with torch.no_grad():
                params[3].mul_(5)
            give_grads(params)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
            optimizer.step()
            assert optimizer.clip_stats().skipped and optimizer.clip_stats().change == 0
            del optimizer.grad_scale, optimizer.found_inf
        check_norm(optimizer, params)


def test_gradients_are_unscaled_first():
    first, ours = make_sgd("float32", max_relative_change=R, max_change=0.1)
    theirs = copy_params(ours)
    second = fastclip.SGD(theirs, lr=0.1, max_relative_change=R, max_change=0.1)
    second.grad_scale, second.found_inf = torch.tensor(2.0**10), torch.tensor(0.0)
    for _ in range(3):
        give_grads(theirs, ours)
        for p in theirs:
            p.grad = p.grad * 2.0**10
        first.step()
        second.step()
    assert_same_bits(theirs, ours)


@every_kind
def test_a_resumed_training_has_the_bits_of_one_that_went_on(kind):
    """What an update measures has the bits of what is measured anew."""
    first, ours = make_sgd(kind, LARGE, momentum=0.9, max_relative_change=R)
    for step in range(6):
        if step == 3:
            theirs = copy_params(ours)
            second = alike(first, theirs)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        give_grads(*([ours] if step < 3 else [theirs, ours]), scale=10.0)
        first.step()
        if step >= 3:
            second.step()
            assert_same_bits(theirs, ours, second, first)
            assert torch.equal(first.clip_stats().change, second.clip_stats().change)


def test_the_same_bits_on_any_number_of_threads():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            optimizer, params = make_sgd("float32", LARGE * 3, momentum=0.9, max_relative_change=R)
            for _ in range(3):
                give_grads(params, scale=10.0)
                optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert_same_bits(results[0], others)


def test_a_checkpoint_of_torch_keeps_the_limits():
    params = make_params([(5,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_change=0.2, max_relative_change=R)
    optimizer.load_state_dict(torch.optim.SGD(params, lr=0.3).state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["max_change"], group["max_relative_change"]) == (0.3, 0.2, R)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_change", "max_relative_change"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1", [0.1]])
def test_bad_limits_are_refused_by_name(name, value):
    params = make_params([(3,), (4,)])
    with pytest.raises((ValueError, TypeError), match=rf"{name} in param_groups\[0\]"):
        fastclip.SGD(params, lr=0.1, **{name: value})
    optimizer = fastclip.SGD(params, lr=0.1, **{name: 0.1})
    give_grads(params)
    before = copy_params(params)
    optimizer.param_groups[0][name] = value
    with pytest.raises((ValueError, TypeError), match=rf"{name} in param_groups\[0\]"):
        optimizer.step()
    assert_same_bits(before, params)


def test_limits_are_the_same_in_all_groups():
    a, b = make_params([(3,), (4,)])
    with pytest.raises(
        ValueError, match=r"max_relative_change must be the same in all groups: 0.1 in param_groups\[1\]"
    ):
        fastclip.SGD([{"params": [a]}, {"params": [b], "max_relative_change": 0.1}], max_relative_change=0.2)
    optimizer = fastclip.SGD([a], max_change=0.2)
    optimizer.add_param_group({"params": [b]})
    assert optimizer.param_groups[1]["max_change"] == 0.2


@pytest.mark.parametrize("momentum", [1, 1.0, 1.5])
@pytest.mark.parametrize("name", ["max_change", "max_relative_change"])
def test_a_momentum_without_end_is_refused(name, momentum):
    params = make_params([(3,), (4,)])
    match = rf"{name} in param_groups\[1\] needs a momentum below 1"
    with pytest.raises(ValueError, match=match):
        fastclip.SGD([{"params": params[:1]}, {"params": params[1:], "momentum": momentum}], **{name: 0.1})
    optimizer = fastclip.SGD([{"params": params[:1]}, {"params": params[1:]}], **{name: 0.1})
    optimizer.param_groups[1]["momentum"] = momentum
    give_grads(params)
    before = copy_params(params)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert_same_bits(before, params)


@pytest.mark.parametrize(
    "cls",
    [c for c in vars(fastclip).values() if hasattr(c, "_rule") and not (c._rule.change or c._rule.delta)],
    ids=lambda c: c.__name__,
)
def test_other_optimizers_refuse_them(cls):
    for name in ("max_change", "max_relative_change"):
        alone = r"fastclip\.SGD, Adam, AdamW and LAMB alone have it"
        with pytest.raises(ValueError, match=rf"{name} in param_groups\[0\] can't be applied: {alone}"):
            cls(make_params([(3,)]), **{name: 0.1})


def test_a_step_in_the_backward_pass_refuses_them():
    model = torch.nn.Linear(3, 2)
    for name in ("max_change", "max_relative_change"):
        with pytest.raises(ValueError, match=f"step_in_backward can't apply the {name} of"):
            fastclip.step_in_backward(model, fastclip.SGD(model.parameters(), lr=0.1, **{name: 0.1}))


@falls_back
def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = fastclip.SGD(embedding.parameters(), lr=0.1, max_change=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="max_change can't be applied to the sparse gradient"):
        optimizer.step()


def test_a_limit_of_zero_holds_everything():
    for name in ("max_change", "max_relative_change"):
        optimizer, params = make_sgd("float32", **{name: 0})
        before = copy_params(params)
        give_grads(params)
        optimizer.step()
        assert_same_bits(before, params)


@pytest.mark.parametrize("limit", ["max_norm", "max_change", "max_relative_change"])
def test_a_limit_of_zero_is_refused_where_a_norm_is(limit):
    """0 is not False: each rank of FullyShardedDataParallel would take a norm of its own shard."""
    p = make_params([(3,)])[0]
    p._fsdp_flattened = True
    with pytest.raises(TypeError, match=f"{limit} can't be applied to"):
        fastclip.SGD([p], lr=0.1, **{limit: 0})


def test_a_learning_rate_of_zero():
    optimizer, params = make_sgd("float32", lr=0.0, max_change=0.1, max_relative_change=R)
    before = copy_params(params)
    give_grads(params)
    optimizer.step()
    assert_same_bits(before, params)
    assert optimizer.clip_stats().change == 0 and optimizer.clip_stats().clip_coefficient == 1
