"""norm_scope: the norm of all gradients, of each group, or of each parameter, and its limit."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from fastclip.integrations.stats import stats_to_log
from fastclip.plain import step as reference
from tests.support.cases import (
    LARGE,
    SHAPES,
    TINY,
    Loop,
    assert_close,
    assert_same_bits,
    clip_in_place,
    copy_params,
    exact_square_roots,
    give_grads,
    make_params,
    through_a_file,
)

SCOPES = ("group", "parameter")
HISTORY = {"group": "clip_history_of_group", "parameter": "clip_history_of_parameter"}
QUANTILE = fastclip.QuantileNorm(0.5, scale=0.9, window=5, warmup=2)
EMA = fastclip.EmaNorm(z=0.5, decay=0.8, warmup=3)
LIMITS = {
    "number": {"max_norm": 0.5},
    "zero": {"max_norm": 0.0},
    "measured": {"max_norm": math.inf},
    "inf norm": {"max_norm": 0.3, "norm_type": math.inf},
    "after a value clip": {"max_norm": 0.5, "clip_value": 0.4},
    "quantile": {"max_norm": QUANTILE},
    "ema": {"max_norm": EMA},
    "ema of inf norms": {"max_norm": EMA, "norm_type": math.inf},
    "and skipped": {"max_norm": EMA, "skip_norm": 150.0},
    "and skipped by a rule": {"max_norm": 0.5, "skip_norm": fastclip.EmaNorm(z=0.5, decay=0.8, warmup=3)},
}
OPTIMIZERS = {
    "SGD": {"lr": 0.1},
    "momentum": {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.1},
    "Lion": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "narrow momentum": {"momentum_dtype": torch.bfloat16},
}
OF_KINDS = [(name, "float32") for name in OPTIMIZERS] + [
    (name, kind) for name in ("momentum", "AdamW") for kind in KINDS if kind != "float32"
]
every_scope = pytest.mark.parametrize("scope", SCOPES)


def in_groups(params, *settings):
    """The parameters as two groups, cut in the middle."""
    half = len(params) // 2
    first, second = settings or ({}, {})
    return [{"params": params[:half], **first}, {"params": params[half:], **second}]


def make(name, params, **settings):
    """An optimizer over two groups."""
    of_name = dict(OPTIMIZERS[name])
    cls = getattr(fastclip, of_name.pop("optimizer", name))
    return cls(in_groups(params), **of_name, **settings)


def segments(params, scope):
    if scope == "parameter":
        return [[p] for p in params]
    return [params] if scope == "global" else [params[: len(params) // 2], params[len(params) // 2 :]]


def scale_of(step):
    return (1.0, 3.0, 1.0, 9.0)[step % 4]


@every_scope
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", ["SGD", "momentum", "AdamW", "Adagrad", "NAdam"])
def test_it_is_the_loop_of_clips(name, norm_type, scope):
    """torch's clip_grad_norm_ of each part, and torch's optimizer."""
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    settings = dict(OPTIMIZERS[name])
    loop = Loop(theirs, None, settings.pop("optimizer", name), **settings)
    optimizer = make(name, ours, max_norm=0.7, norm_type=norm_type, norm_scope=scope)
    for step in range(4):
        give_grads(theirs, ours, scale=scale_of(step) / 10)
        for part in segments(theirs, scope):
            if any(p.numel() for p in part):
                clip_in_place(part, max_norm=0.7, norm_type=norm_type)
        loop.step()
        optimizer.step()
    assert_close(theirs, ours, 1e-5)


@pytest.mark.parametrize(("name", "kind"), OF_KINDS)
@every_scope
@pytest.mark.parametrize("limit", LIMITS)
def test_plain_torch_takes_the_same_steps(limit, scope, name, kind):
    """Parameters, states, histories and statistics."""
    of_kind = dict(KINDS[kind])
    ours = make_params(SHAPES, of_kind.pop("dtype", torch.float32))
    theirs = copy_params(ours)
    optimizer, plain = (make(name, p, norm_scope=scope, **LIMITS[limit], **of_kind) for p in (ours, theirs))
    for step in range(7):
        give_grads(theirs, ours, scale=scale_of(step))
        for params in (theirs, ours):
            params[step].grad = None
        optimizer.step()
        with exact_square_roots():
            expected = reference.step(plain._rule, plain.param_groups, plain.state)
        found = optimizer.clip_stats()
        for field in ("total_norm", "clip_coefficient", "skipped", "threshold", "skip_threshold"):
            a, b = getattr(expected, field), getattr(found, field)
            assert (a is None) == (b is None), field
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-12, atol=0, msg=lambda m, f=field: f"{f}: {m}")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}.get(ours[0].dtype, 2e-2)
    assert_close(theirs, ours, tolerance)
    for a, b in zip(theirs, ours, strict=True):
        assert plain.state.get(a, {}).keys() == optimizer.state.get(b, {}).keys()
        for history in HISTORY.values():
            if history in optimizer.state.get(b, {}):
                pair = plain.state[a][history], optimizer.state[b][history]
                torch.testing.assert_close(*pair, rtol=1e-12, atol=0)


@pytest.mark.parametrize("limit", ["number", "inf norm", "quantile", "ema"])
def test_one_group_is_all_and_one_parameter_is_a_group(limit):
    """To the bit, whatever the scope is called."""
    first = make_params(LARGE)
    copies = [copy_params(first) for _ in range(3)]
    all_as_one = fastclip.AdamW(first, **LIMITS[limit])
    one_group = fastclip.AdamW(copies[0], norm_scope="group", **LIMITS[limit])
    groups = fastclip.AdamW([{"params": [p]} for p in copies[1]], norm_scope="group", **LIMITS[limit])
    parameters = fastclip.AdamW(copies[2], norm_scope="parameter", **LIMITS[limit])
    for step in range(6):
        give_grads(first, *copies, scale=scale_of(step))
        for optimizer in (all_as_one, one_group, groups, parameters):
            optimizer.step()
    assert_same_bits(first, copies[0])
    assert_same_bits(copies[1], copies[2])
    assert not torch.equal(first[0], copies[2][0]), "the limit acts"
    norms = [optimizer.total_norm for optimizer in (all_as_one, one_group, groups, parameters)]
    assert all(torch.equal(norm, norms[0]) for norm in norms), "the norm of all has the bits of the default"


@every_scope
def test_each_group_has_a_limit_of_its_own(scope):
    """Or none; and it is read anew at every step, as the scope is."""
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    optimizer = fastclip.SGD(in_groups(ours, {"max_norm": 0.1}, {"max_norm": None}), lr=1.0, norm_scope=scope)
    for step, limits in enumerate([(0.1, None), (None, 0.2), (0.3, 0.4), (None, None), (0.1, math.inf)]):
        for group, limit in zip(optimizer.param_groups, limits, strict=True):
            group["max_norm"] = limit
            group["norm_scope"] = scope if step < 4 else "parameter"
        give_grads(theirs, ours)
        optimizer.step()
        half = len(theirs) // 2
        for part, limit in ((theirs[:half], limits[0]), (theirs[half:], limits[1])):
            for own in segments_of_part(part, scope if step < 4 else "parameter"):
                if limit is not None and any(p.numel() for p in own):
                    clip_in_place(own, max_norm=limit)
        for p in theirs:
            p.data -= p.grad
        assert (optimizer.total_norm is None) == (limits == (None, None))
    assert_close(theirs, ours, 1e-6)


def segments_of_part(part, scope):
    return [part] if scope == "group" else [[p] for p in part]


def test_each_parameter_has_a_history_of_its_own():
    """Two numbers whose norms differ by a factor of 1000: each is limited by its own past."""
    params = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rule = fastclip.QuantileNorm(0.5, scale=2, window=5, warmup=3)
    optimizer = fastclip.SGD(params, lr=1.0, max_norm=rule, norm_scope="parameter")
    norms = [4, 5, 6, 5, 4, 50, 5]
    for norm in norms:
        before = [p.item() for p in params]
        for p, factor in zip(params, (1.0, 1000.0), strict=True):
            p.grad = torch.full_like(p, norm * factor)
        optimizer.step()
        taken = [b - p.item() for b, p in zip(before, params, strict=True)]
        assert taken == pytest.approx([min(norm, 10), min(norm, 10) * 1000.0], rel=1e-6)
    assert optimizer.clip_stats().clip_coefficient == 1 and optimizer.clip_stats().threshold is None
    with pytest.raises(RuntimeError, match="norm_history needs"):
        optimizer.norm_history()


@pytest.mark.parametrize("missing", [None, 0.0], ids=["no gradient", "a gradient of zeros"])
def test_a_parameter_that_some_batches_do_not_use_is_not_frozen(missing):
    """A zero never enters a history: a limit of 0 would hold for ever."""
    params = make_params([(30,), (40,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=EMA, norm_scope="parameter")
    for step in range(8):
        give_grads(params)
        if step < 5:
            params[1].grad = None if missing is None else torch.full_like(params[1], missing)
        before = params[1].clone()
        optimizer.step()
        assert torch.equal(before, params[1]) == (step < 5)
    assert optimizer.state[params[1]][HISTORY["parameter"]][0] == 3


def test_a_step_that_is_left_out_for_a_nan_enters_no_history():
    params = make_params([(30,), (40,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=EMA, norm_scope="parameter")
    assert optimizer.param_groups[0]["skip_nonfinite"], "as a rule implies"
    for step in range(4):
        give_grads(params)
        if step == 2:
            params[0].grad[3] = math.nan
        optimizer.step()
    assert [optimizer.state[p][HISTORY["parameter"]][0] for p in params] == [3, 3]
    assert optimizer.skipped_steps == 1


def test_without_skip_nonfinite_a_nan_concerns_its_parameter_alone():
    params = make_params([(30,), (40,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=EMA, norm_scope="parameter", skip_nonfinite=False)
    for step in range(4):
        give_grads(params)
        if step == 2:
            params[0].grad[3] = math.nan
        optimizer.step()
    assert [optimizer.state[p][HISTORY["parameter"]][0] for p in params] == [3, 4]
    assert params[0][3].isnan() and params[1].isfinite().all() and optimizer.skipped_steps == 0


@every_scope
def test_the_same_bits_on_any_number_of_threads(scope, monkeypatch):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.manual_seed(1)
            torch.set_num_threads(count)
            params = make_params([*LARGE, *TINY[:20]])
            optimizer = make("AdamW", params, max_norm=EMA, norm_scope=scope)
            for step in range(5):
                give_grads(params, scale=scale_of(step))
                optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@every_scope
def test_amp_scales_change_nothing(scope):
    """Of GradScaler: a norm is that of unscaled gradients, and a skipped step enters no history."""
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    scaled, plain = (make("SGD", p, max_norm=EMA, norm_scope=scope) for p in (ours, theirs))
    for step in range(6):
        give_grads(theirs, ours)
        for p in ours:
            p.grad *= 1024.0
        scaled.grad_scale = torch.tensor(1024.0)
        scaled.found_inf = torch.tensor(float(step == 3))
        scaled.step()
        if step != 3:
            plain.step()
        assert scaled.clip_stats().skipped == (step == 3)
        assert step != 3 or scaled.clip_stats().clip_coefficient == 0
    assert_same_bits(theirs, ours)


def trained(scope, steps, limit=EMA, name="AdamW", **more):
    torch.manual_seed(3)
    params = make_params(SHAPES)
    optimizer = make(name, params, max_norm=limit, norm_scope=scope, **more)
    for step in range(steps):
        torch.manual_seed(100 + step)
        give_grads(params, scale=scale_of(step))
        optimizer.step()
    return optimizer, params


def by_file(optimizer, params, name):
    saved = through_a_file(optimizer.state_dict())
    other = make(name, params)
    other.load_state_dict(saved)
    return other


def by_torch(optimizer, params, name):
    """Into an optimizer of torch, and back."""
    theirs = torch.optim.AdamW(in_groups(params)) if name == "AdamW" else torch.optim.SGD(in_groups(params), lr=0.1)
    theirs.load_state_dict(optimizer.state_dict())
    other = make(name, params)
    other.load_state_dict(theirs.state_dict())
    return other


def by_copy(optimizer, params, name):
    other = copy.deepcopy(optimizer)
    copied = [p for group in other.param_groups for p in group["params"]]
    for group, ours in zip(other.param_groups, in_groups(params), strict=True):
        group["params"] = ours["params"]
    other.state = {p: other.state[c] for p, c in zip(params, copied, strict=True) if c in other.state}
    return other


@every_scope
@pytest.mark.parametrize("limit", [QUANTILE, EMA], ids=["quantile", "ema"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("way", [by_file, by_torch, by_copy])
def test_a_training_goes_on_where_its_checkpoint_was_taken(way, name, limit, scope):
    """To the bit, with the histories of all segments; torch rounds them to the parameters' dtype."""
    expected, all_nine = trained(scope, 9, limit, name)
    optimizer, params = trained(scope, 5, limit, name)
    optimizer = way(optimizer, params, name)
    for step in range(5, 9):
        torch.manual_seed(100 + step)
        give_grads(params, scale=scale_of(step))
        optimizer.step()
    if way is by_torch:
        assert_close(all_nine, params, 1e-6)
    else:
        assert_same_bits(all_nine, params)
    for a, b in zip(all_nine, params, strict=True):
        assert expected.state.get(a, {}).keys() == optimizer.state.get(b, {}).keys()


