"""States in 8 bits: what codes mean, the bits of plain torch, checkpoints, refusals."""

import copy
import math

import pytest
import torch

import fastclip
from fastclip.plain import quantized
from tests.support.cases import assert_same_steps, copy_params, give_grads, make_params, reference_step, through_a_file

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
RULES = {
    "momentum": (fastclip.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (fastclip.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (fastclip.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (fastclip.AdamW, {"lr": 0.01}),
    "lion": (fastclip.Lion, {"lr": 0.01, "weight_decay": 0.1}),
}
WAYS = {
    "plain": {},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 7},
}
# Whole blocks, a part of one, several chunks, rows that end within blocks, and two that are too small.
SHAPES = [(4096,), (4097,), (40, 512), (130, 90), (3, 20_003), (4095,), (7,)]


def dynamic_map(signed):
    """The numbers that 8 bits stand for, by Dettmers' definition: https://arxiv.org/abs/1511.04561, section 3."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade * (1 if signed else 2)
        for cell in range(cells):
            middle = (0.1 + 0.9 * (cell + 0.5) / cells) * 10.0 ** (decade - 6)
            numbers += [middle, -middle] if signed else [middle]
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def round_trip(values, signed):
    state = quantized.new_quantized(fastclip.SGD._rule, {}, values, "momentum_buffer" if signed else "", values)
    state.store(values)
    return state


# ---- what codes mean ----


@SIGNS
def test_the_map_is_that_of_dettmers(signed):
    expected = dynamic_map(signed)
    assert len(expected) == 256
    torch.testing.assert_close(quantized.code_values(signed).double(), expected, rtol=1e-6, atol=0)


@SIGNS
def test_a_number_gets_the_nearest_code(signed):
    values = dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / 2
    near = torch.cat(
        [values, middles * (1 - 1e-5), middles * (1 + 1e-5), torch.linspace(-1 if signed else 0, 1, 99_999)]
    )
    codes = quantized.encoded(near.float(), signed).long()
    distance = (values[codes] - near).abs()
    nearest = (values[None] - near[:, None]).abs().amin(1)
    small = near.abs() < (0 if signed else values[1])  # is not rounded to 0: an update is divided by its root
    assert torch.all(distance[~small] <= nearest[~small] * (1 + 1e-4))
    assert torch.all(codes[small & (near > 0)] == 1)
    assert torch.all(codes[near == 0] == (127 if signed else 0))


@SIGNS
def test_the_error_has_a_bound(signed):
    """As docs/precision.md states it: of the largest magnitude in the block, and of the number itself."""
    torch.manual_seed(0)
    values = torch.randn(64, 256) * torch.logspace(-9, 9, 64)[:, None] * torch.randn(64, 256).exp()
    values = values if signed else values.square()
    state = round_trip(values, signed)
    error, largest = (state.values() - values).abs(), values.abs().amax(1, keepdim=True)
    assert torch.all(error <= largest * (0.0071 if signed else 0.0036))
    large = values.abs() >= 0.1 * largest
    assert torch.all(error[large] <= values.abs()[large] * (0.071 if signed else 0.036))
    middle = values.abs() >= 1e-3 * largest
    assert torch.all(error[middle] <= values.abs()[middle] * (0.29 if signed else 0.15))


@SIGNS
def test_all_codes_are_read_as_plain_torch_reads_them(signed):
    """Momentum 1 hands on what was read; a gradient of 0 adds nothing."""
    p = torch.zeros(4096, requires_grad=True)
    p.grad = torch.zeros_like(p)
    name = "momentum_buffer" if signed else "exp_avg_sq"
    if signed:
        optimizer = fastclip.SGD([p], lr=1.0, momentum=1.0, state_bits=8)
    else:
        optimizer = fastclip.AdamW([p], lr=1.0, betas=(0.0, 1.0 - 2**-53), weight_decay=0, state_bits=8)
    optimizer.step()
    state = optimizer.state[p]
    state[name + "_codes"].copy_(torch.arange(4096) % 256)
    state[name + "_scales"].copy_(torch.logspace(-30, 30, 16))
    codes, expected = state[name + "_codes"].clone(), quantized.stored(optimizer._rule, state, name).values()
    optimizer.step()
    if signed:
        assert torch.equal(p.detach(), -expected)
    assert torch.equal(quantized.stored(optimizer._rule, state, name).values(), expected)  # each block has a 1
    assert torch.equal(state[name + "_codes"], codes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127])
def test_a_block_with_an_inf_or_nan_is_lost_and_no_other(bad):
    p, twin = make_params([(4096,)]), make_params([(4096,)])
    optimizer, other = (fastclip.SGD(q, lr=1e-3, momentum=0.9, state_bits=8) for q in (p, twin))
    for value in (1.0, bad, 1.0):
        p[0].grad = torch.ones(4096)
        p[0].grad[300] = value
        twin[0].grad = p[0].grad.clone()
        optimizer.step()
        reference_step(other)
    lost = p[0].isnan()
    assert lost[256:512].all() and not lost[:256].any() and not lost[512:].any()
    assert torch.equal(lost, twin[0].isnan())


def test_numbers_that_have_no_scale_become_zero():
    p = torch.zeros(4096, requires_grad=True)
    p.grad = torch.full_like(p, 1e-39)
    optimizer = fastclip.SGD([p], lr=1.0, momentum=0.9, state_bits=8)
    optimizer.step()
    assert not optimizer.state[p]["momentum_buffer_scales"].any()
    assert torch.all(optimizer.state[p]["momentum_buffer_codes"] == 127)


# ---- steps ----


def assert_same_bits(optimizer_class, settings, dtype):
    """As plain torch, in another order of memory, too, and on any number of threads."""
    ours = make_params(SHAPES, dtype)
    ours.append(torch.randn(8, 16, 6, 7).to(dtype, memory_format=torch.channels_last).requires_grad_())
    expected = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in ours]
    settings = {**settings, "clip_value": 0.5, "state_bits": 8}
    optimizer, other = optimizer_class(ours, **settings), optimizer_class(expected, **settings)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for p, e in zip(ours, expected, strict=True):
            p.grad = torch.randn_like(p) * (10.0 ** torch.randint(-3, 3, p.shape)).to(dtype)
            e.grad = p.grad.clone()
        optimizer.step()
        reference_step(other)
    assert_same_steps(ours, expected, optimizer.state, other.state)
    in_8_bits = [any(name.endswith("_codes") for name in optimizer.state[p]) for p in ours]
    assert in_8_bits == [p.numel() >= 4096 for p in ours]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_the_reference(rule, dtype, way):
    optimizer_class, settings = RULES[rule]
    assert_same_bits(optimizer_class, {**settings, **WAYS[way]}, dtype)


def test_same_bits_with_amsgrad():
    assert_same_bits(fastclip.Adam, {"lr": 0.01, "amsgrad": True}, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_update_rms": 0.5},
        {"max_change": 0.1},
        {"max_relative_change": 0.01, "norm_scope": "parameter"},
        {"max_norm": 1.0, "skip_nonfinite": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_clips_see_the_same_numbers_as_in_the_reference(settings):
    ours = make_params([(40, 512), (4099,), (5,)])
    expected = copy_params(ours)
    optimizer, other = (fastclip.AdamW(p, lr=0.01, state_bits=8, **settings) for p in (ours, expected))
    for _ in range(4):
        give_grads(ours, expected)
        optimizer.step()
        reference_step(other)
    for p, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-7)


def test_a_state_takes_a_little_more_than_a_byte():
    (p,) = make_params([(512, 1024)])
    optimizer = fastclip.AdamW([p], state_bits=8)
    give_grads([p])
    optimizer.step()
    size = sum(value.nbytes for name, value in optimizer.state[p].items() if name != "step")
    assert size == p.numel() * 2 * (1 + 4 / 256)
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[p].items() if name.endswith("_scales")}
    assert shapes == {"exp_avg_scales": (512, 4), "exp_avg_sq_scales": (512, 4)}  # sharded as the parameter is


def test_training_ends_where_it_does_with_states_in_float32():
    """A square loss with a noisy gradient: the distance from the optimum is that of float32 within a tenth."""

    def distance(cls, bits, settings):
        torch.manual_seed(0)
        target, p = torch.randn(4096), torch.zeros(4096, requires_grad=True)
        optimizer = cls([p], state_bits=bits, **settings)
        for _ in range(400):
            p.grad = (p.detach() - target) + torch.randn(4096)
            optimizer.step()
        return (p.detach() - target).norm()

    for cls, settings in (
        (fastclip.SGD, {"lr": 0.01, "momentum": 0.9}),
        (fastclip.AdamW, {"lr": 0.02, "weight_decay": 0}),
        (fastclip.Lion, {"lr": 0.01}),
    ):
        assert distance(cls, 8, settings) <= 1.1 * distance(cls, 32, settings), cls


def test_a_momentum_of_sparse_gradients_stays_sparse():
    def trained(bits):
        torch.manual_seed(0)
        table = torch.nn.Embedding(64, 128, sparse=True)
        optimizer = fastclip.SGD(table.parameters(), lr=0.1, momentum=0.9, state_bits=bits)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 5, 5, 9])).square().sum().backward()
            optimizer.step()
        return table.weight, optimizer.state[table.weight]

    with pytest.warns(UserWarning, match="is sparse"):
        (weight, state), (expected, _) = trained(8), trained(32)
    assert torch.equal(weight, expected) and state["momentum_buffer"].is_sparse


def test_dense_gradients_after_sparse_ones():
    p = make_params([(64, 128)])
    q = copy_params(p)
    optimizer, other = (fastclip.SGD(params, lr=0.1, momentum=0.9, state_bits=8) for params in (p, q))
    give_grads(p, q)
    for each in (optimizer, other):
        each.step()
    for params in (p, q):
        params[0].grad = torch.sparse_coo_tensor([[3, 7]], torch.ones(2, 128), (64, 128))
    with pytest.warns(UserWarning, match="is sparse"):
        optimizer.step()
    reference_step(other)
    assert torch.equal(p[0], q[0]) and optimizer.state[p[0]].keys() == {
        "momentum_buffer_codes",
        "momentum_buffer_scales",
    }


# ---- checkpoints ----


@pytest.mark.parametrize("rule", RULES)
def test_goes_on_from_a_file_with_the_same_bits(rule):
    cls, settings = RULES[rule]
    params = make_params([(40, 512), (9,)], torch.bfloat16)
    optimizer = cls(params, state_bits=8, **settings)
    give_grads(params)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    others = copy_params(params)
    other = cls(others, lr=7.0)
    other.load_state_dict(saved)
    copied = copy.deepcopy(optimizer)
    for _ in range(2):
        give_grads(params, others, copied.param_groups[0]["params"])
        for each in (optimizer, other, copied):
            each.step()
    assert_same_steps(others, params, other.state, optimizer.state)
    assert_same_steps(copied.param_groups[0]["params"], params, copied.state, optimizer.state)


@pytest.mark.parametrize("rule", ["momentum", "adam", "adamw"])
def test_torch_goes_on_from_dequantized_states(rule):
    cls, settings = RULES[rule]
    params = make_params([(40, 512), (9,)])
    optimizer = cls(params, state_bits=8, **settings)
    for _ in range(3):
        give_grads(params)
        optimizer.step()
    saved = optimizer.state_dict()
    numbers = fastclip.dequantized(saved)
    assert set(saved["state"][0]) != set(numbers["state"][0]) and saved["param_groups"][0]["state_bits"] == 8
    theirs = copy_params(params)
    torchs = getattr(torch.optim, cls.__name__)(theirs, foreach=False)
    torchs.load_state_dict(copy.deepcopy(numbers))  # torch shares what it loads
    for p, t in zip(params, theirs, strict=True):
        for name, value in torchs.state[t].items():
            expected = quantized.stored(cls._rule, optimizer.state[p], name)
            expected = expected.values() if isinstance(expected, quantized.Quantized) else expected
            assert torch.equal(value, expected), name
    give_grads(params, theirs)
    optimizer.step()
    torchs.step()
    for p, t in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-6)


def test_torch_refuses_codes():
    """It would take them for numbers if they had the names of its states."""
    (p,) = make_params([(4096,)])
    optimizer = fastclip.AdamW([p], state_bits=8)
    give_grads([p])
    optimizer.step()
    theirs = torch.optim.AdamW([p], foreach=False)
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()


def test_states_of_torch_are_quantized_when_they_are_loaded():
    params = make_params([(40, 512), (9,)])
    theirs = torch.optim.AdamW(params, foreach=False)
    give_grads(params)
    theirs.step()
    optimizer = fastclip.AdamW(params, state_bits=8)
    optimizer.load_state_dict(theirs.state_dict())
    large, small = (optimizer.state[p] for p in params)
    assert set(large) == {"step", *(f"exp_avg{sq}{end}" for sq in ("", "_sq") for end in ("_codes", "_scales"))}
    assert set(small) == {"step", "exp_avg", "exp_avg_sq"}
    error = quantized.stored(optimizer._rule, large, "exp_avg").values() - theirs.state[params[0]]["exp_avg"]
    assert 0 < error.abs().max() <= 0.0071 * theirs.state[params[0]]["exp_avg"].abs().max()


def test_codes_become_numbers_where_a_file_asks_for_32_bits():
    params = make_params([(40, 512)])
    optimizer = fastclip.AdamW(params, state_bits=8)
    give_grads(params)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_bits"] = 32
    other = fastclip.AdamW(params)
    other.load_state_dict(saved)
    assert set(other.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    expected = quantized.stored(optimizer._rule, optimizer.state[params[0]], "exp_avg_sq").values()
    assert torch.equal(other.state[params[0]]["exp_avg_sq"], expected)


def test_states_stay_as_they_are_when_the_setting_changes():
    params = make_params([(4096,), (4096,)])
    optimizer = fastclip.AdamW(params, state_bits=8)
    give_grads(params[:1])
    optimizer.step()
    optimizer.param_groups[0]["state_bits"] = 32
    give_grads(params)
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[params[0]] and "exp_avg" in optimizer.state[params[1]]


# ---- refusals ----


@pytest.mark.parametrize("bits", [4, 16, 8.0, True, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"state_bits in param_groups\[0\] must be 32 or 8, got"):
        fastclip.AdamW([torch.zeros(3)], state_bits=bits)


@pytest.mark.parametrize(
    "cls", [fastclip.RMSprop, fastclip.NAdam, fastclip.LAMB, fastclip.NovoGrad, fastclip.ScaledAdam]
)
def test_other_rules_refuse_8_bits(cls):
    with pytest.raises(ValueError, match=r"state_bits in param_groups\[0\] must be 32: SGD, Adam, AdamW and Lion"):
        cls([torch.zeros(3)], state_bits=8)


def test_a_dtype_of_the_momentum_excludes_8_bits():
    with pytest.raises(ValueError, match="state_bits and momentum_dtype .* can't both be set"):
        fastclip.SGD([torch.zeros(3)], momentum=0.9, momentum_dtype=torch.bfloat16, state_bits=8)


def changed(state, name, value):
    state[name] = value


@pytest.mark.parametrize("by_reference", [False, True], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    "change, error, told",
    [
        (lambda s: s.pop("exp_avg_scales"), KeyError, "has no exp_avg_scales, but has exp_avg_codes"),
        (lambda s: s.pop("exp_avg_codes"), KeyError, "has no exp_avg_codes, but has exp_avg_scales"),
        (lambda s: changed(s, "exp_avg_codes", s["exp_avg_codes"].int()), TypeError, "must be uint8"),
        (lambda s: changed(s, "exp_avg_scales", s["exp_avg_scales"].double()), TypeError, "must be float32"),
        (lambda s: changed(s, "exp_avg_scales", s["exp_avg_scales"][1:]), ValueError, "must have 16 numbers"),
        (lambda s: changed(s, "exp_avg_codes", s["exp_avg_codes"][1:]), ValueError, "has another shape"),
        (lambda s: changed(s, "exp_avg_codes", 1), TypeError, "must be a tensor"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(change, error, told, by_reference):
    (p,) = make_params([(4096,)])
    optimizer = fastclip.AdamW([p], state_bits=8)
    give_grads([p])
    optimizer.step()
    change(optimizer.state[p])
    before = p.detach().clone()
    with pytest.raises(error, match=told):
        reference_step(optimizer) if by_reference else optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


def test_codes_beside_numbers_take_a_step_in_plain_torch():
    (p,) = make_params([(4096,)])
    optimizer = fastclip.AdamW([p], state_bits=8)
    give_grads([p])
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg"] = quantized.stored(optimizer._rule, state, "exp_avg").values()
    del state["exp_avg_codes"], state["exp_avg_scales"]
    with pytest.warns(UserWarning, match="the kernels take a parameter's states all in 8 bits, or none"):
        optimizer.step()
    assert state["step"] == 2 and "exp_avg_sq_codes" in state
