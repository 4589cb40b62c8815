"""QuantileNorm and EmaNorm: limits on the norm that follow from the norms of past steps."""

import math
from types import MappingProxyType

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import fastclip
from fastclip.plain import step as reference
from tests.support.cases import CLIPS, assert_same_bits, copy_params, give_grads, make_params

INF, NAN = math.inf, math.nan
SEQUENCE = [4, 5, 6, 5, 4, 6, 5, 50, 5, 4, INF, 6]
LIMITS = {
    "median of 5": (
        fastclip.QuantileNorm(0.5, scale=2, window=5, warmup=3),
        [INF, INF, INF, *[10] * 9],
    ),
    "nine tenths": (
        fastclip.QuantileNorm(0.9, scale=1, window=5, warmup=3),
        [INF, INF, INF, 5.8, 5.7, 5.6, 6, 6, 32.4, 32.4, 32.4, 32.4],
    ),
    "of one": (
        fastclip.QuantileNorm(1, scale=1, window=2, warmup=1, floor=4.5, ceiling=20),
        [20, 4.5, 5, 6, 6, 5, 6, 6, 20, 20, 5, 5],
    ),
    "ema": (
        fastclip.EmaNorm(z=2, decay=0.9, warmup=4),
        [INF, INF, INF, INF, 6.414214, 6.357395, 6.527775, 6.448899, 6.746015, 6.651474, 6.599280, 6.599280],
    ),
    # By PyPI's zclip 1.0.0, where a norm is above the limit.
    "reciprocal": (
        fastclip.EmaNorm(z=2, decay=0.9, warmup=4, above="reciprocal"),
        [INF, INF, INF, INF, 6.414214, 6.357395, 6.527775, 5.055083, 6.379868, 6.308418, 4.911023, 6.268976],
    ),
    "bounded": (
        fastclip.EmaNorm(z=2, decay=0.9, warmup=4, floor=6.4, ceiling=6.6),
        [6.6, 6.6, 6.6, 6.6, 6.414214, 6.4, 6.527775, 6.448899, 6.6, 6.6, 6.599280, 6.599280],
    ),
}
RULES = {name: rule for name, (rule, _) in LIMITS.items()}
DEFAULTS = {
    "quantile": {"q": 0.5, "scale": 2.0, "window": 128, "warmup": 10, "floor": 0.0, "ceiling": INF},
    "ema": {
        "z": 2.5,
        "ratio": 1.0,
        "decay": 0.97,
        "warmup": 25,
        "above": "threshold",
        "floor": 0.0,
        "ceiling": INF,
    },
}
falls_back = pytest.mark.falls_back


def one(device="cpu", **limits):
    """An optimizer over one number, whose gradient is its norm."""
    return fastclip.SGD([torch.zeros(1, dtype=torch.float64, device=device, requires_grad=True)], lr=1.0, **limits)


def take(optimizer, norm, plain=False):
    """Takes a step with this norm, and returns its statistics."""
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full_like(param, norm)
    if plain:
        return reference.step(optimizer._rule, optimizer.param_groups, optimizer.state)
    optimizer.step()
    return optimizer.clip_stats()


def thresholds(optimizer, norms, plain=False):
    return [take(optimizer, norm, plain).threshold.item() for norm in norms]


def lognormal(count, deviation=0.5, seed=0):
    return np.exp(np.random.default_rng(seed).normal(1.6, deviation, count)).tolist()


# ---- the limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_a_known_sequence(name, device):
    rule, expected = LIMITS[name]
    optimizer = one(device, max_norm=rule)
    found = [take(optimizer, norm) for norm in SEQUENCE]
    assert [s.threshold.item() for s in found] == pytest.approx(expected, abs=1e-6)
    assert [s.skipped.item() for s in found] == [norm == INF for norm in SEQUENCE]
    moved = sum(min(norm, limit) for norm, limit in zip(SEQUENCE, expected, strict=True) if norm < INF)
    assert -optimizer.param_groups[0]["params"][0].item() == pytest.approx(moved, abs=1e-4)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.75, 0.9, 0.973, 1.0])
