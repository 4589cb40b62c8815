"""Limits on what Adam, AdamW and LAMB add to the parameters: max_change, max_relative_change, max_update_rms."""

import copy
import math

import optimi
import pytest
import torch

import fastclip
from fastclip.plain import step as reference
from tests.support.cases import (
    LARGE,
    SHAPES,
    assert_close,
    assert_same_bits,
    copy_params,
    exact_square_roots,
    give_grads,
    make_params,
    through_a_file,
)

SCOPES = ("global", "group", "parameter")
OPTIMIZERS = {
    "AdamW": {"optimizer": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    "Adam": {"optimizer": "Adam", "lr": 0.01, "weight_decay": 0.1, "maximize": True},
    "amsgrad": {"optimizer": "Adam", "lr": 0.01, "amsgrad": True},
    "LAMB": {"optimizer": "LAMB", "lr": 0.01, "weight_decay": 0.1, "max_grad_norm": None},
    "LAMB without decay": {"optimizer": "LAMB", "lr": 0.01, "weight_decay": 0, "use_nvlamb": True},
    "LAMB by L2": {"optimizer": "LAMB", "lr": 0.01, "adam_w_mode": False, "bias_correction": False},
    "LAMB unscaled": {"optimizer": "LAMB", "lr": 0.01, "weight_decay": 0, "grad_averaging": False},
}
LIMITS = {
    "change": {"max_change": 0.01},
    "relative": {"max_relative_change": 1e-3},
    "rms": {"max_update_rms": 0.5},
    "all": {"max_change": 0.5, "max_relative_change": 1e-3, "max_update_rms": 0.3, "max_norm": 1.0},
    "measured": {"max_change": math.inf, "max_update_rms": math.inf},
    "none at all": {"max_change": 0.0},
    "and skipped": {"max_change": 0.01, "max_update_rms": 0.5, "skip_norm": 150.0, "skip_nonfinite": True},
    "after a value clip": {"max_update_rms": 0.5, "clip_value": 0.3},
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "narrow momentum": {"momentum_dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True},
}
OF_KINDS = [(name, "float32") for name in OPTIMIZERS] + [
    (name, kind) for name in ("AdamW", "LAMB") for kind in KINDS if kind != "float32"
]
every_scope = pytest.mark.parametrize("scope", SCOPES)
every_limit = pytest.mark.parametrize("limit", LIMITS)
falls_back = pytest.mark.falls_back


def make(name, kind="float32", shapes=SHAPES, **settings):
    """An optimizer over two groups, and its parameters."""
    settings = {**OPTIMIZERS[name], **KINDS[kind], **settings}
    params = make_params(shapes, settings.pop("dtype", torch.float32))
    return over(params, settings.pop("optimizer"), **settings), params


def over(params, name, **settings):
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": settings["lr"] / 2}]
    return getattr(fastclip, name)(groups, **settings)


def plain_step(optimizer):
    with exact_square_roots():
        return reference.step(optimizer._rule, optimizer.param_groups, optimizer.state)


def steps(count, *param_lists, missing=True):
    """Gradients for one step after the other, of all magnitudes; one parameter has none."""
    for step in range(count):
        give_grads(*param_lists, scale=10.0 ** (step % 3 - 1))
        if missing:
            for params in param_lists:
                params[step % len(params)].grad = None
        yield step


def assert_same_stats(ours, theirs, rel):
    for name in ("total_norm", "clip_coefficient", "clamped_fraction", "skipped", "change", "skip_threshold"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.item() == pytest.approx(b.item(), rel=rel, abs=1e-12, nan_ok=True), name


# ---- against plain torch -------------------------------------------------------------------------


@every_scope
@every_limit
@pytest.mark.parametrize(("name", "kind"), OF_KINDS)
def test_plain_torch_takes_the_same_steps(name, kind, limit, scope):
    optimizer, ours = make(name, kind, norm_scope=scope, **LIMITS[limit])
    plain, theirs = copy.deepcopy((optimizer, ours))
    for _ in steps(5, theirs, ours):
        optimizer.step()
        assert_same_stats(optimizer.clip_stats(), plain_step(plain), 1e-6 if kind in ("float32", "float64") else 1e-3)
    assert_close(theirs, ours, 1e-6 if ours[0].dtype.itemsize > 2 and "momentum" not in kind else 2e-2)


@falls_back
@every_scope
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_a_step_that_the_kernels_do_not_cover_agrees(name, scope):
    optimizer, ours = make(name, norm_scope=scope, **LIMITS["all"])
    plain, theirs = copy.deepcopy((optimizer, ours))
    for step in steps(6, theirs, ours):
        for params in (theirs, ours):
            if step % 2 and params[8].grad is not None:
                params[8].grad = params[8].grad.transpose(0, 2).contiguous().transpose(0, 2)
        optimizer.step()
        assert_same_stats(optimizer.clip_stats(), plain_step(plain), 1e-6)
    assert_close(theirs, ours, 1e-6)


# ---- by the definition ---------------------------------------------------------------------------


def added_by(optimizer, params):
    """What torch's own optimizer adds to each parameter in this step, without decay, in float64."""
    added = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            zeros = torch.zeros_like(p, dtype=torch.float64)
            zeros.grad = p.grad.double()
            one = torch.optim.AdamW([zeros], lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=0)
            state = {k: v.double().clone() for k, v in optimizer.state.get(p, {}).items()}
            one.state[zeros] = state
            one.step()
            added[p] = zeros
    return added


def norm_of(tensors):
    tensors = [tensor.detach().double().flatten() for tensor in tensors]
    return torch.linalg.vector_norm(torch.cat(tensors)).item() if tensors else 0.0


@every_scope
@pytest.mark.parametrize("limits", [{"max_change": 0.02}, {"max_relative_change": 1e-3}], ids=str)
def test_the_limit_is_the_one_defined(limits, scope):
    """What is added to the model, a group or a parameter has at most this norm, and its direction is Adam's."""
    params = make_params([(30, 20), (7,), (64,), (300,)])
    optimizer = fastclip.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, weight_decay=0, **limits)
    for group in optimizer.param_groups:
        group["norm_scope"] = scope
    parts = {"global": [params], "group": [params[:2], params[2:]], "parameter": [[p] for p in params]}[scope]
    for step in steps(4, params, missing=False):
        params[step].grad = None if step else params[step].grad
        wanted, before = added_by(optimizer, params), [p.detach().clone() for p in params]
        sizes = [norm_of(part) for part in parts]
        optimizer.step()
        changes = []
        for part, size in zip(parts, sizes, strict=True):
            limit = limits.get("max_change", limits.get("max_relative_change", 0) * size)
            stepped = [p for p in part if p.grad is not None]
            change = norm_of([wanted[p] for p in stepped])
            factor = min(1.0, limit / change) if stepped else 1.0
            changes.append(change * factor)
            for p in stepped:
                moved = p.detach() - before[[q is p for q in params].index(True)]
                torch.testing.assert_close(moved.double(), wanted[p] * factor, rtol=1e-4, atol=1e-6)
        assert optimizer.clip_stats().change.item() == pytest.approx(math.hypot(*changes), rel=1e-5)


def test_states_see_the_whole_gradient():
    """The learning rate is scaled, and nothing else; a decoupled decay, which is times lr, with it."""
    limited, ours = make("AdamW", max_change=1e-3)
    free, theirs = make("AdamW")
    for _ in steps(3, theirs, ours):
        limited.step()
        free.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(limited.state[p]["exp_avg"], free.state[q]["exp_avg"])
        assert torch.equal(limited.state[p]["exp_avg_sq"], free.state[q]["exp_avg_sq"])


@every_scope
def test_loose_limits_change_no_bit(scope):
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        loose, ours = make(name, norm_scope=scope, max_change=1e9, max_relative_change=1e9, max_update_rms=1e9)
        torch.manual_seed(0)
        free, theirs = make(name)
        if name == "LAMB without decay" or "max_grad_norm" not in OPTIMIZERS[name]:
            for group in (*loose.param_groups, *free.param_groups):
                group["max_norm"] = None
        for _ in steps(3, theirs, ours):
            loose.step()
            free.step()
        assert_same_bits(theirs, ours, free, loose)


def test_a_group_has_a_limit_of_its_own():
    params = make_params([(50,), (60,), (70,)])
    groups = [{"params": params[:1], "max_change": 0.01}, {"params": params[1:2], "max_change": None}]
    optimizer = fastclip.AdamW(groups, lr=0.1, weight_decay=0, norm_scope="group", max_norm=None)
    optimizer.add_param_group({"params": params[2:], "max_change": None, "max_update_rms": 0.1})
    give_grads(params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    moved = [norm_of([p.detach() - old]) for p, old in zip(params, before, strict=True)]
    assert moved[0] == pytest.approx(0.01, rel=1e-4)
    assert moved[1] == pytest.approx(0.1 * math.sqrt(60), rel=1e-4)
    assert moved[2] == pytest.approx(0.1 * 0.1 * math.sqrt(70), rel=1e-4)


def test_a_model_of_zeros_moves():
    for scope in SCOPES:
        p = torch.zeros(100, requires_grad=True)
        optimizer = fastclip.AdamW([p], lr=0.1, max_relative_change=0.5, norm_scope=scope)
        p.grad = torch.ones(100)
        optimizer.step()
        assert norm_of([p]) == pytest.approx(0.5 * 1e-3 * 10, rel=1e-5)


def test_parameters_without_a_gradient_count_in_the_norm_of_all():
    used, unused, frozen = (torch.ones(100, requires_grad=grad) for grad in (True, True, False))
    optimizer = fastclip.AdamW([used, unused, frozen], lr=0.1, weight_decay=0, max_relative_change=1e-3)
    used.grad = torch.ones(100)
    optimizer.step()
    assert optimizer.clip_stats().change.item() == pytest.approx(1e-3 * math.sqrt(200), rel=1e-5)


# ---- the root mean square ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_stable_adamw_is_adamw_with_max_update_rms(decay):
    """torch-optimi's, whose averages are corrected before they are stored: the same to rounding."""
    ours = make_params([(30, 20), (7,), (64,)])
    theirs = copy_params(ours)
    betas, eps = (0.9, 0.99), 1e-6
    optimizer = fastclip.AdamW(ours, lr=0.01, betas=betas, eps=eps, weight_decay=decay, max_update_rms=1.0)
    stable = optimi.StableAdamW(theirs, lr=0.01, betas=betas, eps=eps, weight_decay=decay, foreach=False, triton=False)
    acted = 0
    for step in steps(12, theirs, ours, missing=False):
        for p, q in zip(ours, theirs, strict=True):
            p.grad *= 5.0**step
            q.grad *= 5.0**step
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        stable.step()
        acted += norm_of([ours[0].detach() - before[0]]) < 0.005 * math.sqrt(600)
    assert acted > 0
    assert_close(theirs, ours, 2e-6)


@pytest.mark.parametrize("d", [1.0, 1.1, 4.0])
def test_adafactor_limits_the_same_mean(d):
    """torch's, over a vector. Its averages weigh a step by its number; two steps have the weights of these betas."""
    p = torch.zeros(50, requires_grad=True)
    q = torch.zeros(50, requires_grad=True)
    weight = 2**-0.8
    theirs = torch.optim.Adafactor([q], lr=0.1, d=d, eps=(1e-30, 1.0), weight_decay=0, beta2_decay=-0.8)
    ours = fastclip.AdamW([p], lr=0.1, betas=(0.0, 1 / weight - 1), eps=1e-30, weight_decay=0, max_update_rms=d)
    for scale in (1.0, 10.0):
        give_grads([p], [q], scale=scale)
        before = p.detach().clone()
        theirs.step()
        ours.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    if d < 2:
        assert norm_of([p.detach() - before]) == pytest.approx(0.1 * d * math.sqrt(50), rel=1e-5)


def test_the_mean_square_is_of_the_whole_parameter():
    p = torch.zeros(10_000, requires_grad=True)
    optimizer = fastclip.AdamW([p], lr=1.0, betas=(0.0, 0.9), weight_decay=0, max_update_rms=2.0)
    p.grad = torch.full((10_000,), 1e-3)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.full((10_000,), 1.0)
    optimizer.step()
    relative = 1 / math.sqrt((0.9 * 0.1 * 1e-6 + 0.1) / (1 - 0.81))
    assert relative < 2
    assert norm_of([p.detach() - before]) == pytest.approx(relative * 100, rel=1e-5)
    for group in optimizer.param_groups:
        group["max_update_rms"] = 0.5
    before = p.detach().clone()
    optimizer.step()
    assert norm_of([p.detach() - before]) == pytest.approx(0.5 * 100, rel=1e-3)


# ---- inf and NaN, threads, checkpoints -----------------------------------------------------------


@every_scope
def test_a_step_with_an_inf_is_left_out(scope):
    optimizer, params = make("AdamW", norm_scope=scope, skip_nonfinite=True, **LIMITS["change"], max_update_rms=0.5)
    for _ in steps(2, params):
        optimizer.step()
    before = copy.deepcopy((params, [dict(optimizer.state[p]) for p in params]))
    give_grads(params)
    params[5].grad[3] = math.inf
    optimizer.step()
    stats = optimizer.clip_stats()
    assert stats.skipped and stats.change == 0
    for p, old, state in zip(params, *before, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][name], state[name]) for name in state)


def test_a_nan_stays_in_its_own_parameter():
    optimizer, params = make("AdamW", norm_scope="parameter", max_change=0.01, max_update_rms=0.5)
    give_grads(params)
    params[5].grad[3] = math.nan
    optimizer.step()
    assert params[5].isnan().any() and not any(p.isnan().any() for p in (*params[:5], *params[6:]))


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
@pytest.mark.parametrize("limit", ["change", "all"])
@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads, name, limit):
    """One thread takes the same steps."""
    optimizer, ours = make(name, shapes=LARGE, norm_scope="parameter", **LIMITS[limit])
    alone, theirs = copy.deepcopy((optimizer, ours))
    for _ in steps(3, theirs, ours, missing=False):
        torch.set_num_threads(threads)
        optimizer.step()
        torch.set_num_threads(1)
        alone.step()
    assert_same_bits(theirs, ours, alone, optimizer)


