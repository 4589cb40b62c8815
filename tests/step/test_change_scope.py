"""max_change and max_relative_change of SGD, with a norm_scope: for each group, or each parameter."""

import copy
import math

import pytest
import torch

import fastclip
from fastclip.plain import step as reference
from tests.support.cases import SHAPES, assert_close, assert_same_bits, copy_params, give_grads, make_params

R = 0.003
LIMITS = {
    "change": {"max_change": 0.01},
    "relative": {"max_relative_change": R},
    "with a norm": {"max_relative_change": R, "max_norm": 0.5, "clip_value": 0.5},
    "with a rule": {"max_change": 0.05, "max_norm": fastclip.QuantileNorm(0.5, scale=0.9, window=5, warmup=2)},
    "inf": {"max_change": 0.01, "max_relative_change": R, "norm_type": math.inf},
    "measured": {"max_relative_change": math.inf},
    "and skipped": {"max_change": 0.01, "skip_norm": 150.0, "skip_nonfinite": True},
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
}
SCOPES = ("group", "parameter")
every_scope = pytest.mark.parametrize("scope", SCOPES)


def make(kind="float32", shapes=SHAPES, **settings):
    settings = {"lr": 0.1, "momentum": 0.9, **KINDS[kind], **settings}
    params = make_params(shapes, settings.pop("dtype", torch.float32))
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.05, "momentum": 0.5}]
    return fastclip.SGD(groups, **settings), params


def norm_of(tensors):
    tensors = [t.detach().double().flatten() for t in tensors if t is not None]
    return torch.linalg.vector_norm(torch.cat(tensors)).item() if tensors else 0.0


def parts(optimizer, scope):
    for group in optimizer.param_groups:
        yield from (
            (group, part) for part in ([group["params"]] if scope == "group" else [[p] for p in group["params"]])
        )


@every_scope
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_takes_the_same_steps(kind, limit, scope):
    optimizer, ours = make(kind, norm_scope=scope, **LIMITS[limit])
    plain, theirs = copy.deepcopy((optimizer, ours))
    for step in range(7):
        give_grads(theirs, ours, scale=10.0 ** (step % 3 - 1))
        for params in (theirs, ours):
            params[2 * step % len(params)].grad = None
        optimizer.step()
        stats, own = reference.step(plain._rule, plain.param_groups, plain.state), optimizer.clip_stats()
        for name in ("total_norm", "clip_coefficient", "change"):
            expected = getattr(stats, name).item()
            assert getattr(own, name).item() == pytest.approx(expected, rel=2e-6 if kind != "bfloat16" else 1e-2), name
    assert_close(theirs, ours, 1e-6 if kind != "bfloat16" else 2e-2)


@every_scope
@pytest.mark.parametrize("limits", [{"max_change": 0.01}, {"max_relative_change": R}], ids=str)
def test_the_limit_is_the_one_defined(limits, scope):
    optimizer, params = make(shapes=[(30, 20), (7,), (64,), (300,)], norm_scope=scope, **limits)
    free = torch.optim.SGD(copy.deepcopy(optimizer.param_groups), lr=1.0)
    theirs = [p for group in free.param_groups for p in group["params"]]
    for _ in range(4):
        give_grads(theirs, params)
        changes = []
        for (group, part), (_, other) in zip(parts(optimizer, scope), parts(free, scope), strict=True):
            limit = limits.get("max_change", R * norm_of(part))
            change = group["lr"] / (1 - group["momentum"]) * norm_of([p.grad for p in part])
            changes.append(min(limit, change))
            for p in other:
                p.grad *= min(1.0, limit / change)
        optimizer.step()
        free.step()
        assert optimizer.clip_stats().change.item() == pytest.approx(math.hypot(*changes), rel=1e-6)
        assert_close(theirs, params, 1e-6)


@every_scope
def test_groups_have_limits_of_their_own(scope):
    params = make_params([(50,), (60,), (70,)])
    groups = [
        {"params": params[:1], "max_change": 0.01},
        {"params": params[1:2], "max_relative_change": 0.001, "max_change": None},
        {"params": params[2:], "max_change": None},
    ]
    optimizer = fastclip.SGD(groups, lr=0.1, norm_scope=scope)
    give_grads(params)
    before = copy_params(params)
    optimizer.step()
    moved = [norm_of([p.detach() - old.detach()]) for p, old in zip(params, before, strict=True)]
    expected = [0.01, 0.001 * norm_of(before[1:2]), 0.1 * norm_of([params[2].grad])]
    assert moved == pytest.approx(expected, rel=1e-3)


