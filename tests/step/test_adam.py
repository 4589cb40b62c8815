"""fastclip.Adam and AdamW against the plain loop: bits, state, and what they have that SGD has not."""

import copy
import itertools
import math
import warnings

import pytest
import torch

import fastclip
from fastclip.plain import rules
from fastclip.plain import step as reference
from fastclip.settings import OWN_SETTINGS
from tests.support.cases import (
    CLIPS,
    LARGE,
    SHAPES,
    TINY,
    assert_close,
    assert_same_bits,
    copy_params,
    exact_square_roots,
    give_grads,
    make_params,
    pair,
    param,
)

OPTIMIZERS = {"Adam": (fastclip.Adam, torch.optim.Adam), "AdamW": (fastclip.AdamW, torch.optim.AdamW)}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shapes", [TINY, LARGE, SHAPES + TINY + LARGE], ids=["tiny", "large", "all"])
def test_same_bits_over_many_and_large_tensors(shapes, threads):
    torch.set_num_threads(threads)
    loop, theirs, optimizer, ours = pair(shapes, CLIPS["value"], optimizer="AdamW", amsgrad=True)
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_within_units_in_the_last_place_of_torch_as_it_is(name, device):
    """With torch's own square roots: now and then an update has another last bit, which may round differently."""
    ours = make_params(SHAPES + LARGE, device=device)
    theirs = copy_params(ours)
    ours_of, theirs_of = OPTIMIZERS[name]
    optimizer, plain = ours_of(ours, lr=0.01), theirs_of(theirs, lr=0.01, foreach=False)
    for _ in range(5):
        give_grads(theirs, ours)
        plain.step()
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=2.4e-7, atol=5 * 0.01 * 2.4e-7)  # 2 units