def test_a_resumed_training_goes_on_with_the_same_bits():
    optimizer, ours = make("AdamW", norm_scope="group", **LIMITS["all"])
    for _ in steps(3, ours):
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    theirs = copy_params(ours)
    resumed = over(theirs, "AdamW", lr=1.0)
    resumed.load_state_dict(saved)
    for _ in steps(3, theirs, ours):
        optimizer.step()
        resumed.step()
    assert_same_bits(ours, theirs, optimizer, resumed)


def test_a_checkpoint_without_the_setting_is_loaded():
    optimizer, _ = make("AdamW", max_update_rms=0.5)
    file = optimizer.state_dict()
    for group in file["param_groups"]:
        del group["max_update_rms"]
    other, _ = make("AdamW", max_update_rms=0.25)
    other.load_state_dict(file)
    assert [group["max_update_rms"] for group in other.param_groups] == [0.25, 0.25]


def test_an_older_checkpoint_has_limits_of_no_scope():
    def groups():
        return [{"params": make_params([(3,)]), "max_change": limit} for limit in (0.01, 0.5)]

    optimizer = fastclip.AdamW(groups(), norm_scope="group")
    file = optimizer.state_dict()
    for group in file["param_groups"]:
        for name in ("norm_scope", "max_change", "max_relative_change", "max_update_rms"):
            del group[name]
    optimizer.load_state_dict(file)
    assert [(g["norm_scope"], g["max_change"]) for g in optimizer.param_groups] == [("global", None)] * 2
    give_grads([group["params"][0] for group in optimizer.param_groups])
    optimizer.step()


