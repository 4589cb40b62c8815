"""What torch's optimizer tests are fed with: the entries of fastclip's optimizers in torch's private `optim_db`."""

import copy
import dataclasses

import pytest
import torch

from fastclip.settings import OWN_SETTINGS

from . import optimizers
from .cases import assert_same_bits, copy_params, exact_square_roots, give_grads, make_params

try:
    from torch.testing._internal import common_optimizers
except ModuleNotFoundError as error:
    pytest.skip(f"torch's optimizer tests need the module {error.name}, which is missing", allow_module_level=True)
# torch.testing._internal freezes torch.backends' flags for the whole process, where other tests' libraries set them.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
assert not torch.backends.flags_frozen()


@dataclasses.dataclass(frozen=True, repr=False)
class Optim(optimizers.Case):
    """A row of the table, with torch's description of the optimizer."""

    @property
    def info(self):
        return next(info for info in common_optimizers.optim_db if info.optim_cls is self.torch)

    def takes(self, impl):
        return set(impl) <= set(self.info.supported_impls)


OPTIMIZERS = [Optim(**vars(case)) for case in optimizers.CASES if case.is_torchs]
SGD, ADAM, ADAMW = OPTIMIZERS[:3]

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


def every_input_and(impls):
    """With each implementation that torch has of the optimizer."""
    pairs = [
        pytest.param(*given.values, impl, id=f"{given.id} {next(iter(impl), 'default')}")
        for given in INPUTS
        for impl in impls
        if given.values[0].takes(impl)
    ]
    return pytest.mark.parametrize(("optim", "kwargs", "impl"), pairs)


every_input_and_impl = every_input_and(IMPLS)
# differentiable=True takes no leaves as parameters: see test_differentiable_steps
every_input_and_impl_for_leaves = every_input_and([impl for impl in IMPLS if "differentiable" not in impl])
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


def without_clips(state_dict):
    groups = [{k: v for k, v in g.items() if k not in OWN_SETTINGS} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}
