"""The table of cases, and the plain-torch loop that every one of them is compared with."""

import io
import itertools
import math
import threading
from contextlib import contextmanager

import numpy as np
import torch

import fastclip
from fastclip.plain import step as reference

CHUNK = 4096  # kChunk in csrc/step.h

# The adversaries: nothing, one, around a SIMD width, around a chunk, unaligned, many dimensions.
SHAPES = [
    (),
    (0, 3),
    (1,),
    (7,),
    (15,),
    (16,),
    (17,),
    (33,),
    (3, 5, 2),
    (CHUNK - 1,),
    (CHUNK,),
    (CHUNK + 1,),
    (3, CHUNK + 7),
]
TINY = [(5,)] * 600
LARGE = [(257, 1031), (64,), (300, 300)]  # enough for several threads

CLIPS = {
    "none": {},
    "value": {"clip_value": 0.5},
    "pair": {"clip_value": (-0.1, 0.7)},
    "norm": {"max_norm": 1.0},
    "inf norm": {"max_norm": 0.3, "norm_type": math.inf},
    "loose norm": {"max_norm": 1e6},
    "value and norm": {"clip_value": 0.5, "max_norm": 1.0},
}

# Every combination that torch.optim.SGD takes.
RULES = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for (momentum, dampening, nesterov), decay, maximize in itertools.product(
        [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)], [0, 0.01], [False, True]
    )
]


def make_params(shapes, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in shapes]


def param(size=4, value=0.0):
    """One with a gradient of ones."""
    p = torch.full((size,), value, requires_grad=True)
    p.grad = torch.ones(size)
    return p


def copy_params(params):
    return [p.detach().clone().requires_grad_() for p in params]