def test_a_history_of_another_scope_is_not_taken_for_its_own():
    optimizer, params = trained("global", 5)
    for group in optimizer.param_groups:
        group["norm_scope"] = "parameter"
    give_grads(params)
    optimizer.step()
    assert [optimizer.state[p][HISTORY["parameter"]][0] for p in params if p.numel()] == [1] * (len(params) - 1)
    assert optimizer.state[params[0]]["clip_history"][0] == 5


def test_a_group_that_is_added_later_has_its_own_norm():
    params = make_params([(30,), (40,)])
    optimizer = fastclip.SGD(params[:1], lr=1.0, max_norm=0.5, norm_scope="group")
    optimizer.add_param_group({"params": params[1:], "max_norm": 2.0})
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    taken = [(b - p).norm().item() for b, p in zip(before, params, strict=True)]
    assert taken == pytest.approx([0.5, 2.0], rel=1e-5)


@pytest.mark.falls_back
@every_scope
def test_a_step_that_the_kernels_do_not_cover_agrees(scope):
    """A gradient in another layout, and a history that both ways go on with."""
    ours = make_params([(20, 30), (7,), (50,)])
    theirs = copy_params(ours)
    optimizer, plain = (fastclip.SGD(p, lr=0.1, max_norm=EMA, norm_scope=scope) for p in (ours, theirs))
    for step in range(8):
        give_grads(theirs, ours, scale=scale_of(step))
        if step % 3 == 2:
            ours[0].grad = ours[0].grad.t().contiguous().t()
        optimizer.step()
        plain.step()
    assert_close(theirs, ours, 1e-6)