@pytest.mark.parametrize("window", [2, 7, 128, 1024])
def test_a_quantile_has_the_bits_of_numpys(q, window, device):
    norms = lognormal(min(3 * window, 1300), seed=window)
    rule = fastclip.QuantileNorm(q, scale=1.5, window=window, warmup=1)
    found = thresholds(one(device, max_norm=rule), norms)
    assert found == [INF, *(1.5 * np.quantile(norms[max(0, t - window) : t], q) for t in range(1, len(norms)))]


@pytest.mark.parametrize("name", RULES)
def test_plain_torch_has_the_same_bits(name, device):
    norms = [*lognormal(300), 0.0, 1e30, *lognormal(40, seed=1), INF, NAN, *lognormal(200, seed=2)]
    kernels, plain = one(device, max_norm=RULES[name], skip_norm="ema"), one(max_norm=RULES[name], skip_norm="ema")
    for norm in norms:
        ours, theirs = take(kernels, norm), take(plain, norm, plain=True)
        for field in ("threshold", "skip_threshold", "clip_coefficient", "skipped", "total_norm"):
            assert_same_bits([getattr(ours, field).cpu()], [getattr(theirs, field)])
    for state, other in zip(kernels.state.values(), plain.state.values(), strict=True):
        assert state.keys() == other.keys() == {"clip_history", "skip_history"}
        for key in state:
            assert_same_bits([state[key].cpu()], [other[key]])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("exponent", [-60, 3, 60])
def test_limits_scale_with_the_gradients_to_the_bit(name, exponent, device):
    rule = RULES[name]
    by = 2.0**exponent
    scaled = type(rule)(**{**vars(rule), "floor": rule.floor * by, "ceiling": rule.ceiling * by})
    norms = lognormal(400, 0.8)
    found = thresholds(one(device, max_norm=scaled), [norm * by for norm in norms])
    assert found == [limit * by for limit in thresholds(one(device, max_norm=rule), norms)]


def test_a_clip_by_a_rule_is_the_clip_by_its_number(device):
    """Of every rule's step, with everything else that a step can do."""
    for clip in ({"momentum": 0.9}, {"momentum": 0.9, "clip_value": 0.5}, {"norm_type": INF}):
        params = make_params([(100,), (3, 5), (5000,)], device=device)
        others = copy_params(params)
        ours = fastclip.SGD(params, lr=0.1, max_norm=fastclip.QuantileNorm(scale=1, window=9, warmup=2), **clip)
        theirs = fastclip.SGD(others, lr=0.1, max_norm=INF, **clip)
        for i in range(20):
            give_grads(params, scale=1.0 + i % 4)
            for p, other in zip(params, others, strict=True):
                other.grad = p.grad.clone()
            ours.step()
            theirs.param_groups[0]["max_norm"] = ours.clip_stats().threshold.item()
            theirs.step()
            assert ours.clip_stats().clip_coefficient == theirs.clip_stats().clip_coefficient
            assert_same_bits(params, others)
        assert ours.clip_stats().clip_coefficient < 1


@pytest.mark.parametrize("cls", [getattr(fastclip, name) for name in ("Adam", "AdamW", "Lion", "RMSprop", "NAdam")])
def test_other_optimizers(cls, device):
    params = make_params([(100,), (3, 5)], device=device)
    others = copy_params(params)
    ours = cls(params, max_norm=fastclip.EmaNorm(z=0.5, warmup=3), skip_norm=fastclip.QuantileNorm(scale=1.2))
    theirs = cls(others, max_norm=INF)
    for i in range(30):
        give_grads(params, scale=1.0 + i % 4)
        for p, other in zip(params, others, strict=True):
            other.grad = p.grad.clone()
        before = copy_params(params)
        ours.step()
        stats = ours.clip_stats()
        if stats.skipped:
            assert_same_bits(params, before)
            continue
        theirs.param_groups[0]["max_norm"] = stats.threshold.item()
        theirs.step()
        assert_same_bits(params, others)
    assert 0 < ours.skipped_steps < 15


