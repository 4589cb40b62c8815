"""A step that raises names what is wrong and has changed nothing, also where it goes through plain torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastclip

NAMES = ["first", "a", "b", "last"]
B = r"parameter 1 of group 1 \('b'\)"
falls_back = pytest.mark.falls_back


def make(cls=fastclip.SGD, **settings):
    """Two groups, a step taken; in each the parameter that gets broken stands between sound ones."""
    params = [torch.randn(4, 3, requires_grad=True) for _ in NAMES]
    named = list(zip(NAMES, params, strict=True))
    rule = {"momentum": 0.9} if cls is fastclip.SGD else {"amsgrad": True}
    settings = {"lr": 0.1, "max_norm": 1.0, **rule, **settings}
    optimizer = cls([{"params": named[:1]}, {"params": named[1:]}], **settings)
    for p in params:
        p.grad = torch.randn(4, 3)
    optimizer.step()
    for p in params:
        p.grad = torch.randn(4, 3)
    return optimizer, params


def content(tensor):
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().indices().tolist(), tensor.coalesce().values().tolist()
    return tensor.shape if tensor.is_meta else (tensor.dtype, tensor.shape, tensor.stride(), tensor.tolist())


def tensor_state(tensor):
    """Which object it is, its version, and what it holds; of no tensor, itself."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return id(tensor), tensor._version, content(tensor)