@every_scope
def test_a_rule_in_one_group_implies_skip_nonfinite_in_all(scope):
    params = make_params([(30,), (40,)])
    optimizer = fastclip.SGD(in_groups(params, {"max_norm": EMA}, {}), lr=0.1, norm_scope=scope)
    assert [group["skip_nonfinite"] for group in optimizer.param_groups] == [True, True]
    give_grads(params)
    params[1].grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    with pytest.raises(ValueError, match="skip_nonfinite must be the same"):
        fastclip.SGD(in_groups(params, {"max_norm": EMA}, {"skip_nonfinite": False}), lr=0.1, norm_scope=scope)


def in_plain_torch():
    """A mode under which steps are left to plain torch."""
    return FlopCounterMode(display=False)


@pytest.mark.falls_back
@every_scope
def test_plain_torch_begins_no_history_without_a_gradient(scope):
    """The optimizer's state would have an entry with nothing else, which torch's own can't load."""
    params = make_params([(3,), (3,)])
    optimizer = fastclip.AdamW(
        in_groups(params), max_norm=fastclip.EmaNorm(warmup=1), norm_scope=scope, skip_nonfinite=True
    )
    give_grads(params[:1])
    with in_plain_torch():
        optimizer.step()
    assert params[1] not in optimizer.state
    torch.optim.AdamW(in_groups(params)).load_state_dict(optimizer.state_dict())


