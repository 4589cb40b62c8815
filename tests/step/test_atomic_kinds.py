"""Every kind of parameter with every kind of gradient: a step is taken, or names the parameter and changes nothing."""

import warnings

import pytest
import torch

import fastclip

pytestmark = pytest.mark.falls_back

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.bool,
]
PARAMETERS = {
    "dense": lambda ones: ones(4, 4),
    "with gaps": lambda ones: ones(4, 8)[:, ::2],
    "sparse": lambda ones: ones(4, 4).to_sparse(),
    "expanded": lambda ones: ones(1, 4).expand(4, 4),
}
GRADIENTS = {
    "dense": lambda ones: ones(4, 4),
    "transposed": lambda ones: ones(4, 4).t(),
    "with gaps": lambda ones: ones(4, 8)[:, ::2],
    "expanded": lambda ones: ones(1, 4).expand(4, 4),
    "sparse": lambda ones: ones(4, 4).to_sparse(),
    "compressed rows": lambda ones: ones(4, 4).to_sparse_csr(),
    "compressed blocks": lambda ones: ones(4, 4).to_sparse_bsr((2, 2)),
    "negated": lambda ones: torch._neg_view(ones(4, 4)),
    "conjugated": lambda ones: ones(4, 4).conj(),
    "float32": lambda _: torch.ones(4, 4),
    "float64": lambda _: torch.ones(4, 4, dtype=torch.float64),
    "complex": lambda _: torch.ones(4, 4, dtype=torch.complex64),
}
SHARED = [
    {},
    {"clip_value": 0.1},
    {"max_norm": 1.0},
    {"clip_value": 0.1, "max_norm": 1.0, "skip_nonfinite": True},
    {"master_weights": True},
]
SETTINGS = {
    "SGD": [
        *SHARED,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "stochastic_rounding": True},
        {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    ],
    "AdamW": [
        *SHARED,
        {"amsgrad": True, "weight_decay": 0},
        {"stochastic_rounding": True},
        {"momentum_dtype": torch.bfloat16},
    ],
}


def made(make, dtype):
    """None where torch has no such tensor."""
    try:
        return make(lambda *shape: torch.ones(shape).to(dtype))
    except (RuntimeError, NotImplementedError):
        return None


def with_gradient(kind, grad_kind, dtype):
    p, grad = made(PARAMETERS[kind], dtype), made(GRADIENTS[grad_kind], dtype)
    if p is None or grad is None:
        return None
    if dtype.is_floating_point or dtype.is_complex:
        p.requires_grad_()
    try:
        p.grad_dtype = None  # any
        p.grad = grad
    except (RuntimeError, AttributeError):
        return None
    return p


def content(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach()
    try:
        return tensor._version, tensor.to_dense().resolve_neg().resolve_conj().to(torch.complex128).tolist()
    except (RuntimeError, NotImplementedError):  # of float8, say
        return tensor._version


def everything(optimizer, params):
    states = [{name: content(value) for name, value in optimizer.state.get(p, {}).items()} for p in params]
    return [(content(p), content(p.grad)) for p in params], states


def check_step(optimizer, params):
    """Whether the step was taken."""
    before = everything(optimizer, params)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        assert "parameter 1 of group 0" in str(error), error
        assert everything(optimizer, params) == before, error
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", SETTINGS)
def test_a_step_is_taken_or_changes_nothing(rule, dtype):
    taken = raised = 0
    for kind in PARAMETERS:
        for grad_kind in GRADIENTS:
            for settings in SETTINGS[rule]:
                for warm in (False, True):
                    p = with_gradient(kind, grad_kind, dtype)
                    if p is None:
                        continue
                    params = [torch.ones(3, requires_grad=True), p, torch.ones(3, requires_grad=True)]
                    params[0].grad = params[2].grad = torch.ones(3)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        optimizer = getattr(fastclip, rule)(params, lr=0.1, **settings)
                        if warm:  # states are there already, of the others
                            grad, p.grad = p.grad, None
                            optimizer.step()
                            p.grad = grad
                        is_taken = check_step(optimizer, params)
                    taken += is_taken
                    raised += not is_taken
    known = (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize >= 2 and dtype != torch.complex32
    assert raised > 0 and (taken > 0) == known


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [None, 2.0, float("inf"), 1.0, 3.0, 0.0])
def test_gradients_are_clipped_or_left_alone(norm_type, dtype):
    for grad_kind in GRADIENTS:
        p = with_gradient("dense", grad_kind, dtype)
        if p is None:
            continue
        others = [torch.ones(3, requires_grad=True) for _ in range(2)]
        for other in others:
            other.grad = torch.full((3,), 5.0)
        params = [others[0], p, others[1]]
        before = [content(q.grad) for q in params]
        try:
            if norm_type is None:
                fastclip.clip_grad_value_(params, 0.1)
            else:
                fastclip.clip_grad_norm_(params, 0.1, norm_type)
        except (TypeError, ValueError, RuntimeError) as error:
            assert "parameter 1" in str(error), error
            assert [content(q.grad) for q in params] == before, error
        else:
            assert all((other.grad < 5).all() for other in others)
