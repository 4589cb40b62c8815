"""Plans in C take the steps of fastclip in Python, to the bit, and refuse what is wrong."""

import ctypes
import math

import pytest
import torch

import fastclip
from tests.support.digest import CLIPS, DTYPES, RULES

from .library import Plan, Refused, library, settings_of

SIZES = (1, 17, 0, 100, 5003)
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0}


def drawn(numel, dtype, seed):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(name, dtype=torch.float32, grad_dtype=None, sizes=SIZES, **settings):
    """The same parameters twice: of an optimizer in Python, and of a plan."""
    params = [drawn(numel, dtype, i).requires_grad_() for i, numel in enumerate(sizes)]
    twins = [param.detach().clone().requires_grad_() for param in params]
    for param in (*params, *twins):
        if grad_dtype:
            param.grad_dtype = grad_dtype
            param.grad = torch.zeros(param.shape, dtype=grad_dtype)
    optimizer = getattr(fastclip, name)(params, **settings)
    return optimizer, params, Plan(*settings_of(optimizer), twins), twins


def give_gradients(params, twins, step, without=()):
    for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
        dtype = param.dtype if param.grad is None else param.grad.dtype
        param.grad = None if i in without else drawn(param.numel(), dtype, 100 * step + i)
        twin.grad = None if i in without else param.grad.clone()


def assert_same(optimizer, params, plan, twins, result):
    for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
        assert torch.equal(bits(param), bits(twin))
        for name, value in optimizer.state.get(param, {}).items():
            if value.numel() == 0:
                continue
            found = plan.state(i, name)
            assert found is not None and found.dtype == value.dtype, name
            assert torch.equal(bits(found), bits(value.flatten())), name
    if optimizer.total_norm is not None and not math.isnan(result.total_norm):
        assert result.total_norm == optimizer.total_norm.item()


def bits(tensor):
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_steps_have_the_bits_of_python(rule, dtype, clip):
    if getattr(fastclip, rule)._rule.needs_norm and "norm_type" in clip:
        pytest.skip("this optimizer takes the 2-norm")
    optimizer, params, plan, twins = both(rule, dtype, **RULES[rule], **clip)
    for step in range(3):
        give_gradients(params, twins, step, without=(1,) if step == 1 else ())
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum_dtype": torch.bfloat16},
        {"momentum_dtype": torch.float16, "max_norm": 0.1},
        {"dtype": torch.bfloat16, "stochastic_rounding": True},
        {"dtype": torch.float16, "stochastic_rounding": True, "clip_value": (-0.1, 0.3)},
        {"dtype": torch.bfloat16, "grad_dtype": torch.float32, "clip_value": 0.1},
        {"grad_dtype": torch.float16, "clip_value": 0.1, "max_norm": 1.0},
        {"maximize": True, "weight_decay": 0.1, "max_norm": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Lion"])
def test_mixtures_have_the_bits_of_python(rule, settings):
    optimizer, params, plan, twins = both(rule, **{**RULES[rule], **settings})
    for step in range(3):
        give_gradients(params, twins, step)
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["Adam", "LAMB"])
def test_what_a_step_adds_is_limited_to_the_bits_of_python(rule, dtype):
    for settings in ({"max_update_rms": 0.3}, {"max_update_rms": 0.3, "max_norm": 0.5, "skip_nonfinite": True}):
        optimizer, params, plan, twins = both(rule, dtype, **{**RULES[rule], **settings})
        for step in range(3):
            give_gradients(params, twins, step)
            optimizer.step()
            assert_same(optimizer, params, plan, twins, plan.step())


