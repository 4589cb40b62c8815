"""16-bit parameters: master weights, stochastic rounding, float32 gradients, a dtype for the momentum."""

import copy
import warnings

import pytest
import torch

import fastclip
from fastclip.plain.rounding import Rounding
from tests.support.cases import (
    LARGE,
    SHAPES,
    assert_same_steps,
    copy_params,
    give_grads,
    make_params,
    reference_step,
    through_a_file,
)

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
RULES = {
    "sgd": (fastclip.SGD, {"lr": 0.1}),
    "momentum": (fastclip.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "adam": (fastclip.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (fastclip.AdamW, {"lr": 0.01}),
}
WAYS = {
    "plain": {},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 7},
}


@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=["16-bit gradients", "float32 gradients"])
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_the_reference(rule, dtype, way, momentum_dtype, grad_dtype):
    """In plain torch, in another order of memory, too, and with the same random numbers."""
    optimizer_class, settings = RULES[rule]
    settings = {**settings, **WAYS[way], "momentum_dtype": momentum_dtype, "clip_value": 0.5}
    ours = make_params(SHAPES, dtype)
    ours.append(torch.randn(4, 8, 3, 5).to(dtype, memory_format=torch.channels_last).requires_grad_())
    expected = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in ours]
    if grad_dtype:
        for p in ours + expected:
            p.grad_dtype = grad_dtype
    optimizer, other = optimizer_class(ours, **settings), optimizer_class(expected, **settings)
    for _ in range(3):
        for p, e in zip(ours, expected, strict=True):
            p.grad = torch.randn_like(p, dtype=grad_dtype or dtype)
            e.grad = p.grad.clone()
        optimizer.step()
        reference_step(other)
    assert_same_steps(ours, expected, optimizer.state, other.state)