@pytest.mark.parametrize("clip", ["norm", "inf norm", "loose norm", "value and norm"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norm_clip_agrees_with_the_loop(name, dtype, rtol, clip):
    loop, theirs, optimizer, ours = pair(SHAPES, CLIPS[clip], dtype, optimizer=name, weight_decay=0.1, eps=1e-3)
    for _ in range(4):
        give_grads(theirs, ours)
        norm = loop.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.total_norm, norm, rtol=1e-12, atol=0)
    assert_close(theirs, ours, rtol)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(dtype, amsgrad):
    ours = make_params(SHAPES, dtype)
    expected = copy_params(ours)
    settings = {"lr": 0.01, "amsgrad": amsgrad, "clip_value": 0.5}
    optimizer = fastclip.AdamW(ours, **settings)
    groups, state = fastclip.AdamW(expected, **settings).param_groups, {p: {} for p in expected}
    for _ in range(4):
        give_grads(expected, ours)
        optimizer.step()
        with exact_square_roots():
            reference.step(rules.ADAM, groups, state)
    for p, e in zip(ours, expected, strict=True):
        assert torch.equal(p, e)
        assert list(optimizer.state[p]) == list(state[e])
        for name, value in state[e].items():
            assert torch.equal(optimizer.state[p][name], value) and optimizer.state[p][name].dtype == value.dtype


def test_reference_agrees_with_the_loop():
    for name, clip in itertools.product(OPTIMIZERS, CLIPS.values()):
        loop, theirs, optimizer, ours = pair([(5, 3), (17,)], clip, torch.float64, optimizer=name, weight_decay=0.1)
        for _ in range(3):
            give_grads(theirs, ours)
            loop.step()
            with exact_square_roots():
                stats = reference.step(rules.ADAM, optimizer.param_groups, optimizer.state)
            assert not stats.skipped
        assert_close(theirs, ours, 1e-13 if "max_norm" in clip else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_a_drop_in(name):
    """An instance of torch's, with its arguments in its order and its defaults."""
    ours, theirs = OPTIMIZERS[name]
    positional = (1e-2, (0.8, 0.9), 1e-5, 0.1, True)
    optimizer, plain = ours([param()], *positional), theirs([param()], *positional)
    assert isinstance(optimizer, theirs)
    assert {k: v for k, v in optimizer.defaults.items() if k not in OWN_SETTINGS} == plain.defaults
    assert ours([param()]).defaults.items() >= theirs([param()]).defaults.items()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("to_torch", [True, False])
def test_states_are_exchanged_with_torch(name, to_torch):
    """Trained here and on there, or the reverse: the same bits as torch all the way."""
    ours, theirs = OPTIMIZERS[name]
    params = make_params(SHAPES)
    expected = copy_params(params)
    settings = {"lr": 0.01, "amsgrad": True}
    loop = theirs(expected, foreach=False, **settings)
    first, second = (ours, theirs) if to_torch else (theirs, ours)
    optimizer = first(params, **settings)
    for half in range(2):
        if half == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = second(params, lr=7.0)
            optimizer.load_state_dict(saved)
        if isinstance(optimizer, theirs) and type(optimizer) is theirs:
            optimizer.param_groups[0]["foreach"] = False
        for _ in range(3):
            give_grads(params, expected)
            with exact_square_roots():
                loop.step()
                optimizer.step()
    assert_same_bits(expected, params, loop, optimizer)


def test_each_tensor_counts_its_own_steps():
    """One without a gradient is not counted, and its averages are corrected by its own count."""
    loop, theirs, optimizer, ours = pair([(5,)] * 40, optimizer="Adam")
    for step in range(6):
        give_grads(theirs, ours)
        for i in range(40):
            if i % (step + 1):
                theirs[i].grad = ours[i].grad = None
        loop.step()
        optimizer.step()
    assert len({float(optimizer.state[p]["step"]) for p in ours}) > 3
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_step_that_was_loaded_as_a_number_or_as_float64(recwarn):
    """Old checkpoints hold numbers; torch keeps float64 where that is the default dtype."""
    for step in (3, 3.0, torch.tensor(3.0, dtype=torch.float64)):
        loop, theirs, optimizer, ours = pair([(5,)], optimizer="AdamW")
        for _ in range(3):
            give_grads(theirs, ours)
            loop.step()
            optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["step"] = step
        optimizer.load_state_dict(saved)
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
        assert_same_bits(theirs, ours)
        assert float(optimizer.state[ours[0]]["step"]) == 4
    assert not recwarn


def test_new_counts_have_torchs_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = fastclip.Adam([param()])
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    (state,) = optimizer.state.values()
    assert state["step"].dtype == torch.float64 and state["step"].shape == ()


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_a_state_that_is_there_in_parts_is_refused(missing):
    p = param()
    optimizer = fastclip.Adam([p], amsgrad=missing == "max_exp_avg_sq")
    optimizer.step()
    before = p.detach().clone()
    del optimizer.state[p][missing]
    with pytest.raises(KeyError, match=f"the state of parameter 0 of group 0 has no {missing}"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_amsgrad_that_is_switched_on_later_is_refused_as_in_torch():
    p = param()
    optimizer = fastclip.Adam([p])
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        optimizer.step()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"betas": (math.nan, 0.9)}, ValueError),
        ({"betas": (0.9,)}, ValueError),
        ({"betas": 0.9}, ValueError),
        ({"eps": "small"}, TypeError),
        ({"eps": math.nan}, ValueError),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_a_step_and_change_nothing(setting, error):
    p = param()
    optimizer = fastclip.Adam([p])
    optimizer.param_groups[0].update(setting)
    with pytest.raises(error, match=f"{next(iter(setting))}.* in param_groups.0."):
        optimizer.step()
    assert not optimizer.state and not p.detach().any()


def test_sparse_gradients_are_refused_as_in_torch():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = fastclip.Adam(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("skip", ["found_inf", "skip_nonfinite"])
def test_a_skipped_step_counts_nothing_and_leaves_no_state(skip):
    p = param()
    optimizer = fastclip.AdamW([p], skip_nonfinite=skip == "skip_nonfinite")
    for taken in (0, 1):
        p.grad = torch.full((4,), math.inf)
        if skip == "found_inf":
            optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
        optimizer.step()
        assert bool(optimizer.state.get(p)) == bool(taken)
        if taken:
            assert float(optimizer.state[p]["step"]) == 1
        if skip == "found_inf":
            del optimizer.grad_scale, optimizer.found_inf
        p.grad = torch.ones(4)
        if not taken:
            optimizer.step()
    assert int(optimizer.skipped_steps) == 2
    assert torch.isfinite(p).all()


def test_groups_share_a_norm_and_have_rules_of_their_own():
    ours = make_params([(5,), (70, 70), (9,)])
    theirs = copy_params(ours)
    settings = [{"lr": 0.1}, {"amsgrad": True, "betas": (0.8, 0.9)}, {"weight_decay": 0.1, "maximize": True}]

    def groups(params):
        return [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]

    optimizer = fastclip.Adam(groups(ours), max_norm=1.0)
    plain = torch.optim.Adam(groups(theirs), foreach=False)
    for _ in range(3):
        give_grads(theirs, ours)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.total_norm.float(), norm)
    assert_close(theirs, ours, 1e-4)  # Adam divides by what the norm clip has scaled: its last bits may show


@pytest.mark.parametrize("capturable", [False, True])
def test_on_a_gpu_steps_are_counted_there(capturable):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that this torch can use")
    params = make_params(SHAPES, device="cuda")
    expected = copy_params(params)
    optimizer = fastclip.AdamW(params, capturable=capturable)
    loop = torch.optim.AdamW(expected, foreach=False)
    for _ in range(3):
        give_grads(params, expected)
        optimizer.step()
        loop.step()
    assert all(optimizer.state[p]["step"].is_cuda and float(optimizer.state[p]["step"]) == 3 for p in params)
    assert_close(expected, params, 1e-6)