@pytest.mark.falls_back
def test_a_group_without_parameters_has_no_history():
    q = make_params([(3,)])
    optimizer = fastclip.SGD([{"params": []}, {"params": q}], lr=0.1, max_norm=EMA, norm_scope="group")
    give_grads(q)
    with in_plain_torch():
        optimizer.step()
    optimizer.step()
    assert optimizer.state[q[0]][HISTORY["group"]][0] == 2


def test_gradients_that_are_all_empty():
    for scope in ("global", *SCOPES):
        params = make_params([(0,), (3, 0)])
        optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, norm_scope=scope)
        give_grads(params)
        optimizer.step()
        assert optimizer.total_norm == 0 and optimizer.clip_stats().clip_coefficient == 1


@pytest.mark.parametrize("given", [None, True, False])
def test_who_decides_on_skip_nonfinite(given):
    """The constructor, if it says so; a rule in any group implies it. A group that is added takes what there is."""
    params = make_params([(3,), (4,), (5,)])
    settings = {} if given is None else {"skip_nonfinite": given}
    groups = in_groups(params[:2], {"max_norm": EMA}, {"max_norm": 1.0})
    optimizer = fastclip.SGD(groups, lr=0.1, norm_scope="parameter", **settings)
    optimizer.add_param_group({"params": params[2:], "max_norm": QUANTILE})
    expected = given is not False
    assert [group["skip_nonfinite"] for group in optimizer.param_groups] == [expected] * 3
    by_number = fastclip.SGD(params[:1], lr=0.1, max_norm=1.0, norm_scope="group")
    with pytest.raises(ValueError, match=r"max_norm in param_groups\[1\] is a rule, which needs skip_nonfinite"):
        by_number.add_param_group({"params": params[1:2], "max_norm": EMA})