def test_what_a_step_did_is_told():
    optimizer, params, plan, twins = both("SGD", lr=0.1, clip_value=0.5, max_norm=1.0)
    give_gradients(params, twins, 0)
    optimizer.step()
    result = plan.step()
    stats = optimizer.clip_stats()
    assert result.total_norm == stats.total_norm.item() and result.coefficient == stats.clip_coefficient.item() < 1
    assert result.clamped == round(stats.clamped_fraction.item() * sum(SIZES)) > 0 and not result.skipped
    plain = both("SGD", lr=0.1)[2].step()
    assert math.isnan(plain.total_norm) and plain.coefficient == 1 and plain.clamped == 0


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_step_with_an_inf_is_skipped(rule, settings):
    optimizer, params, plan, twins = both(rule, **RULES[rule], skip_nonfinite=True, **settings)
    for step in range(3):
        give_gradients(params, twins, step)
        if step == 0:
            params[3].grad[5] = twins[3].grad[5] = math.inf
        optimizer.step()
        result = plan.step()
        assert result.skipped == (step == 0) and math.isnan(result.total_norm) == ("max_norm" not in settings)
        assert_same(optimizer, params, plan, twins, result)


def test_settings_change_from_the_next_step_on():
    optimizer, params, plan, twins = both("SGD", lr=0.1, momentum=0.9, max_norm=1.0)
    for step, (name, value) in enumerate([("lr", 0.01), ("max_norm", 0.1), ("momentum", 0.5), ("weight_decay", 0.1)]):
        optimizer.param_groups[0][name] = value
        plan.set(name, value)
        give_gradients(params, twins, step)
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())


@pytest.mark.parametrize("rule", RULES)
def test_a_training_goes_on_in_c(rule):
    """With the states of Python, written into those of a plan. A tensor without a gradient is new, and stays so."""
    optimizer, params, other, twins = both(rule, **RULES[rule])
    give_gradients(params, twins, 0, without=(1,))
    optimizer.step()
    other.step()
    with torch.no_grad():
        for param, twin in zip(params, twins, strict=True):
            twin.copy_(param)
    plan = Plan(*settings_of(optimizer), twins)
    for i, param in enumerate(params):
        assert plan.is_new(i) == 1 and other.is_new(i) == (i == 1)
        if other.is_new(i):
            continue
        for name, value in optimizer.state.get(param, {}).items():
            if value.numel() > 0:
                plan.state(i, name).copy_(value.flatten())
        plan.resume(i)
    for step in (1, 2):
        give_gradients(params, twins, step)
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())


@pytest.mark.parametrize("decays", [(0.1, 0.1, 0.1), (0.0, 0.1, 0.1), (0.1, 0.0, 0.0), (0.0, 0.0, 0.1)], ids=str)
@pytest.mark.parametrize("late", [(), (0, 3)], ids=str)
def test_a_momentum_has_the_dtype_that_its_first_step_gives(decays, late):
    """A weight decay promotes it, in the step that fills it."""
    optimizer, params, plan, twins = both("SGD", grad_dtype=torch.bfloat16, lr=0.1, momentum=0.9, weight_decay=0.05)
    for step, decay in enumerate(decays):
        optimizer.param_groups[0]["weight_decay"] = decay
        plan.set("weight_decay", decay)
        for param in (*params, *twins):
            param.grad = torch.zeros(param.shape, dtype=torch.bfloat16)
        give_gradients(params, twins, step, without=late if step == 0 else ())
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())