@pytest.mark.parametrize("momentum_dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_a_16_bit_momentum_of_float32_parameters(rule, momentum_dtype):
    optimizer_class, settings = RULES[rule]
    ours = make_params(SHAPES + LARGE)
    expected = copy_params(ours)
    optimizer, other = (optimizer_class(p, **settings, momentum_dtype=momentum_dtype) for p in (ours, expected))
    for _ in range(3):
        give_grads(ours, expected)
        optimizer.step()
        reference_step(other)
    assert_same_steps(ours, expected, optimizer.state, other.state)
    name = "momentum_buffer" if rule == "momentum" else "exp_avg"
    assert {state[name].dtype for state in optimizer.state.values()} == {momentum_dtype}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_on_any_number_of_threads(rule, way):
    optimizer_class, settings = RULES[rule]
    first = make_params(LARGE, torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params = copy_params(first)
        optimizer = optimizer_class(params, **settings, **WAYS[way])
        torch.manual_seed(1)
        for _ in range(2):
            give_grads(params)
            optimizer.step()
        results.append(params)
    for p, others in zip(results[0], zip(*results[1:], strict=True), strict=True):
        assert all(torch.equal(p, other) for other in others)


# ---- what the ways are for ----


def distance_after(steps, way, rule="sgd"):
    """How far a bfloat16 weight of 1 still is from 0.5 after steps of 1/1,000 of the distance, on average."""
    optimizer_class, settings = RULES[rule]
    p = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
    optimizer = optimizer_class([p], **{**settings, "lr": 1e-3}, **WAYS[way])
    for _ in range(steps):
        p.grad = (p.detach() - 0.5) if rule == "sgd" else torch.sign(p.detach() - 0.5)
        optimizer.step()
    return (p.float() - 0.5).mean().item()


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_master_weights_and_stochastic_rounding_learn_where_plain_rounding_stalls(rule):
    """Steps below half a unit in the last place are lost, each of them, unless something keeps them."""
    steps = 1000 if rule == "sgd" else 400
    expected = 0.5 * 0.999**steps if rule == "sgd" else 0.5 - 1e-3 * steps
    assert distance_after(steps, "plain", rule) == 0.5  # it has not moved at all
    assert abs(distance_after(steps, "master", rule) - expected) < 0.005
    assert abs(distance_after(steps, "stochastic", rule) - expected) < 0.005


def loss_of_a_model(dtype, **way):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    inputs = torch.randn(256, 16)
    targets = torch.sin(inputs[:, :4] * 2)
    model, inputs, targets = model.to(dtype), inputs.to(dtype), targets.to(dtype)
    optimizer = fastclip.AdamW(model.parameters(), lr=3e-4, max_norm=1.0, **way)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).float().square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_model_in_bfloat16_learns_as_in_float32_but_with_plain_rounding():
    """A small regression: 0.068 in float32 and both ways; plain rounding stays at 0.34."""
    expected = loss_of_a_model(torch.float32)
    for way in ("master", "stochastic"):
        assert abs(loss_of_a_model(torch.bfloat16, **WAYS[way]) / expected - 1) < 0.1
    assert loss_of_a_model(torch.bfloat16) > 3 * expected


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_rounding_at_random_goes_to_a_neighbour_and_is_right_on_average(dtype):
    """Values of all magnitudes, subnormal ones too: the one below or above, as often as it is near."""
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 2.0**-24
    for value in (1.003, -1.003, 0.1, 3e-5, -3e-6, 1000.3, 40000.1, smallest * 1.3, 0.0, -0.0, 1.5):
        n = 1 << 16
        p = torch.zeros(n, dtype=dtype, requires_grad=True)
        p.grad_dtype = torch.float32
        p.grad = torch.full((n,), -value)
        fastclip.SGD([p], lr=1.0, stochastic_rounding=True).step()
        exact = torch.tensor(value)
        rounded = p.detach().float()
        low, high = rounded.min(), rounded.max()
        assert low <= exact <= high
        spacing = high - low
        nearest = exact.to(dtype).float()
        if nearest == exact:
            assert low == high
        else:
            assert torch.equal(rounded.unique(), torch.stack([low, high]))
            assert abs(nearest - exact) <= spacing / 2, "there is one between"
            assert abs(rounded.mean(dtype=torch.float64) - exact) < 6 * spacing * 0.5 / n**0.5


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_what_can_be_stored_exactly_is_not_moved(dtype):
    """All 65,536 patterns of bits: infinities stay, and NaN stays NaN."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = torch.zeros(2**16, dtype=dtype, requires_grad=True)
    p.grad = values
    fastclip.SGD([p], lr=1.0, stochastic_rounding=True).step()
    expected = 0 - values.float()
    assert torch.equal(torch.nan_to_num(p.detach().float(), nan=123.0), torch.nan_to_num(expected, nan=123.0))


def noise(count=4096, seed=0, steps=1, others=0):
    """Which elements were rounded up, as 0 and 1, in the last of some steps."""
    params = [torch.zeros(3, dtype=torch.bfloat16, requires_grad=True) for _ in range(others)]
    p = torch.ones(count, dtype=torch.bfloat16, requires_grad=True)
    optimizer = fastclip.SGD([*params, p], lr=1.0, stochastic_rounding=True, rounding_seed=seed)
    for _ in range(steps):
        p.data.fill_(1)
        p.grad = torch.full_like(p, -(2.0**-8))  # half of what is between 1 and the next
        optimizer.step()
    return (p.detach() > 1).double()


def test_random_numbers_of_seeds_steps_tensors_and_elements_have_nothing_in_common():
    several = torch.stack([noise(), noise(seed=1), noise(steps=2), noise(steps=3), noise(others=1), noise(others=2)])
    assert torch.equal(several[0], noise())
    correlations = torch.corrcoef(several) - torch.eye(len(several), dtype=torch.float64)
    assert correlations.abs().max() < 0.08  # five standard deviations
    shifted = torch.stack([several[0].roll(i) for i in range(1, 17)])
    centered = several[0] - several[0].mean()
    assert ((shifted - several[0].mean()) @ centered / (centered @ centered)).abs().max() < 0.08


def test_rounding_counts_places_in_memory():
    """Beyond 2^32 elements, too: the reference is asked, as no test has so much memory."""
    group = {"stochastic_rounding": True, "rounding_seed": 3}
    rounding = Rounding(group, 0, torch.tensor(1.0))
    values = torch.full((64, 8), 1.001)
    plain, transposed = (torch.empty(64, 8, dtype=torch.bfloat16) for _ in range(2))
    transposed = torch.empty(8, 64, dtype=torch.bfloat16).t()
    rounding.store(0, plain, values)
    rounding.store(0, transposed, values)
    assert torch.equal(plain.flatten(), transposed.t().flatten())
    other = torch.empty(64, 8, dtype=torch.bfloat16)
    rounding.store(1, other, values)
    assert not torch.equal(plain, other)


# ---- state ----


def state_dtypes(optimizer):
    return {name: value.dtype for state in optimizer.state.values() for name, value in state.items()}


def test_dtypes_of_states():
    for way, expected in {"plain": torch.bfloat16, "master": torch.float32, "stochastic": torch.bfloat16}.items():
        params = make_params([(5,)], torch.bfloat16)
        optimizer = fastclip.AdamW(params, **WAYS[way])
        give_grads(params)
        optimizer.step()
        found = state_dtypes(optimizer)
        assert found["exp_avg"] == found["exp_avg_sq"] == expected
        assert ("master_param" in found) == (way == "master")
    assert found["step"] == torch.float32


def test_parameters_are_the_master_weights_rounded():
    params = make_params([(300,)], torch.bfloat16)
    optimizer = fastclip.AdamW(params, master_weights=True)
    for _ in range(5):
        give_grads(params)
        optimizer.step()
    (p,) = params
    master = optimizer.state[p]["master_param"]
    assert torch.equal(master.bfloat16(), p.detach()) and not torch.equal(master, p.float())


def test_float32_parameters_have_no_masters_and_are_not_rounded():
    params = make_params(SHAPES)
    for way in WAYS.values():
        expected, ours = copy_params(params), copy_params(params)
        give_grads(expected, ours)
        plain, optimizer = fastclip.AdamW(expected), fastclip.AdamW(ours, **way)
        plain.step()
        optimizer.step()
        for a, b in zip(expected, ours, strict=True):
            assert torch.equal(a, b) and set(plain.state[a]) == set(optimizer.state[b])


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_goes_on_from_a_file_with_the_same_bits(way, rule, momentum_dtype):
    """torch would round all states to the parameter's dtype."""
    optimizer_class, settings = RULES[rule]
    settings = {**settings, **WAYS[way], "momentum_dtype": momentum_dtype}
    params = make_params(SHAPES, torch.bfloat16) + make_params([(9,)])
    optimizer = optimizer_class(params, **settings)
    give_grads(params)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    others = copy_params(params)
    other = optimizer_class(others, lr=7.0)
    other.load_state_dict(saved)
    assert state_dtypes(other) == state_dtypes(optimizer)
    for _ in range(2):
        give_grads(params, others)
        optimizer.step()
        other.step()
    assert_same_steps(others, params, other.state, optimizer.state)


def test_a_checkpoint_of_torch_goes_on_with_master_weights():
    """Its states are widened; the masters are made of the parameters."""
    params = make_params([(50,)], torch.bfloat16)
    plain = torch.optim.AdamW(params, foreach=False)
    give_grads(params)
    plain.step()
    saved = copy.deepcopy(plain.state_dict())
    optimizer = fastclip.AdamW(params, master_weights=True)
    optimizer.load_state_dict(saved)
    assert {dtype for name, dtype in state_dtypes(optimizer).items()} == {torch.float32}
    give_grads(params)
    optimizer.step()
    (p,) = params
    assert torch.equal(optimizer.state[p]["master_param"].bfloat16(), p.detach())
    assert float(optimizer.state[p]["step"]) == 2


def test_copies_keep_the_settings_and_the_bits():
    params = make_params([(50,)], torch.bfloat16)
    optimizer = fastclip.AdamW(params, stochastic_rounding=True, rounding_seed=5, momentum_dtype=torch.float32)
    give_grads(params)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    (p,), (q,) = params, other.param_groups[0]["params"]
    q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(p, q) and state_dtypes(other) == state_dtypes(optimizer)


def test_groups_have_their_own_ways():
    params = make_params([(40,)] * 3, torch.bfloat16)
    optimizer = fastclip.SGD([{"params": [p], **way} for p, way in zip(params, WAYS.values(), strict=True)], lr=0.1)
    give_grads(params)
    optimizer.step()
    assert [sorted(optimizer.state.get(p, {})) for p in params] == [[], ["master_param"], ["step"]]


def test_a_skipped_step_rounds_nothing_and_counts_nothing():
    p = make_params([(40,)], torch.bfloat16)[0]
    optimizer = fastclip.SGD([p], lr=0.1, stochastic_rounding=True, skip_nonfinite=True)
    for value in (1.0, float("nan"), 1.0):
        p.grad = torch.full_like(p, value)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p.detach(), before) == (value != 1.0)
    assert float(optimizer.state[p]["step"]) == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"master_weights": True, "stochastic_rounding": True}, "exclude each other"),
        ({"stochastic_rounding": True, "rounding_seed": -1}, "rounding_seed .*must be an int from 0 to"),
        ({"stochastic_rounding": True, "rounding_seed": 2**32}, "rounding_seed .*must be an int from 0 to"),
        ({"stochastic_rounding": True, "rounding_seed": 0.5}, "rounding_seed .*must be an int from 0 to"),
        ({"momentum_dtype": torch.float64}, "momentum_dtype .*must be None, torch.float32"),
        ({"momentum_dtype": "int8"}, "momentum_dtype .*must be None, torch.float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer_class", [fastclip.SGD, fastclip.AdamW])