def test_a_new_group_has_the_optimizers_own_limit():
    params = make_params([(3,), (4,), (5,)])
    groups = in_groups(params[:2], {"max_norm": None}, {})
    optimizer = fastclip.SGD(groups, lr=1.0, max_norm=1.0, norm_scope="group")
    optimizer.add_param_group({"params": params[2:]})
    assert [group["max_norm"] for group in optimizer.param_groups] == [None, 1.0, 1.0]


def test_a_checkpoint_that_knows_no_scope_has_the_norm_of_all():
    params = make_params([(3,), (4,)])
    saved = fastclip.SGD(in_groups(params), lr=0.1, max_norm=1.0).state_dict()
    for group in saved["param_groups"]:
        del group["norm_scope"]
    optimizer = fastclip.SGD(in_groups(params, {"max_norm": 5.0}, {"max_norm": 0.5}), lr=0.1, norm_scope="group")
    optimizer.load_state_dict(saved)
    assert [(g["norm_scope"], g["max_norm"]) for g in optimizer.param_groups] == [("global", 1.0)] * 2
    of_torch = torch.optim.SGD(in_groups(params), lr=0.1).state_dict()
    optimizer = fastclip.SGD(in_groups(params, {"max_norm": 5.0}, {"max_norm": 0.5}), lr=0.1, norm_scope="group")
    optimizer.load_state_dict(of_torch)
    assert [(g["norm_scope"], g["max_norm"]) for g in optimizer.param_groups] == [("group", 5.0), ("group", 0.5)]