# ---- what enters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("norm", [0.0, -0.0, INF, NAN])
def test_what_is_no_norm_never_enters(name, norm, device):
    optimizer = one(device, max_norm=RULES[name], skip_norm=fastclip.QuantileNorm(window=4, warmup=2))
    for value in SEQUENCE[:6]:
        take(optimizer, value)
    (state,) = optimizer.state.values()
    before, (param,) = {key: history.clone() for key, history in state.items()}, optimizer.param_groups[0]["params"]
    at = param.detach().clone()
    stats = take(optimizer, norm)
    assert stats.skipped == (norm != 0)
    assert_same_bits([param.detach(), *state.values()], [at, *before.values()])


def test_an_inf_that_a_value_clip_hides(device):
    optimizer = one(device, max_norm=fastclip.QuantileNorm(window=4, warmup=2), clip_value=3.0)
    found = [take(optimizer, norm) for norm in (1, 2, INF, 50, 1)]
    assert [s.skipped.item() for s in found] == [False, False, True, False, False]
    assert optimizer.norm_history().tolist() == [1, 2, 3, 1]  # norms are those after the value clip


def test_amp(device):
    """Norms are those of unscaled gradients; a step that AMP skips does not count."""
    optimizer = one(device, max_norm=fastclip.QuantileNorm(window=4, warmup=2))
    plain = one(device, max_norm=fastclip.QuantileNorm(window=4, warmup=2))
    for norm, scale, found in ((3, 1024, 0), (5, 2048, 1), (4, 512, 0), (7, 8192, 0), (INF, 8192, 1), (100, 1, 0)):
        optimizer.grad_scale = torch.tensor(float(scale), device=device)
        optimizer.found_inf = torch.tensor(float(found), device=device)
        stats = take(optimizer, norm * scale)
        assert stats.skipped == bool(found)
        if not found:
            assert stats.threshold == take(plain, norm).threshold
    assert optimizer.norm_history().tolist() == [3, 4, 7, 100]
    assert optimizer.skipped_steps == 2


def test_the_threshold_of_a_step_that_amp_skips(device):
    optimizer = one(device, max_norm=fastclip.QuantileNorm(window=4, warmup=2))
    for norm in (3, 5):
        take(optimizer, norm)
    for where in (device, "cpu"):
        optimizer.grad_scale = torch.ones((), device=device)
        optimizer.found_inf = torch.ones((), device=where)
        assert take(optimizer, 4).threshold == 8


# ---- skip_norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain torch"])
def test_a_number_leaves_out_what_is_above_it(plain):
    optimizer = one(skip_norm=5.0, max_norm=2.0)
    (param,) = optimizer.param_groups[0]["params"]
    found = [take(optimizer, norm, plain) for norm in (1, 5, 5.1, INF, NAN, 4)]
    assert [s.skipped.item() for s in found] == [False, False, True, True, True, False]
    assert {s.skip_threshold.item() for s in found} == {5} and {s.threshold.item() for s in found} == {2}
    assert -param.item() == pytest.approx(1 + 2 + 2, abs=1e-5)