def test_settings_that_mean_nothing_are_refused(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class(make_params([(3,)], torch.bfloat16), **settings)


def test_masters_that_are_none_are_refused():
    (p,) = params = make_params([(3,)], torch.bfloat16)
    optimizer = fastclip.SGD(params, lr=0.1, master_weights=True)
    give_grads(params)
    optimizer.step()
    before = p.detach().clone()
    good = optimizer.state[p]["master_param"]
    for master, error in [
        (good.bfloat16(), TypeError),
        (good[:2], ValueError),
        (3.0, TypeError),
    ]:
        optimizer.state[p]["master_param"] = master
        with pytest.raises(error, match="master_param of parameter 0 of group 0"):
            optimizer.step()
        assert torch.equal(p.detach(), before)


def test_float64_keeps_to_itself():
    """A 16-bit momentum of float64 parameters is for plain torch, which says so."""
    params = make_params([(3,)], torch.float64)
    optimizer = fastclip.SGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.bfloat16)
    give_grads(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1 and "momentum_buffer" in str(caught[0].message)
    assert state_dtypes(optimizer) == {"momentum_buffer": torch.bfloat16}


@pytest.mark.falls_back
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [fastclip.Adam, fastclip.AdamW])
def test_a_momentum_of_float64_parameters_that_is_narrower(cls, momentum_dtype):
    """Computed in float64, rounded when it is stored; torch's code does not take two dtypes."""
    params = make_params([(3, 4)], torch.float64)
    twins = copy_params(params)
    optimizer, exact = cls(params, momentum_dtype=momentum_dtype), cls(twins)
    for _ in range(3):
        give_grads(params, twins)
        optimizer.step()
        exact.step()
        average = exact.state[twins[0]]["exp_avg"]
        average.copy_(average.to(momentum_dtype))
    assert optimizer.state[params[0]]["exp_avg"].dtype == momentum_dtype
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"].double(), average, rtol=1e-12, atol=1e-15)