def test_a_group_counts_its_parameters_without_a_gradient():
    used, unused, other = (torch.ones(100, requires_grad=True) for _ in range(3))
    for scope, counted in (("group", 200), ("parameter", 100)):
        optimizer = fastclip.SGD([{"params": [used, unused]}, {"params": [other]}], lr=1.0, norm_scope=scope)
        for group in optimizer.param_groups:
            group["max_relative_change"] = 1e-3
        used.grad = torch.ones(100)
        optimizer.step()
        assert optimizer.clip_stats().change.item() == pytest.approx(1e-3 * math.sqrt(counted), rel=1e-2)


@pytest.mark.parametrize("scope", ["global", *SCOPES])
def test_norms_that_were_remembered_are_not_those_of_others(scope):
    """A tensor that leaves for a step, and comes back, finds its place taken by the one behind it."""
    first, second = torch.full((100,), 1.0, requires_grad=True), torch.full((100,), 3.0, requires_grad=True)
    optimizer = fastclip.SGD([{"params": [first]}, {"params": [second]}], lr=1e-9, norm_scope=scope)
    for group in optimizer.param_groups:
        group["max_relative_change"] = 1e-3
    present = [(True, True), (False, True), (True, True), (True, False), (True, True)]
    for here in present:
        for p, has in zip((first, second), here, strict=True):
            p.requires_grad_(has)
            p.grad = torch.full((100,), 1e12) if has else None
        optimizer.step()
        square = sum(norm_of([p]) ** 2 for p, has in zip((first, second), here, strict=True) if has)
        assert optimizer.clip_stats().change.item() == pytest.approx(1e-3 * math.sqrt(square), rel=2e-3)


@pytest.mark.parametrize("scope", ["global", *SCOPES])
@pytest.mark.parametrize("frozen", [{"lr": 0.0}, {"momentum": 0.9, "dampening": 1.0}], ids=str)
@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_an_inf_that_changes_nothing_limits_nothing(limit, frozen, scope):
    """Not even in groups that it is beside: 0 times inf is no change."""
    ours = make_params([(3,), (4,)])
    theirs = copy_params(ours)

    def make_one(params):
        groups = [{"params": params[:1]}, {"params": params[1:], **frozen}]
        return fastclip.SGD(groups, lr=0.1, momentum=0.5, norm_scope=scope, max_change=limit)

    optimizer, plain = make_one(ours), make_one(theirs)
    give_grads(theirs, ours)
    for params in (theirs, ours):
        params[1].grad[0] = math.inf
    expected = min(limit, 0.2 * norm_of([ours[0].grad]))
    optimizer.step()
    stats = reference.step(plain._rule, plain.param_groups, plain.state)
    assert optimizer.clip_stats().change.item() == pytest.approx(expected, rel=1e-6) == stats.change.item()
    assert not ours[0].isnan().any()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


@every_scope
@pytest.mark.parametrize("limits", [{"max_change": 0.01}, {"max_relative_change": R}], ids=str)
def test_only_an_empty_parameter_has_a_gradient(limits, scope):
    """A step of no elements; the next one is an ordinary one."""
    empty, other = torch.zeros(0, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = fastclip.SGD([empty, other], lr=0.1, norm_scope=scope, **limits)
    empty.grad = torch.zeros(0)
    optimizer.step()
    assert optimizer.clip_stats().change == 0 and torch.equal(other, torch.ones(5))
    other.grad = torch.ones(5)
    optimizer.step()
    assert 0 < optimizer.clip_stats().change <= 0.01 * 1.0001


def test_a_written_parameter_is_measured_anew():
    optimizer, params = make(norm_scope="parameter", max_relative_change=R)
    give_grads(params)
    optimizer.step()
    with torch.no_grad():
        params[4].mul_(7)
    give_grads(params)
    expected = math.hypot(*(R * max(norm_of([p]), 1e-3 * math.sqrt(p.numel())) for p in params))
    optimizer.step()
    assert optimizer.clip_stats().change.item() == pytest.approx(expected, rel=1e-5)


def test_in_the_backward_pass():
    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        settings = {"max_change": 0.05, "max_relative_change": 0.01, "norm_scope": "parameter"}
        return model, fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings)

    (model, optimizer), (other, in_backward) = model_and_optimizer(), model_and_optimizer()
    fastclip.step_in_backward(other, in_backward, bucket_cap_mb=0)
    x = torch.randn(5, 8)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        other(x).square().sum().backward()
    assert_same_bits([*model.parameters()], [*other.parameters()])