@every_scope
def test_histories_of_dropped_parameters_are_in_no_checkpoint(scope):
    params = make_params([(3,), (2,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=EMA, norm_scope=scope)
    for _ in range(3):
        give_grads(params)
        optimizer.step()
    del optimizer.param_groups[0]["params"][0]
    give_grads(params[1:])
    optimizer.step()
    saved = optimizer.state_dict()
    assert set(saved["state"]) <= {0} and params[0] not in optimizer.state


@every_scope
def test_all_parameters_have_an_entry_in_a_checkpoint_of_histories_alone(scope):
    """torch.distributed.checkpoint refuses a file in which some have none."""
    params = make_params([(3,), (2,), (4,)])
    groups = [{"params": params[:1], "max_norm": EMA}, {"params": params[1:], "max_norm": None}]
    optimizer = fastclip.SGD(groups, lr=0.1, norm_scope=scope)
    give_grads(params)
    optimizer.step()
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2}


def test_the_same_parameter_twice_counts_once_in_its_group():
    p, q = make_params([(4,), (4,)])
    with pytest.warns(UserWarning):
        optimizer = fastclip.SGD([p, p, q], lr=1.0, max_norm=1.0, norm_scope="group")
    give_grads([p, q])
    with pytest.warns(UserWarning, match="falls back"):
        optimizer.step()
    coefficient = 1 / torch.cat([p.grad, q.grad]).double().norm()
    torch.testing.assert_close(optimizer.clip_stats().clip_coefficient, coefficient, rtol=1e-5, atol=0)


def test_a_skip_norm_alone_has_no_coefficient_of_segments():
    params = make_params([(3,), (4,)])
    optimizer = fastclip.SGD(params, lr=0.1, skip_norm=0.1, norm_scope="parameter")
    give_grads(params)
    optimizer.step()
    assert optimizer.clip_stats().skipped and optimizer.clip_stats().clip_coefficient == 1


def test_the_same_parameter_twice():
    p = torch.zeros(4, requires_grad=True)
    with pytest.warns(UserWarning):
        optimizer = fastclip.SGD([p, p], lr=1.0, max_norm=1.0, norm_scope="parameter")
    p.grad = torch.ones(4)
    with pytest.warns(UserWarning, match="falls back"):
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -1.0))


def test_statistics():
    params = make_params([(30,), (40,), (50,)])
    optimizer = fastclip.SGD(params, lr=0.1, max_norm=1.0, norm_scope="parameter", skip_norm=1e3)
    for p, size in zip(params, (0.5, 2.0, 4.0), strict=True):
        p.grad = torch.zeros_like(p)
        p.grad[0] = size
    optimizer.step()
    stats = optimizer.clip_stats()
    assert stats.clip_coefficient.item() == pytest.approx(0.25, rel=1e-5), "of the parameter that is clipped the most"
    assert stats.total_norm.item() == pytest.approx(math.sqrt(0.25 + 4 + 16)) and stats.threshold is None
    assert optimizer.norms_by_parameter()[1].tolist() == pytest.approx([0.5, 2.0, 4.0])
    params[0].grad[0] = 1e4
    optimizer.step()
    stats = optimizer.clip_stats()
    assert stats.skipped and stats.clip_coefficient == 0
    assert stats_to_log(optimizer)["clip_coefficient"] == 0.0


BAD = {
    "another word": (
        {"norm_scope": "tensor"},
        "norm_scope in param_groups[0] must be 'global', 'group' or 'parameter'",
    ),
    "no word": ({"norm_scope": None}, "norm_scope in param_groups[0] must be 'global', 'group' or 'parameter'"),
    "a rule that goes on with a NaN": (
        {"norm_scope": "group", "max_norm": "ema", "skip_nonfinite": False},
        "max_norm in param_groups[0] is a rule, which needs skip_nonfinite=True",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_by_name(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError) as error:
        fastclip.SGD(make_params([(3,)]), lr=0.1, **settings)
    assert message in str(error.value)


def test_scopes_of_groups_must_agree():
    params = make_params([(3,), (4,)])
    with pytest.raises(ValueError, match="norm_scope must be the same in all groups: group in"):
        fastclip.SGD(in_groups(params, {}, {"norm_scope": "group"}), lr=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm must be the same in all groups"):
        fastclip.SGD(in_groups(params, {}, {"max_norm": 2.0}), lr=0.1, max_norm=1.0)
    optimizer = fastclip.SGD(in_groups(params), lr=0.1, max_norm=1.0)
    optimizer.param_groups[1]["norm_scope"] = "parameter"
    give_grads(params)
    with pytest.raises(ValueError, match="norm_scope must be the same in all groups"):
        optimizer.step()