def everything(optimizer):
    """All that a failed step must leave alone. `total_norm` has a test of its own."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: repr(v) for k, v in group.items() if k != "params"}
        groups.append((settings, [(tensor_state(p), tensor_state(getattr(p, "grad", None))) for p in group["params"]]))
    state = [
        (id(p), {k: tensor_state(v) for k, v in entry.items()} if isinstance(entry, dict) else entry)
        for p, entry in optimizer.state.items()
    ]
    return groups, state, optimizer.skipped_steps.item()


# ---- what is wrong -----------------------------------------------------------------------------


def gradient_of_another_shape(optimizer, p):
    p.grad.data = torch.ones(3, 4)


def gradient_that_would_broadcast(optimizer, p):
    p.grad.data = torch.ones(4, 1)


def gradient_of_another_dtype(optimizer, p):
    p.grad.data = torch.ones(4, 3, dtype=torch.float64)


def sparse_gradient(optimizer, p):
    p.grad = torch.ones(4, 3).to_sparse(1)


def resized_parameter(optimizer, p):
    p.data = torch.ones(2, 2)


def resized_parameter_and_gradient(optimizer, p):
    p.data, p.grad = torch.ones(2, 2), None
    p.grad = torch.ones(2, 2)


def parameter_of_another_dtype(optimizer, p):
    p.data = p.data.double()


def no_tensor(optimizer, p):
    optimizer.param_groups[1]["params"][1] = "b"


def buffer(value, name="momentum_buffer"):
    def replaced(optimizer, p):
        optimizer.state[p][name] = value()

    return replaced


def dropped(name):
    def drop(optimizer, p):
        del optimizer.state[p][name]

    return drop


def setting(index, name, value):
    def set_in_group(optimizer, p):
        optimizer.param_groups[index][name] = value

    return set_in_group


def state_that_is_no_dict(optimizer, p):
    optimizer.state[p] = "momentum"


def tensors_of(dtype):
    def replaced(optimizer, p):
        p.requires_grad_(False)
        p.data, p.grad = torch.ones(4, 3).to(dtype), None
        p.grad = torch.ones(4, 3).to(dtype)
        optimizer.state.pop(p, None)

    return replaced


CASES = {
    "float8": (tensors_of(torch.float8_e4m3fn), TypeError, f"{B} is torch.float8_e4m3fn"),
    "integers": (tensors_of(torch.int64), TypeError, f"{B} is torch.int64"),
    "booleans": (tensors_of(torch.bool), TypeError, f"{B} is torch.bool"),
    "gradient's shape": (gradient_of_another_shape, ValueError, f"gradient of {B} has another shape"),
    "gradient broadcasts": (gradient_that_would_broadcast, ValueError, f"gradient of {B} has another shape"),
    "gradient's dtype": (gradient_of_another_dtype, ValueError, f"gradient of {B} has another dtype"),
    "sparse gradient": (sparse_gradient, TypeError, f"max_norm can't be applied to the sparse gradient of {B}"),
    "resized": (resized_parameter, ValueError, f"gradient of {B} has another shape"),
    "resized with gradient": (resized_parameter_and_gradient, ValueError, f"momentum_buffer of {B} has another shape"),
    "parameter's dtype": (parameter_of_another_dtype, ValueError, f"gradient of {B} has another dtype"),
    "no tensor": (no_tensor, TypeError, f"{B} must be a tensor, got str"),
    "buffer's shape": (buffer(lambda: torch.ones(5)), ValueError, f"momentum_buffer of {B} has another shape"),
    "buffer broadcasts": (buffer(lambda: torch.ones(4, 1)), ValueError, f"momentum_buffer of {B} has another shape"),
    "integer buffer": (
        buffer(lambda: torch.ones(4, 3, dtype=torch.int64)),
        ValueError,
        f"momentum_buffer of {B} has another dtype",
    ),
    "complex buffer": (
        buffer(lambda: torch.ones(4, 3, dtype=torch.complex64)),
        ValueError,
        f"momentum_buffer of {B} has another dtype",
    ),
    "buffer's device": (
        buffer(lambda: torch.ones(4, 3, device="meta")),
        ValueError,
        f"momentum_buffer of {B} is on another device",
    ),
    "sparse buffer": (
        buffer(lambda: torch.ones(4, 3).to_sparse()),
        TypeError,
        f"momentum_buffer of {B} is sparse",
    ),
    "overlapping buffer": (
        buffer(lambda: torch.ones(4, 1).expand(4, 3)),
        ValueError,
        f"momentum_buffer of {B} is an expanded view",
    ),
    "no buffer": (buffer(lambda: "x"), TypeError, "momentum_buffer.* must be a tensor, got str"),
    "state": (state_that_is_no_dict, TypeError, "state of .*parameter.* must be a dict"),
    "NaN clip_value": (setting(1, "clip_value", math.nan), ValueError, r"clip_value in param_groups\[1\].* nan"),
    "negative clip_value": (setting(1, "clip_value", -0.5), ValueError, r"clip_value in param_groups\[1\].*-0.5"),
    "crossed clip_value": (setting(1, "clip_value", (1, 0)), ValueError, r"clip_value in param_groups\[1\].*\(1, 0\)"),
    "NaN max_norm": (setting(0, "max_norm", math.nan), ValueError, r"max_norm in param_groups\[0\].* nan"),
    "negative max_norm": (setting(1, "max_norm", -1.0), ValueError, r"max_norm in param_groups\[1\].*-1"),
    "other max_norm": (setting(1, "max_norm", 2.0), ValueError, r"max_norm must be the same in all groups"),
    "NaN lr": (setting(1, "lr", math.nan), ValueError, r"lr in param_groups\[1\] is NaN"),
    "NaN lr in a tensor": (setting(1, "lr", torch.tensor(math.nan)), ValueError, r"lr in param_groups\[1\] is NaN"),
    "NaN momentum": (setting(1, "momentum", math.nan), ValueError, r"momentum in param_groups\[1\] is NaN"),
    "lr of two": (setting(1, "lr", torch.ones(2)), (ValueError, TypeError), r"lr in param_groups\[1\]"),
}


@falls_back
@pytest.mark.parametrize("way", ["kernels", "plain torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_raises_names_the_cause_and_changes_nothing(case, way):
    broken, error, words = CASES[case]
    optimizer, params = make()
    if way == "plain torch":  # another parameter's gradient has gaps: all go there
        params[0].grad = torch.randn(4, 6)[:, ::2]
    broken(optimizer, params[2])
    before = everything(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert everything(optimizer) == before


def of_groups(name, value, error, words):
    return setting(1, name, value), error, rf"{words} in param_groups\[1\]"


# More for Adam: what can be wrong with its states and settings.
CASES_OF_ADAM = {
    "sparse gradient": (sparse_gradient, RuntimeError, f"does not support sparse gradients, as that of {B}"),
    "resized with gradient": (resized_parameter_and_gradient, ValueError, f"exp_avg of {B} has another shape"),
    "state": CASES["state"],
    "shape": (buffer(lambda: torch.ones(5), "exp_avg_sq"), ValueError, f"exp_avg_sq of {B} has another shape"),
    "device": (
        buffer(lambda: torch.ones(4, 3, device="meta"), "max_exp_avg_sq"),
        ValueError,
        f"max_exp_avg_sq of {B} is on another device",
    ),
    "dtype": (
        buffer(lambda: torch.ones(4, 3, dtype=torch.int64), "exp_avg"),
        ValueError,
        f"exp_avg of {B} has another dtype",
    ),
    "overlapping": (
        buffer(lambda: torch.ones(4, 1).expand(4, 3), "exp_avg_sq"),
        ValueError,
        f"exp_avg_sq of {B} is an expanded view",
    ),
    "no tensor": (buffer(lambda: "x", "exp_avg"), TypeError, f"exp_avg of {B} must be a tensor, got str"),
    "number of steps": (buffer(lambda: 3, "step"), TypeError, f"step of {B} must be a tensor, got int"),
    "steps of two": (buffer(lambda: torch.ones(2), "step"), ValueError, f"step of {B}"),
    "no steps": (dropped("step"), KeyError, f"{B} has no step"),
    "no exp_avg": (dropped("exp_avg"), KeyError, f"{B} has no exp_avg"),
    "no max_exp_avg_sq": (dropped("max_exp_avg_sq"), KeyError, f"{B} has no max_exp_avg_sq"),
    "one beta": of_groups("betas", (0.9,), ValueError, "betas"),
    "NaN beta": of_groups("betas", (0.9, math.nan), ValueError, r"betas\[1\]"),
    "beta in words": of_groups("betas", ("0.9", 0.9), TypeError, r"betas\[0\]"),
    "beta of 1": of_groups("betas", (1.0, 0.999), ValueError, r"betas\[0\]"),
    "second beta of 1": of_groups("betas", (0.9, 1), ValueError, r"betas\[1\]"),
    "negative beta": of_groups("betas", (-0.1, 0.999), ValueError, r"betas\[0\]"),
    "negative count": (buffer(lambda: torch.tensor(-1.0), "step"), ValueError, f"step of {B} must be a count"),
    "negative count, float64": (
        buffer(lambda: torch.tensor(-1.0, dtype=torch.float64), "step"),
        ValueError,
        f"step of {B} must be a count",
    ),
    "count of -inf": (buffer(lambda: torch.tensor(-math.inf), "step"), ValueError, f"step of {B} must be a count"),
    "infinite count": (buffer(lambda: torch.tensor(math.inf), "step"), ValueError, f"step of {B} must be a count"),
    "float8": CASES["float8"],
    "integers": CASES["integers"],
    "NaN eps": of_groups("eps", math.nan, ValueError, "eps"),
    "beta of two": of_groups("betas", (torch.ones(2), 0.9), (ValueError, TypeError), r"betas\[0\]"),
}


@falls_back
@pytest.mark.parametrize("way", ["kernels", "plain torch", "the parameter itself"])
@pytest.mark.parametrize("case", CASES_OF_ADAM)
def test_also_in_adam(case, way):
    broken, error, words = CASES_OF_ADAM[case]
    optimizer, params = make(fastclip.AdamW)
    broken(optimizer, params[2])
    if way == "plain torch":
        params[0].grad = torch.randn(4, 6)[:, ::2]
    elif way == "the parameter itself" and case not in ("sparse gradient", "float8", "integers"):
        shape = params[2].shape
        params[2].grad = torch.randn(shape[0], 2 * shape[1])[:, ::2]
    before = everything(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
@pytest.mark.parametrize("case", ["buffer's shape", "buffer's device", "overlapping buffer", "resized with gradient"])
def test_also_where_the_parameter_itself_goes_to_plain_torch(case):
    """The kernels' walk looks no further once it has seen the gradient's layout."""
    broken, error, words = CASES[case]
    optimizer, params = make()
    broken(optimizer, params[2])
    shape = params[2].shape
    params[2].grad = torch.randn(shape[0], 2 * shape[1])[:, ::2]
    before = everything(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
def test_a_parameter_with_several_elements_at_one_address():
    optimizer, params = make()
    params[2].data = torch.ones(1).expand(4, 3)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=f"{B} is an expanded view"):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
def test_sparse_gradients_with_a_dense_buffer_and_nesterov():
    """torch subtracts from the first parameters before it finds out."""
    optimizer, params = make(max_norm=None, nesterov=True)
    params[2].grad = torch.ones(4, 3).to_sparse(1)
    before = everything(optimizer)
    with pytest.raises(TypeError, match=f"nesterov.* sparse gradient of {B}"):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
@pytest.mark.parametrize(
    "weight_decay", [torch.tensor(0.1), np.float32(0.1), Fraction(1, 10)], ids=lambda n: type(n).__name__
)
def test_sparse_gradients_with_a_weight_decay_of_any_kind(weight_decay):
    optimizer, params = make(max_norm=None)
    optimizer.param_groups[1]["weight_decay"] = weight_decay
    params[2].grad = torch.ones(4, 3).to_sparse(1)
    before = everything(optimizer)
    with pytest.raises(TypeError, match=f"weight_decay .* sparse gradient of {B}"):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
@pytest.mark.parametrize("cls", [fastclip.SGD, fastclip.AdamW])
def test_a_momentum_dtype_would_drop_the_imaginary_part_of_complex_parameters(cls):
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.complex64, requires_grad=True)
    momentum = {"momentum": 0.9} if cls is fastclip.SGD else {}
    optimizer = cls([p, q], lr=0.1, momentum_dtype=torch.bfloat16, **momentum)
    p.grad, q.grad = torch.ones(3), torch.full((3,), 1 + 2j)
    before = everything(optimizer)
    with pytest.raises(TypeError, match="momentum_dtype can't be applied to parameter 1 of group 0, which is complex"):
        optimizer.step()
    assert everything(optimizer) == before


@falls_back
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_momentum_buffer_of_another_floating_dtype_is_torchs_business(dtype):
    """A wider one keeps its precision, as in torch; a narrower one is rounded once per step."""
    optimizer, params = make(max_norm=None)
    theirs = [p.detach().clone().requires_grad_() for p in params]
    loop = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for p, q in zip(params, theirs, strict=True):
        optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].to(dtype)
        loop.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
        q.grad = p.grad.clone()
    for o in (optimizer, loop):
        o.step()
        o.step()
    for p, q in zip(params, theirs, strict=True):
        a, b = optimizer.state[p]["momentum_buffer"], loop.state[q]["momentum_buffer"]
        assert a.dtype == dtype
        if dtype == torch.float64:
            assert torch.equal(p, q) and torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)


def test_an_optimizer_steps_on_after_an_error():
    optimizer, params = make()
    sound = params[2].grad
    params[2].grad = None
    params[2].grad = torch.ones(4, 3)
    params[2].grad.data = torch.ones(7)
    twin, others = make()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
        twin.state[q]["momentum_buffer"].copy_(optimizer.state[p]["momentum_buffer"])
        q.grad = sound.clone() if p is params[2] else p.grad.clone()
    with pytest.raises(ValueError):
        optimizer.step()
    params[2].grad = sound
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# ---- what is left to do in csrc ----------------------------------------------------------------


@pytest.mark.parametrize("case", ["no buffer", "state"])
def test_a_state_of_the_wrong_type_names_the_parameter(case):
    broken, error, _ = CASES[case]
    optimizer, params = make()
    broken(optimizer, params[2])
    with pytest.raises(error, match=B):
        optimizer.step()


@pytest.mark.parametrize("case", ["gradient's shape", "NaN lr"])
def test_the_last_steps_norm_stays(case):
    broken, error, _ = CASES[case]
    optimizer, params = make()
    norm = optimizer.total_norm
    broken(optimizer, params[2])
    with pytest.raises(error):
        optimizer.step()
    assert optimizer.total_norm is not None and torch.equal(optimizer.total_norm, norm)