def test_a_skipped_step_changes_nothing_and_is_counted(device):
    params = make_params([(100,), (3, 5)], device=device)
    optimizer = fastclip.AdamW(params, lr=0.1, skip_norm=100.0)
    give_grads(params, scale=1e4)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not any(optimizer.state.values()), (
        "states of a first step that was left out"
    )
    give_grads(params)
    optimizer.step()
    before, states = copy_params(params), {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    give_grads(params, scale=1e4)
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert_same_bits(params, before)
    for p, state in states.items():
        for key, value in state.items():
            assert_same_bits([optimizer.state[p][key]], [value])


def test_both_limits_have_histories_of_their_own(device):
    clip, skip = fastclip.QuantileNorm(window=4, warmup=2), fastclip.QuantileNorm(scale=10, window=6, warmup=3)
    optimizer = one(device, max_norm=clip, skip_norm=skip)
    found = [take(optimizer, norm) for norm in (1, 1, 5, 100, 1, 100)]
    assert [s.threshold.item() for s in found] == [INF, INF, 2, 2, 6, 6]
    assert [s.skip_threshold.item() for s in found] == [INF, INF, INF, 10, 30, 10]
    assert [s.skipped.item() for s in found] == [False, False, False, True, False, True]
    (state,) = optimizer.state.values()
    assert {key: history.numel() for key, history in state.items()} == {"clip_history": 16, "skip_history": 20}


def test_skip_norm_does_not_need_a_rule_to_look_for_inf():
    """As in torch, an inf takes its course where nobody asks."""
    optimizer = one(skip_norm=INF)
    assert not take(optimizer, INF).skipped
    assert optimizer.param_groups[0]["skip_nonfinite"] is False


def most_skipped(rule, rise):
    """The bound on the steps that are left out after norms have risen by a factor, and stay there."""
    if isinstance(rule, fastclip.QuantileNorm):
        return math.ceil((1 - rule.q) * rule.window) + 1
    doubling = math.log(rise) / math.log(2 - rule.decay)  # each brings the mean to more than 2 - decay times itself
    if rule.decay == 0:
        return doubling + 2
    spread = rule.z * math.sqrt(1 - rule.decay)  # then the deviation falls as the square root of the distance
    by_z = 1 + 2 * math.log(1 / spread) / -math.log(rule.decay) if 0 < spread < 1 else 1 if spread else INF
    by_ratio = math.log(2 * (1 - 1 / rule.ratio)) / math.log(rule.decay) if rule.ratio > 1 else INF
    return doubling + max(0, min(by_z, by_ratio)) + 2


SKIPS = {
    "median": fastclip.QuantileNorm(scale=8),
    "largest": fastclip.QuantileNorm(1.0, scale=1, window=30),
    "smallest": fastclip.QuantileNorm(0.0, scale=1, window=30),
    "ema": fastclip.EmaNorm(z=6, decay=0.99),
    "narrow": fastclip.EmaNorm(z=0.5),
    "ratio": fastclip.EmaNorm(z=0, ratio=20, decay=0.99),
    "small ratio": fastclip.EmaNorm(z=0, ratio=1.01, decay=0.9),
    "reciprocal": fastclip.EmaNorm(z=3, above="reciprocal"),
    "without memory": fastclip.EmaNorm(z=1, decay=0),
}


@pytest.mark.parametrize("deviation", [0, 1e-9, 0.1])
@pytest.mark.parametrize("rise", [1.5, 10, 1e6])
@pytest.mark.parametrize("name", SKIPS)
def test_steps_are_not_left_out_for_ever(name, rise, deviation):
    """After a lasting rise, also where norms were all the same."""
    rule = SKIPS[name]
    optimizer = one(skip_norm=rule)
    for norm in lognormal(200, deviation):
        take(optimizer, norm)
    level = rise * max(lognormal(200, deviation))
    skipped = 0
    while take(optimizer, level).skipped:
        skipped += 1
        assert skipped <= most_skipped(rule, level / min(lognormal(200, deviation)))
    assert not any(take(optimizer, level).skipped for _ in range(300))


@pytest.mark.parametrize("q", [0.5, 0.75, 0.9])
def test_spikes_up_to_the_breakdown_point(q):
    """1 - q of the norms can be spikes, and the limit stays among the others."""
    window = 40
    optimizer = one(max_norm=fastclip.QuantileNorm(q, scale=1, window=window))
    norms = lognormal(window, 0.2)
    for norm in norms:
        take(optimizer, norm)
    allowed = math.floor((1 - q) * (window - 1))
    limits = thresholds(optimizer, [1e6] * (allowed + 2))
    assert max(limits[: allowed + 1]) <= max(norms)
    assert limits[-1] > max(norms)


# ---- settings ------------------------------------------------------------------------------------

FORMS = {
    "rule": fastclip.QuantileNorm(0.75, window=50),
    "dict": {"rule": "quantile", "q": 0.75, "window": 50},
    "mapping": MappingProxyType({"rule": "quantile", "q": 0.75, "window": 50}),
    "ints": {"rule": "quantile", "q": 0.75, "window": 50, "scale": 2, "floor": 0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", ["max_norm", "skip_norm"])
def test_every_form_is_a_complete_dict_in_the_groups(form, limit):
    expected = {"rule": "quantile", **DEFAULTS["quantile"], "q": 0.75, "window": 50}
    given = FORMS[form]
    optimizer = one(**{limit: given})
    group = optimizer.param_groups[0]
    assert group[limit] == expected and type(group[limit]) is dict and list(group[limit]) == list(expected)
    assert group["skip_nonfinite"] is True
    p = torch.zeros(2, requires_grad=True)
    assert fastclip.SGD([{"params": [p], limit: given}]).param_groups[0][limit] == expected
    optimizer = one(skip_nonfinite=True)
    optimizer.param_groups[0][limit] = given
    take(optimizer, 1.0)
    assert optimizer.param_groups[0][limit] == expected, "set later, and read by the next step"
    assert given == FORMS[form] and "skip_nonfinite" not in dict(given if form != "rule" else {})


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_name_is_the_rule_with_its_defaults(name):
    group = one(max_norm=name, skip_norm=name).param_groups[0]
    assert group["max_norm"] == group["skip_norm"] == {"rule": name, **DEFAULTS[name]}


def test_rules_are_read_anew_at_each_step(device):
    optimizer = one(device, max_norm=fastclip.QuantileNorm(window=8, warmup=2))
    for norm in (1, 2, 3, 4):
        take(optimizer, norm)
    rule = optimizer.param_groups[0]["max_norm"]
    for change, expected in (
        ({"scale": 3.0}, 7.5),
        ({"q": 1.0}, 12),
        ({"ceiling": 5.0}, 5),
        ({"warmup": 6}, 5),
        ({"ceiling": INF, "warmup": 1, "q": 0.0, "floor": 4.0}, 4),
    ):
        rule.update(change)
        assert take(optimizer, 0.0).threshold == expected


def test_another_window_keeps_the_newest_norms(device):
    optimizer = one(device, max_norm=fastclip.QuantileNorm(window=5, warmup=2))
    for norm in (1, 2, 3, 4, 5, 6, 7):
        take(optimizer, norm)
    for window, kept in ((3, [5, 6, 7]), (6, [5, 6, 7]), (2, [6, 7])):
        optimizer.param_groups[0]["max_norm"]["window"] = window
        stats = take(optimizer, 0.0)
        assert optimizer.norm_history().tolist() == kept
        assert stats.threshold == 2 * np.quantile(kept, 0.5)
    optimizer.param_groups[0]["max_norm"] = "ema"
    assert take(optimizer, 3.0).threshold == INF, "another rule begins anew"
    optimizer.param_groups[0]["max_norm"] = {"rule": "quantile", "window": 4, "warmup": 1}
    assert [take(optimizer, norm).threshold.item() for norm in (3.0, 4.0)] == [INF, 6]


def test_groups_share_a_rule(device):
    params = make_params([(4,), (3,)], torch.float64, device)
    rule = fastclip.QuantileNorm(window=4, warmup=1)
    optimizer = fastclip.SGD([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}], lr=0.1, max_norm=rule)
    norms = []
    for _ in range(5):
        give_grads(params)
        norms.append(torch.cat([p.grad for p in params]).norm().item())
        optimizer.step()
    assert optimizer.norm_history().tolist() == pytest.approx(norms[-4:])
    first, second = optimizer.param_groups
    first["max_norm"]["scale"] = 7.0
    assert second["max_norm"]["scale"] == 7.0 == optimizer.defaults["max_norm"]["scale"]
    second["max_norm"] = {**second["max_norm"], "scale": 8.0}
    give_grads(params)
    with pytest.raises(ValueError, match="max_norm must be the same in all groups"):
        optimizer.step()


def test_an_int_in_a_shared_rule_leaves_it_shared():
    params = make_params([(4,), (3,)])
    optimizer = fastclip.SGD([{"params": [p]} for p in params], lr=0.1, max_norm="quantile")
    first, second = optimizer.param_groups
    for scale in (3, 4.0):
        first["max_norm"]["scale"] = scale
        give_grads(params)
        optimizer.step()
        assert second["max_norm"] is first["max_norm"] and second["max_norm"]["scale"] == scale


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain torch"])
def test_a_ratio_below_1_does_not_bring_the_limit_to_0(plain):
    optimizer = one(max_norm=fastclip.EmaNorm(z=0, ratio=0.5))
    norms = lognormal(1500, 0.1)
    assert thresholds(optimizer, norms, plain)[-1] == pytest.approx(0.5 * np.mean(norms), rel=0.1)


BAD = {
    "no hash": ({"rule": ["x"]}, "the rule of max_norm in param_groups.0. must be 'quantile' or 'ema'"),
    "no such rule": ({"rule": "median"}, "the rule of max_norm in param_groups.0. must be 'quantile' or 'ema'"),
    "no rule": ({"q": 0.5}, "must be 'quantile' or 'ema', got None"),
    "no such key": ({"rule": "ema", "q": 0.5}, "the rule 'ema' has no 'q'; it has z, ratio, decay"),
    "name": ("quantil", "must be a number, or a rule: 'quantile' or 'ema', got 'quantil'"),
    "q": ({"rule": "quantile", "q": 1.5}, "max_norm in param_groups.0.: q must be from 0 to 1, got 1.5"),
    "NaN": ({"rule": "quantile", "q": NAN}, "q must be from 0 to 1, got nan"),
    "scale": ({"rule": "quantile", "scale": 0}, "scale must be above 0, and finite, got 0"),
    "window": ({"rule": "quantile", "window": 2000}, "window must be from 2 to 1024, got 2000"),
    "half": ({"rule": "quantile", "window": 2.5}, "window must be an int, got 2.5"),
    "warmup": ({"rule": "quantile", "window": 5, "warmup": 6}, "warmup must be from 1 to 5, got 6"),
    "none": ({"rule": "ema", "warmup": 0}, "warmup must be from 1 to"),
    "text": ({"rule": "ema", "z": "3"}, "z must be a number, got '3'"),
    "z": ({"rule": "ema", "z": -1.0}, "z must be 0 or more"),
    "ratio": ({"rule": "ema", "ratio": INF}, "ratio must be above 0"),
    "decay": ({"rule": "ema", "decay": 1.0}, "decay must be 0 or more, and below 1"),
    "above": ({"rule": "ema", "above": "mean"}, "above must be 'threshold' or 'reciprocal', got 'mean'"),
    "floor": ({"rule": "ema", "floor": 2.0, "ceiling": 1.0}, "ceiling must be 2.0 or more, which is its floor"),
    "other": (object(), "max_norm in param_groups.0. must be a number, got <object"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rules_are_refused_by_name(bad):
    value, message = BAD[bad]
    with pytest.raises((ValueError, TypeError), match=message):
        one(max_norm=value)
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises((ValueError, TypeError), match=message.replace("param_groups.0", "param_groups.1")):
        fastclip.SGD([{"params": [torch.zeros(1, requires_grad=True)]}, {"params": [p], "max_norm": value}])
    optimizer = one(max_norm="quantile")
    optimizer.param_groups[0]["max_norm"] = value
    (param,) = optimizer.param_groups[0]["params"]
    with pytest.raises((ValueError, TypeError), match=message):
        take(optimizer, 1.0)
    assert param.item() == 0 and not optimizer.state


@pytest.mark.parametrize(
    "rule, message",
    [
        (fastclip.QuantileNorm(scale=0.5), "would leave out ordinary steps: it needs a scale of 1 or more, got 0.5"),
        (fastclip.EmaNorm(ratio=0.5), "needs a ratio of 1 or more, got 0.5"),
        (fastclip.EmaNorm(z=0), "needs a ratio of more than 1, or a z above 0, got 1.0"),
    ],
)
def test_a_skip_norm_that_skips_ordinary_steps_is_refused(rule, message):
    with pytest.raises(ValueError, match="skip_norm in param_groups.0. .*" + message):
        one(skip_norm=rule)
    one(max_norm=rule)


def test_a_rule_needs_skip_nonfinite():
    for limit in ("max_norm", "skip_norm"):
        with pytest.raises(ValueError, match=f"{limit} in param_groups.0. is a rule, which needs skip_nonfinite=True"):
            one(**{limit: "quantile"}, skip_nonfinite=False)
        optimizer = one()
        optimizer.param_groups[0][limit] = "quantile"
        with pytest.raises(ValueError, match="needs skip_nonfinite=True"):
            take(optimizer, 1.0)


def test_where_no_rule_can_be_applied():
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="max_norm must be a number"):
        fastclip.clip_grad_norm_([p], fastclip.QuantileNorm())
    model = torch.nn.Linear(2, 2)
    for limit in ("max_norm", "skip_norm"):
        optimizer = fastclip.SGD(model.parameters(), lr=0.1, **{limit: "quantile"})
        with pytest.raises(ValueError, match=f"step_in_backward can't apply the {limit}"):
            fastclip.step_in_backward(model, optimizer)


# ---- random sequences ----------------------------------------------------------------------------

numbers = st.floats(1e-3, 1e3)
norms = st.lists(st.one_of(numbers, st.sampled_from([0.0, INF, NAN, 1e30])), min_size=1, max_size=60)
quantiles = st.integers(2, 20).flatmap(
    lambda window: st.builds(
        fastclip.QuantileNorm,
        q=st.floats(0, 1),
        scale=numbers,
        window=st.just(window),
        warmup=st.integers(1, window),
        floor=st.sampled_from([0.0, 1.0]),
        ceiling=st.sampled_from([1.0, 50.0, INF]),
    )
)
averages = st.builds(
    fastclip.EmaNorm,
    z=st.floats(0, 10),
    ratio=numbers,
    decay=st.floats(0, 0.999),
    warmup=st.integers(1, 30),
    above=st.sampled_from(["threshold", "reciprocal"]),
    floor=st.sampled_from([0.0, 1.0]),
    ceiling=st.sampled_from([1.0, 50.0, INF]),
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(quantiles, averages), norms)
def test_random_rules(rule, norms):
    """Kernels and plain torch agree to the bit, and limits stay within their bounds."""
    kernels, plain = one(max_norm=rule), one(max_norm=rule)
    entered = []
    for norm in norms:
        ours = take(kernels, norm)
        assert_same_bits([ours.threshold], [take(plain, norm, plain=True).threshold])
        assert rule.floor <= ours.threshold.item() <= rule.ceiling
        assert ours.skipped == (not math.isfinite(norm))
        entered += [norm] if 0 < norm < INF else []
    assert not kernels.param_groups[0]["params"][0].isnan().any()
    if isinstance(rule, fastclip.QuantileNorm):
        assert kernels.norm_history().tolist() == entered[-rule.window :]


@falls_back
@pytest.mark.parametrize("clip", [clip for clip in CLIPS if "norm" not in clip])
def test_a_step_that_falls_back_goes_on_with_the_same_history(clip, device):
    params = make_params([(20, 30), (50,)], device=device)
    others = copy_params(params)
    rule = fastclip.QuantileNorm(window=6, warmup=2, scale=0.9)
    ours = fastclip.SGD(params, lr=0.1, max_norm=rule, skip_norm="ema", **CLIPS[clip])
    theirs = fastclip.SGD(others, lr=0.1, max_norm=rule, skip_norm="ema", **CLIPS[clip])
    for i in range(12):
        give_grads(params, scale=1.0 + i % 3)
        for p, other in zip(params, others, strict=True):
            other.grad = p.grad.clone()
        if i % 3 == 1:
            params[0].grad = params[0].grad.t().contiguous().t()
        ours.step()
        theirs.step()
        assert ours.clip_stats().threshold.item() == pytest.approx(theirs.clip_stats().threshold.item(), rel=1e-12)
    assert ours.norm_history().tolist() == pytest.approx(theirs.norm_history().tolist(), rel=1e-12)