def test_in_the_backward_pass():
    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        settings = {"max_change": 0.01, "max_relative_change": 0.005, "max_update_rms": 0.5}
        return model, fastclip.AdamW(model.parameters(), lr=0.1, norm_scope="parameter", **settings)

    (model, optimizer), (other, in_backward) = model_and_optimizer(), model_and_optimizer()
    handle = fastclip.step_in_backward(other, in_backward)
    x = torch.randn(5, 8)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        other(x).square().sum().backward()
    assert_same_bits([*model.parameters()], [*other.parameters()])
    handle.remove()
    wide = fastclip.AdamW(other.parameters(), max_change=0.01)
    with pytest.raises(ValueError, match="the max_change of.*max_change and max_relative_change with norm_scope='par"):
        fastclip.step_in_backward(other, wide)


def test_what_is_infinite_is_scaled_away_in_its_own_tensor():
    """Without eps, a gradient whose square vanishes adds an inf: a factor of 0 leaves nothing of it to limit."""
    for settings in ({"optimizer": "LAMB"}, {"optimizer": "AdamW", "max_update_rms": 0.5}):
        ours = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)]
        theirs = copy_params(ours)
        settings = {"lr": 0.1, "eps": 0.0, "max_change": 0.01, **settings}
        kind = getattr(fastclip, settings.pop("optimizer"))
        optimizer, plain = kind(ours, **settings), kind(theirs, **settings)
        for params in (ours, theirs):
            params[0].grad, params[1].grad = torch.tensor([1e-40, 1.0]), torch.ones(2)
        optimizer.step()
        stats = plain_step(plain)
        assert not ours[1].isnan().any()
        assert_same_stats(optimizer.clip_stats(), stats, 1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "error", "words"),
    [
        ("SGD", {"max_update_rms": 1.0}, ValueError, r"max_update_rms in param_groups\[0\].*Adam, AdamW and LAMB have"),
        ("NAdam", {"max_update_rms": 1.0}, ValueError, "Adam, AdamW and LAMB have it"),
        ("Lion", {"max_change": 1.0}, ValueError, "SGD, Adam, AdamW and LAMB"),
        ("AdamW", {"max_update_rms": -1.0}, ValueError, "max_update_rms"),
        ("AdamW", {"max_update_rms": math.nan}, ValueError, "max_update_rms"),
        ("AdamW", {"max_update_rms": "1"}, TypeError, "max_update_rms"),
        ("AdamW", {"max_change": 1.0, "norm_type": math.inf}, ValueError, "norm_type"),
        ("LAMB", {"max_change": -1.0}, ValueError, "max_change"),
    ],
    ids=str,
)
def test_bad_settings_are_named(name, settings, error, words):
    with pytest.raises(error, match=words):
        getattr(fastclip, name)([torch.zeros(3, requires_grad=True)], lr=0.1, **settings)


def test_groups_share_a_limit_on_the_whole_change():
    params = make_params([(3,), (4,)])
    with pytest.raises(ValueError, match="max_change"):
        fastclip.AdamW([{"params": params[:1], "max_change": 1.0}, {"params": params[1:], "max_change": 2.0}])
    optimizer = fastclip.AdamW([{"params": params[:1]}, {"params": params[1:]}], max_change=1.0)
    optimizer.param_groups[1]["max_change"] = 2.0
    give_grads(params)
    with pytest.raises(ValueError, match="max_change"):
        optimizer.step()