def through_a_file(saved):
    """What `torch.load` makes of something that was saved."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_steps(ours, expected, our_state, expected_state):
    """The bits of parameters, and the states with their dtypes and layouts."""
    for index, (p, e) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(p, e), f"parameter {index} {tuple(p.shape)}"
        assert set(our_state[p]) == set(expected_state[e])
        for name, value in expected_state[e].items():
            found = our_state[p][name]
            what = f"{name} of parameter {index} {tuple(p.shape)}"
            assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride()), what
            assert torch.equal(found, value), what


def give_grads(*param_lists, scale=1.0):
    """The same new random gradients for each list of parameters."""
    for params in zip(*param_lists, strict=True):
        grad = scale * torch.randn(params[0].shape, dtype=torch.float64)
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


# What torch takes square roots by: methods, and for lists of tensors.
OWN_SQRT, OWN_SQRT_IN_PLACE = torch.Tensor.sqrt, torch.Tensor.sqrt_
OWN_ROOTS = {
    (torch.Tensor, "sqrt"): OWN_SQRT,
    (torch.Tensor, "sqrt_"): OWN_SQRT_IN_PLACE,
    (torch, "_foreach_sqrt"): torch._foreach_sqrt,
    (torch, "_foreach_sqrt_"): torch._foreach_sqrt_,
}
_exact = threading.Lock()
_users = [0]  # of exact_square_roots: in several threads, the last one out restores torch's


def _exact_sqrt(tensor):
    # 16 bits are computed in float32, and rounded once; subclasses and meta tensors have no array.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.dtype.itemsize < 4:
        return OWN_SQRT(tensor)
    if not tensor.dtype.is_floating_point:
        return OWN_SQRT(tensor)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(tensor.detach().cpu().numpy()))).to(tensor.device)


def _exact_sqrt_in_place(tensor):
    return OWN_SQRT_IN_PLACE(tensor) if tensor.requires_grad else tensor.copy_(_exact_sqrt(tensor))


EXACT_ROOTS = {
    (torch.Tensor, "sqrt"): _exact_sqrt,
    (torch.Tensor, "sqrt_"): _exact_sqrt_in_place,
    (torch, "_foreach_sqrt"): lambda tensors: [_exact_sqrt(t) for t in tensors],
    (torch, "_foreach_sqrt_"): lambda tensors: [_exact_sqrt_in_place(t) for t in tensors],
}


def _set_roots(functions):
    for (owner, name), function in functions.items():
        setattr(owner, name, function)


@contextmanager
def exact_square_roots():
    """In torch's optimizers: its own come from MKL, which may be off by a bit in the last place; IEEE's, and numpy's,
    are not."""
    with _exact:
        _users[0] += 1
        _set_roots(EXACT_ROOTS)
    try:
        yield
    finally:
        with _exact:
            _users[0] -= 1
            if _users[0] == 0:
                _set_roots(OWN_ROOTS)


def reference_step(optimizer):
    """One in plain torch."""
    with exact_square_roots():
        reference.step(optimizer._rule, optimizer.param_groups, optimizer.state)


@contextmanager
def flush_denormal(flush=True):
    """What the calling thread does with subnormal numbers: with True they are 0."""
    assert torch.set_flush_denormal(flush), "this CPU can't"
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def clip_in_place(params, clip_value=None, max_norm=None, norm_type=2.0):
    """The clipping that goes before `optimizer.step()` in plain code. Returns the norm."""
    grads = [p.grad for p in params if p.grad is not None and p.grad.numel()]
    if clip_value is not None:
        low, high = clip_value if isinstance(clip_value, tuple) else (-clip_value, clip_value)
        for g in grads:
            g.clamp_(low, high)
    if max_norm is None:
        return None
    # clip_grad_norm_ as it is meant: its own float32 sum is off by 1e-4 at a few million elements.
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g.double(), norm_type) for g in grads]), norm_type
    )
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for g in grads:
        g.mul_(coefficient.to(g.dtype))
    return norm


class Loop:
    """The Python loop that fastclip replaces: clip each gradient in place, then an optimizer: torch's by name, or a
    class."""

    def __init__(self, params, clip=None, optimizer="SGD", **settings):
        self.params = list(params)
        self.clip = clip or {}
        cls = getattr(torch.optim, optimizer) if isinstance(optimizer, str) else optimizer
        self.optimizer = cls(self.params, foreach=False, **settings)

    def step(self):
        norm = clip_in_place(self.params, **self.clip)
        with exact_square_roots():
            self.optimizer.step()
        return norm


def pair(shapes, clip=None, dtype=torch.float32, device="cpu", optimizer="SGD", **settings):
    """A Loop and a fastclip.SGD, or another, over equal parameters: (loop, its parameters, optimizer, its)."""
    settings.setdefault("lr", 0.1 if optimizer == "SGD" else 0.01)
    ours = make_params(shapes, dtype, device)
    theirs = copy_params(ours)
    loop = Loop(theirs, clip, optimizer, **settings)
    return loop, theirs, getattr(fastclip, optimizer)(ours, **(clip or {}), **settings), ours


def step_both(loop, theirs, optimizer, ours):
    """A step of each of what `pair` has made."""
    loop.step()
    optimizer.step()


def equal(a, b):
    """As torch.equal, but that a NaN equals a NaN."""
    return torch.equal(a, b) or (
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )


def assert_same_bits(theirs, ours, their_optimizer=None, our_optimizer=None):
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert equal(a, b), f"parameter {index} {tuple(a.shape)} differs by up to {(a - b).abs().max()}"
        if our_optimizer is None:
            continue
        state_a, state_b = their_optimizer.state.get(a, {}), our_optimizer.state.get(b, {})
        assert state_a.keys() == state_b.keys(), f"parameter {index} {tuple(a.shape)}"
        for name in state_a:
            assert equal(state_a[name], state_b[name]), f"{name} of parameter {index} {tuple(a.shape)}"


def assert_close(theirs, ours, rtol):
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol, msg=lambda m, i=index: f"parameter {i}: {m}")


def assert_equal_trees(a, b):
    """Equal dicts and lists, in the same order, of equal values; tensors to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b