def test_threads_change_no_bits():
    optimizer, params, plan, twins = both("AdamW", lr=0.1, max_norm=1.0, sizes=(100_003, 70_000))
    calls = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p)
    def run(count, work, context):
        calls.append(count)
        for _ in range(count):
            work(context)

    library.fastclip_set_threads(plan.plan, 3, run)
    for step in range(2):
        give_gradients(params, twins, step)
        optimizer.step()
        assert_same(optimizer, params, plan, twins, plan.step())
    assert calls
    calls.clear()
    library.fastclip_set_threads(plan.plan, 1, None)
    plan.step()
    assert not calls


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "changed", "said"),
    [
        ("sdg", {}, "there is no optimizer sdg"),
        ("clip_grad", {}, "there is no optimizer clip_grad"),
        ("sgd", {"lr": None}, "lr is missing"),
        ("sgd", {"dampening": None}, "dampening is missing"),
        ("adam", {"momentum": None, "dampening": None}, "beta1 is missing"),
        ("sgd", {"beta1": 0.9}, "beta1 is no setting of sgd"),
        ("sgd", {"max_nrom": 1}, "max_nrom is no setting of sgd"),
        ("sgd", {"lr": -1}, "lr is negative"),
        ("sgd", {"lr": math.nan}, "lr is NaN"),
        ("sgd", {"max_norm": -1}, "max_norm is negative"),
        ("sgd", {"norm_type": 3}, "norm_type must be 2 or infinite"),
        ("sgd", {"clip_low": 1, "clip_high": 0}, "clip_low is above clip_high"),
        ("sgd", {"nesterov": 2}, "nesterov is a switch: 0 or 1"),
        ("sgd", {"nesterov": 1, "dampening": 0.5}, "nesterov needs a momentum, and no dampening"),
        ("sgd", {"momentum": -1}, "momentum is negative"),
        ("sgd", {"rho": 0.5}, "rho is no setting of sgd"),
        ("sgd", {"clip_value": 1, "clip_low": -1}, "clip_value is given together with clip_low or clip_high"),
        ("adadelta", {"momentum": None, "dampening": None, "rho": 1.5, "eps": 0}, "rho is above 1"),
        ("adadelta", {"momentum": None, "dampening": None, "rho": 0.5, "eps": -1}, "eps is negative"),
        ("sgd", {"rounding_seed": 0.5}, "rounding_seed must be a whole number"),
        ("sgd", {"momentum_dtype": 7}, "there is no such dtype"),
        ("sgd", {"momentum_dtype": 1}, "momentum_dtype must be float32, bfloat16 or float16"),
        ("adagrad", {"momentum": None, "dampening": None, "lr_decay": 0, "eps": 0, "initial_accumulator_value": 0,
                     "momentum_dtype": 2}, "adagrad keeps no momentum"),
        ("lion", {"momentum": None, "dampening": None, "beta1": 1, "beta2": 0}, "beta1 must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(optimizer, changed, said):
    settings = {name: value for name, value in {**SGD, **changed}.items() if value is not None}
    with pytest.raises(Refused, match=said):
        Plan(optimizer, settings, [torch.ones(3)])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"numel": -1}, "tensor 0 has a negative number of elements"),
        ({"numel": 2**61}, "tensor 0 has more elements than there is memory"),
        ({"numel": 2**63 - 1}, "tensor 0 has more elements than there is memory"),
        ({"numel": 2**55}, "out of memory|_M_default_append"),
        ({"param": None}, "tensor 0 has no memory for its parameter"),
        ({"dtype": 4}, "there is no such dtype"),
        ({"grad_dtype": 1}, "tensor 0 mixes float64 with another dtype"),
    ],
)
def test_bad_tensors_are_named(changed, said):
    with pytest.raises(Refused, match=said):
        Plan("sgd", SGD, [torch.ones(3)], **changed)


def test_a_setting_that_is_refused_changes_nothing():
    _, params, plan, twins = both("SGD", lr=0.1)
    other = both("SGD", lr=0.1)
    for name, value in (("lr", math.nan), ("lr", -1), ("momentum", 0.9), ("foo", 1), ("momentum_dtype", 2)):
        with pytest.raises(Refused):
            plan.set(name, value)
    for taken, steps in ((params, plan), (other[1], other[2])):
        give_gradients(taken, steps.params, 0)
        steps.step()
    assert all(map(torch.equal, twins, other[3]))
    with pytest.raises(Refused, match="there is no tensor 9"):
        plan.check(library.fastclip_set_grad(plan.plan, 9, None))
    assert plan.state(9, "step") is None and plan.state(0, "foo") is None
    for refused in (lambda: plan.resume(9), lambda: plan.check(library.fastclip_step(None, None))):
        with pytest.raises(Refused, match="there is no"):
            refused()


def test_a_setting_is_not_given_twice():
    from .library import Setting, Tensor

    settings = (Setting * 2)(Setting(b"lr", 0.1), Setting(b"lr", 0.2))
    assert not library.fastclip_plan_new(b"sgd", settings, 2, (Tensor * 0)(), 0)
    assert library.fastclip_error() == b"lr is given twice"
