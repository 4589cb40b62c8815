"""What torch's optimizer tests are fed with, of SGD, Adam and AdamW: their entries in torch's private `optim_db`."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch

import fastclip
from fastclip.optimizer import OWN_SETTINGS

from .cases import assert_same_bits, copy_params, exact_square_roots, give_grads, make_params

try:
    from torch.testing._internal import common_optimizers
except ModuleNotFoundError as error:
    pytest.skip(f"torch's optimizer tests need the module {error.name}, which is missing", allow_module_level=True)
# torch.testing._internal freezes torch.backends' flags for the whole process, where other tests' libraries set them.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
assert not torch.backends.flags_frozen()


@dataclasses.dataclass(frozen=True)
class Optim:
    """An optimizer of torch's, and fastclip's of the same name."""

    name: str
    stateful: dict  # settings with which it keeps all the state it can
    info: Any = dataclasses.field(init=False)

    def __post_init__(self):
        info = next(info for info in common_optimizers.optim_db if info.optim_cls is self.torch)
        object.__setattr__(self, "info", info)

    @property
    def torch(self):
        return getattr(torch.optim, self.name)

    @property
    def fastclip(self):
        return getattr(fastclip, self.name)

    @property
    def classes(self):
        return self.torch, self.fastclip

    def keeps_state(self, kwargs):
        return self.name != "SGD" or "momentum" in kwargs

    def __repr__(self):
        return self.name


SGD = Optim("SGD", {"lr": 0.1, "momentum": 0.9})
ADAM = Optim("Adam", {"lr": 0.1, "amsgrad": True})
ADAMW = Optim("AdamW", {"lr": 0.1, "amsgrad": True})
OPTIMIZERS = [SGD, ADAM, ADAMW]

# Hyperparameters, without params: pytest shows torch's own descriptions.
INPUTS = [
    pytest.param(optim, given.kwargs, id=f"{optim} {given.desc}")
    for optim in OPTIMIZERS
    for given in optim.info.optim_inputs_func("cpu")
]

# What selects one of torch's implementations. torch calls these "global cliquey": one at a time.
IMPLS = [{}, *({impl: True} for impl in SGD.info.supported_impls)]

# Clips that bind at no gradient here.
LOOSE = {"no clip": {}, "value 1e30": {"clip_value": 1e30}, "norm 1e30": {"max_norm": 1e30}}
LOOSE["both 1e30"] = {**LOOSE["value 1e30"], **LOOSE["norm 1e30"]}

SHAPES = [(10, 5), (10,), (), (0, 3), (3, 4099)]


falls_back = pytest.mark.falls_back
every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS, ids=repr)
every_input = pytest.mark.parametrize(("optim", "kwargs"), INPUTS)
every_impl = pytest.mark.parametrize("impl", IMPLS, ids=lambda impl: next(iter(impl), "default"))
# differentiable=True takes no leaves as parameters: see test_differentiable_steps
every_impl_for_leaves = pytest.mark.parametrize(
    "impl", [i for i in IMPLS if "differentiable" not in i], ids=lambda impl: next(iter(impl), "default")
)
every_clip = pytest.mark.parametrize("clip", LOOSE.values(), ids=LOOSE)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_classes = pytest.mark.parametrize(
    "cls",
    [cls for optim in (SGD, ADAM) for cls in optim.classes],
    ids=lambda cls: f"{cls.__module__.split('.')[0]} {cls.__name__}",
)


def as_torch_tests(name):
    """Applies the skips and decorators that torch's OptimizerInfos have for torch's own test of this name."""

    def apply(test):
        for optim in OPTIMIZERS:
            for decorator in optim.info.get_decorators("TestOptimRenewed", name, "cpu", torch.float32, {}):
                test = decorator(test)
        return test

    return apply


class Twins:
    """An optimizer of torch's and fastclip's over equal parameters, that are given the same gradients."""

    def __init__(self, optim, kwargs, clip=None, dtype=torch.float32, shapes=SHAPES, params=None, impl=None):
        self.ours = make_params(shapes, dtype) if params is None else params
        self.theirs = copy_params(self.ours)
        # torch's loop is what the bits are compared with, whichever implementation fastclip is asked for
        self.torch = optim.torch(self.theirs, **{**copy.deepcopy(kwargs), "foreach": False})
        self.fastclip = optim.fastclip(self.ours, **copy.deepcopy(kwargs), **(impl or {}), **(clip or {}))

    @property
    def optimizers(self):
        return self.torch, self.fastclip

    def step(self, times=1):
        for _ in range(times):
            give_grads(self.theirs, self.ours)
            self.step_as_given()

    def step_as_given(self):
        """Without new gradients."""
        with exact_square_roots():
            for optimizer in self.optimizers:
                optimizer.step()

    def check(self):
        """Same bits of parameters and state."""
        assert_same_bits(self.theirs, self.ours, *self.optimizers)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_clips(state_dict):
    groups = [{k: v for k, v in g.items() if k not in OWN_SETTINGS} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


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
