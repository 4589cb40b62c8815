"""fastclip.SGD under the inputs of torch's own optimizer tests, step by step against torch.optim.SGD."""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer

import fastclip

from .cases import SHAPES as ADVERSARIES
from .cases import assert_close, assert_same_bits, copy_params, give_grads, make_params
from .torch_optim_db import IMPLS, INFO, INPUTS, LOOSE, Twins, as_torch_tests, common_optimizers

falls_back = pytest.mark.falls_back
every_input = pytest.mark.parametrize("kwargs", INPUTS)
every_impl = pytest.mark.parametrize("impl", IMPLS, ids=lambda impl: next(iter(impl), "default"))
# differentiable=True takes no leaves as parameters: see test_differentiable_steps
every_impl_for_leaves = pytest.mark.parametrize(
    "impl", [i for i in IMPLS if "differentiable" not in i], ids=lambda impl: next(iter(impl), "default")
)
every_clip = pytest.mark.parametrize("clip", LOOSE.values(), ids=LOOSE)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_classes = pytest.mark.parametrize("cls", [torch.optim.SGD, fastclip.SGD], ids=["torch", "fastclip"])
CLIP_SETTINGS = {"clip_value", "max_norm", "norm_type", "skip_nonfinite"}


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_clips(state_dict):
    groups = [{k: v for k, v in g.items() if k not in CLIP_SETTINGS} for g in state_dict["param_groups"]]
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


# ---- errors ------------------------------------------------------------------------------------


def error_inputs(dtype=torch.float32):
    return INFO.optim_error_inputs_func("cpu", dtype)


def construct(cls, error_input, **clip):
    """Makes the optimizer; where the error is one of the step, takes a step, too."""
    given = error_input.optimizer_error_input
    params = [torch.zeros(1, 1, requires_grad=True)] if given.params is None else copy.deepcopy(given.params)
    optimizer = cls(params, **given.kwargs, **clip)
    if error_input.error_on == common_optimizers.OptimizerErrorEnum.STEP_ERROR:
        optimizer.step()


@every_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "index", range(len(error_inputs())), ids=[e.optimizer_error_input.desc for e in error_inputs()]
)
def test_error_inputs(index, dtype, clip):
    """The same error with the same words, and the same warnings; duplicates are an error where torch warns."""
    error_input = error_inputs(dtype)[index]
    expects = pytest.warns if issubclass(error_input.error_type, Warning) else pytest.raises
    with expects(error_input.error_type, match=error_input.error_regex):
        construct(torch.optim.SGD, error_input)
    if "duplicate parameters" in error_input.error_regex:
        with pytest.raises(ValueError, match="same parameter twice"):
            construct(fastclip.SGD, error_input, **clip)
    else:
        with expects(error_input.error_type, match=error_input.error_regex):
            construct(fastclip.SGD, error_input, **clip)


@pytest.mark.parametrize(
    ("params", "kwargs"),
    [
        ([], {}),
        ([3], {}),
        (3, {}),
        ([{"lr": 0.1}], {}),
        ([{"params": 3}], {}),
        ([{"params": {torch.zeros(1)}}], {}),
        ([torch.zeros(1, requires_grad=True) * 2], {}),
        ([torch.zeros(1)], {"foreach": True, "fused": True}),
        ([torch.zeros(1)], {"differentiable": True, "fused": True}),
        ([torch.zeros(1)], {"nesterov": True}),
        ([torch.zeros(1)], {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ([torch.zeros(1)], {"weight_decay": -1.0}),
        ([torch.zeros(1)], {"lr": -1.0}),
        ([torch.zeros(1)], {"unknown": 1}),
        ([torch.zeros(1), ("name", torch.zeros(1))], {}),
    ],
    ids=repr,
)
def test_other_errors_are_of_the_same_type_with_the_same_words(params, kwargs):
    raised = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        given = [dict(p) if isinstance(p, dict) else p for p in params] if isinstance(params, list) else params
        with pytest.raises(Exception) as error:  # noqa: B017, PT011  torch says which
            cls(given, **kwargs)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("sizes", [[2], [1, 1, 1], [1, 2]], ids=str)
def test_a_state_dict_of_other_groups_is_refused_and_changes_nothing(sizes):
    twins = Twins({"momentum": 0.9, "lr": 0.1}, shapes=[(2,), (3,)])
    twins.step()
    other = fastclip.SGD([{"params": make_params([(2,)] * size)} for size in sizes], lr=7.0)
    words = []
    if sizes == [2]:  # as many groups as there are, and as many parameters: taken
        for optimizer in twins.optimizers:
            optimizer.load_state_dict(other.state_dict())
            assert optimizer.param_groups[0]["lr"] == 7.0 and not optimizer.state
        return
    before = copy.deepcopy(twins.fastclip.state_dict())
    for optimizer in twins.optimizers:
        with pytest.raises(ValueError, match="loaded state dict") as error:
            optimizer.load_state_dict(other.state_dict())
        words.append(str(error.value))
    assert words[0] == words[1]
    assert_equal_trees(before, twins.fastclip.state_dict())
    twins.step(2)
    twins.check()


# ---- every input -------------------------------------------------------------------------------


@as_torch_tests("test_foreach_matches_forloop")
@every_clip
@every_impl_for_leaves
@both_precisions
@every_input
def test_every_input_steps_with_torchs_bits(kwargs, dtype, impl, clip):
    twins = Twins(kwargs, clip, dtype, ADVERSARIES, impl=impl)
    for _ in range(4):
        twins.step()
        twins.check()
    if "max_norm" in clip:
        grads = torch.cat([p.grad.double().flatten() for p in twins.theirs])
        torch.testing.assert_close(twins.fastclip.total_norm, grads.norm(), rtol=1e-12, atol=0)


@as_torch_tests("test_fused_matches_forloop")
@every_impl_for_leaves
@both_precisions
@every_input
def test_every_implementation_of_torch_agrees(kwargs, dtype, impl):
    """torch's default and foreach to the bit; its fused one rounds differently in the last elements of a tensor."""
    torch.set_num_threads(1)  # torch's threads wait for each other, for long on a busy machine
    twins = Twins(kwargs, dtype=dtype, shapes=ADVERSARIES, impl=impl)
    twins.torch = torch.optim.SGD(twins.theirs, **copy.deepcopy(kwargs), **impl)
    twins.step(4)
    if "fused" in impl:
        assert_close(twins.theirs, twins.ours, 8 * torch.finfo(dtype).eps)
    else:
        twins.check()


@every_clip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_input
def test_16_bit_parameters_agree_and_are_closer_to_the_truth(kwargs, dtype, clip):
    """Computed in float32 and rounded once, where torch's loop rounds after every operation."""
    twins = Twins({"lr": 0.1, **kwargs}, clip, dtype, ADVERSARIES)
    exact = [p.detach().double().requires_grad_() for p in twins.ours]
    oracle = torch.optim.SGD(exact, **{"lr": 0.1, **copy.deepcopy(kwargs)})
    give_grads(twins.theirs, twins.ours, exact)
    for p, e in zip(twins.ours, exact, strict=True):
        e.grad = p.grad.double()
    for optimizer in (*twins.optimizers, oracle):
        optimizer.step()
    distances = [
        sum((p.double() - e).abs().sum().item() for p, e in zip(params, exact, strict=True))
        for params in (twins.theirs, twins.ours)
    ]
    assert distances[1] <= distances[0]
    twins.step(3)
    assert_close(twins.theirs, twins.ours, 8 * torch.finfo(dtype).eps)
    buffers = [[state["momentum_buffer"] for state in o.state_dict()["state"].values()] for o in twins.optimizers]
    assert len(buffers[1]) == (len(twins.ours) if "momentum" in kwargs else 0)
    assert_close(*buffers, 16 * torch.finfo(dtype).eps)


@as_torch_tests("test_mixed_device_dtype")
@every_clip
@every_input
def test_dtypes_mixed_in_one_optimizer(kwargs, clip):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16] * 2
    params = [make_params([(7, 33)], dtype)[0] for dtype in dtypes]
    twins = Twins(kwargs, clip, params=params)
    twins.step(4)
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        assert a.dtype == b.dtype
        if a.dtype in (torch.float32, torch.float64):
            assert_same_bits([a], [b], *twins.optimizers)
        else:
            assert_close([a], [b], 8 * torch.finfo(a.dtype).eps)


@as_torch_tests("test_set_default_dtype_works_with_foreach")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@every_clip
@every_input
def test_another_default_dtype(kwargs, clip, default):
    torch.set_default_dtype(default)
    try:
        twins = Twins(kwargs, clip)
        twins.step(3)
        twins.check()
        if "max_norm" in clip:
            assert twins.fastclip.total_norm.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@falls_back
@as_torch_tests("test_complex")
@pytest.mark.parametrize("impl", [{}, {"foreach": True}], ids=["default", "foreach"])
@pytest.mark.parametrize("clip", ["no clip", "norm 1e30"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@every_input
def test_complex_parameters_step_as_in_torch(kwargs, dtype, clip, impl):
    params = [torch.randn(5, 5, dtype=dtype).requires_grad_(), torch.randn(9).requires_grad_()]
    twins = Twins(kwargs, LOOSE[clip], params=params, impl=impl)
    for _ in range(4):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.check()


@falls_back
@as_torch_tests("test_complex_2d")
@every_input
def test_a_complex_parameter_is_two_real_ones(kwargs):
    complex_param = torch.randn(5, 4, dtype=torch.complex64).requires_grad_()
    real_params = [part.detach().clone().requires_grad_() for part in (complex_param.real, complex_param.imag)]
    optimizers = [fastclip.SGD(p, **copy.deepcopy(kwargs), max_norm=0.5) for p in ([complex_param], real_params)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for z in (complex_param, torch.complex(*real_params)):
            ((z - (1 - 2j)) * (z + 3j)).abs().square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].total_norm, optimizers[1].total_norm, rtol=1e-6, atol=0)
        assert_close([complex_param.real, complex_param.imag], real_params, 1e-5)


@falls_back
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")], ids=str)
@every_input
def test_gradients_of_another_dtype(kwargs, dtypes):
    """`p.grad_dtype` allows them; the momentum buffer has the dtype that it has in torch."""
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes)
    twins = Twins(kwargs, dtype=dtype, shapes=[(10, 5), (7,)])
    for p in twins.theirs + twins.ours:
        p.grad_dtype = grad_dtype
    for _ in range(3):
        for a, b in zip(twins.theirs, twins.ours, strict=True):
            a.grad = torch.randn(a.shape).to(grad_dtype)
            b.grad = a.grad.clone()
        for optimizer in twins.optimizers:
            optimizer.step()
    tolerance = 8 * max(torch.finfo(d).eps for d in (dtype, grad_dtype))
    assert_close(twins.theirs, twins.ours, tolerance)
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        states = twins.torch.state.get(a, {}), twins.fastclip.state.get(b, {})
        assert {k: v.dtype for k, v in states[0].items()} == {k: v.dtype for k, v in states[1].items()}


# ---- training ----------------------------------------------------------------------------------


class Regression:
    """Least squares by one optimizer, in two groups: what a training loop does, with a closure."""

    def __init__(self, cls, kwargs, **clip):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(16, 5, generator=generator), torch.randn(16, 10, generator=generator)
        self.params = [torch.randn(s, generator=generator).requires_grad_() for s in ((10, 5), (10,))]
        impl = {"foreach": False} if cls is torch.optim.SGD else {}
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 3e-3, "weight_decay": 0.01}]
        self.optimizer = cls(groups, **copy.deepcopy(kwargs), **impl, **clip)

    def loss(self):
        self.optimizer.zero_grad()
        loss = (self.x @ self.params[0].t() + self.params[1] - self.y).square().mean()
        loss.backward()
        return loss

    def settings(self):
        """What schedulers change."""
        return [(float(g["lr"]), g["momentum"]) for g in self.optimizer.param_groups]

    def train(self, schedulers, steps):
        """Trains; the trajectory of losses, of what the schedulers set and of what they say of themselves."""
        trajectory = []
        for _ in range(steps):
            loss = self.optimizer.step(self.loss)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss.item())
                else:
                    scheduler.step()
            trajectory.append((loss.item(), self.settings(), [s.get_last_lr() for s in schedulers]))
        return trajectory


@as_torch_tests("test_param_group_with_lrscheduler_goes_right_direction")
@every_clip
@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs], ids=range(len(INFO.scheduler_inputs) + 1))
@every_input
def test_trains_like_torch_with_torchs_schedulers(kwargs, schedulers, clip):
    runs = [Regression(torch.optim.SGD, kwargs), Regression(fastclip.SGD, kwargs, **clip)]
    trajectories = [run.train([make(run.optimizer) for make in schedulers], 12) for run in runs]
    assert trajectories[0] == trajectories[1]
    assert_same_bits(runs[0].params, runs[1].params, runs[0].optimizer, runs[1].optimizer)
    first, last = trajectories[1][0][0], runs[1].loss().item()
    assert last > first if kwargs.get("maximize") else last < first


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9], 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.05, 0.1], total_steps=30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 5),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@every_clip
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_same_and_resume(name, clip, tensor_lr):
    """OneCycleLR and CyclicLR also set the momentum. In the middle, everything is saved and made anew."""
    kwargs = {"lr": torch.tensor(0.01) if tensor_lr else 0.01, "momentum": 0.9}
    trajectories, runs = [], []
    for cls, clips in ((torch.optim.SGD, {}), (fastclip.SGD, clip)):
        run = Regression(cls, kwargs, **clips)
        scheduler = SCHEDULERS[name](run.optimizer)
        trajectory = run.train([scheduler], 10)
        resumed = Regression(cls, {"lr": 5.0}, **clips)
        resumed.params[0].data.copy_(run.params[0])
        resumed.params[1].data.copy_(run.params[1])
        resumed_scheduler = SCHEDULERS[name](resumed.optimizer) if "Cycl" not in name else None
        resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        if resumed_scheduler is None:  # these ask for a momentum when they are made
            resumed_scheduler = SCHEDULERS[name](resumed.optimizer)
            resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        resumed_scheduler.load_state_dict(scheduler.state_dict())
        again = resumed.train([resumed_scheduler], 10)
        trajectory += run.train([scheduler], 10)
        assert again == trajectory[10:]
        trajectories.append(trajectory)
        runs.append(resumed)
    assert trajectories[0] == trajectories[1]
    assert len({str(settings) for _, settings, _ in trajectories[1]}) > 1, "the scheduler did nothing"
    assert_same_bits(runs[0].params, runs[1].params, runs[0].optimizer, runs[1].optimizer)


def test_a_scheduler_does_not_say_that_the_step_was_not_called():
    run = Regression(fastclip.SGD, {})
    scheduler = lr_scheduler.StepLR(run.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train([scheduler], 2)
    late = Regression(fastclip.SGD, {})
    scheduler = lr_scheduler.StepLR(late.optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@falls_back
@as_torch_tests("test_rosenbrock_sparse")
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients_by_torchs_sparse_settings(maximize):
    """Coordinate descent on (1 - x)² + 100 (y - x²)²: one coordinate per sparse gradient, which is not coalesced."""
    torch.set_num_threads(1)  # torch's threads wait for each other, for long on a busy machine
    kwargs, schedulers = INFO.metadata_for_sparse
    kwargs = {**kwargs, "maximize": maximize, "lr": kwargs["lr"] * (1e-4 if maximize else 1)}
    runs = []
    for cls, sparse in ((torch.optim.SGD, True), (fastclip.SGD, True), (fastclip.SGD, False)):
        p = torch.tensor([1.5, 1.5], requires_grad=True)
        optimizer = cls([p], **kwargs)
        stepped = [make(optimizer) for make in schedulers]
        losses = []
        for step in range(100):
            p.grad = None
            loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
            loss.backward()
            losses.append(loss.item())
            index = step % 2
            value = p.grad[index]
            parts = torch.stack([value / 4, value - value / 4])
            grad = torch.sparse_coo_tensor([[index, index]], parts, (2,), check_invariants=True)
            p.grad = grad if sparse else grad.to_dense()
            optimizer.step()
            for scheduler in stepped:
                scheduler.step()
        runs.append((p.detach(), losses))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[1][0], runs[2][0])
    assert (runs[1][1][-1] > runs[1][1][0]) == maximize


# ---- what does not step ------------------------------------------------------------------------


@as_torch_tests("test_step_is_noop_when_params_have_no_grad")
@every_clip
@every_input
def test_without_gradients_a_step_does_nothing(kwargs, clip):
    twins = Twins(kwargs, clip)
    before = copy_params(twins.ours)
    for optimizer in twins.optimizers:
        optimizer.step()
    assert_same_bits(before, twins.ours)
    assert not twins.fastclip.state and not twins.torch.state
    give_grads(twins.theirs[:2], twins.ours[:2])
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.check()
    assert_same_bits(before[2:], twins.ours[2:])


@as_torch_tests("test_step_is_noop_for_zero_grads")
@every_clip
@every_input
def test_zero_gradients(kwargs, clip):
    twins = Twins(kwargs, clip)
    before = copy_params(twins.ours)
    for _ in range(3):
        give_grads(twins.theirs, twins.ours, scale=0.0)
        for optimizer in twins.optimizers:
            optimizer.step()
    twins.check()
    if not kwargs.get("weight_decay"):
        assert_same_bits(before, twins.ours)


@every_impl
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(impl, set_to_none):
    p, q = make_params([(3,), (4,)])
    optimizer = fastclip.SGD([p, q], **impl)
    p.grad = grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert q.grad is None
    assert p.grad is None if set_to_none else (p.grad is grad and not grad.any())


@as_torch_tests("test_non_empty_state")
@every_input
def test_state_is_what_torchs_is_and_belongs_to_no_graph(kwargs):
    """Also after backward(create_graph=True), whose gradients have a history."""
    twins = Twins(kwargs)
    for optimizer, params in zip(twins.optimizers, (twins.theirs, twins.ours), strict=True):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sum((p**3).sum() for p in params).backward(create_graph=True)
        assert params[0].grad.requires_grad
        optimizer.step()
    twins.check()
    assert bool(twins.fastclip.state) == ("momentum" in kwargs)
    for p in twins.ours:
        assert p.is_leaf and all(not s.requires_grad for s in twins.fastclip.state.get(p, {}).values())


# ---- state dicts -------------------------------------------------------------------------------


@as_torch_tests("test_state_dict_deterministic")
@every_clip
@every_input
def test_the_state_dict_is_torchs_and_four_settings(kwargs, clip):
    twins = Twins(kwargs, clip, impl={"foreach": False})
    for steps in range(3):
        theirs, ours = (copy.deepcopy(optimizer.state_dict()) for optimizer in twins.optimizers)
        added = {k: v for k, v in ours["param_groups"][0].items() if k not in theirs["param_groups"][0]}
        assert added == {"clip_value": None, "max_norm": None, "norm_type": 2.0, "skip_nonfinite": False, **clip}
        assert_equal_trees(theirs, without_clips(ours))
        assert len(ours["state"]) == (len(twins.ours) if "momentum" in kwargs and steps else 0)
        twins.step()


ROUTES = {
    "state_dict": lambda optimizer: copy.deepcopy(optimizer.state_dict()),
    "file": lambda optimizer: through_a_file(optimizer.state_dict()),
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict(),
}


@as_torch_tests("test_save_load_equality_with_weights_only")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(("torch", "fastclip"), repeat=2))[1:])
@every_clip
@every_input
def test_training_goes_on_from_a_state_dict(kwargs, clip, source, target, route):
    """Into another optimizer, of other settings; compared with torch, which was never interrupted."""
    twins = Twins(kwargs, clip)
    twins.step(3)
    saved = ROUTES[route](getattr(twins, source))
    kept = copy.deepcopy(saved)
    params = copy_params(twins.ours)
    fresh = (fastclip.SGD if target == "fastclip" else torch.optim.SGD)(params, lr=5.0, momentum=0.1, maximize=True)
    fresh.load_state_dict(saved)
    if source == "fastclip":
        assert {k: fresh.param_groups[0][k] for k in clip} == clip
    twins.fastclip, twins.ours = fresh, params
    assert_equal_trees(without_clips(kept)["param_groups"], without_clips(fresh.state_dict())["param_groups"])
    twins.step(3)
    twins.check()
    assert_equal_trees(kept["param_groups"], saved["param_groups"])


@as_torch_tests("test_can_load_older_state_dict")
@every_clip
@every_input
def test_state_dicts_of_older_torch(kwargs, clip):
    """They lack what came later, and hold a momentum_buffer of None where there was no momentum."""
    twins = Twins(kwargs, clip)
    twins.step(2)
    for optimizer in twins.optimizers:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in {*INFO.not_og_supported_flags, *CLIP_SETTINGS} & group.keys():
                if flag != "maximize" or not kwargs.get("maximize"):
                    del group[flag]
        if "momentum" not in kwargs:
            saved["state"] = {i: {"momentum_buffer": None} for i in range(len(twins.ours))}
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert (group["foreach"], group["differentiable"], group["fused"]) == (None, False, False)
    group = twins.fastclip.param_groups[0]
    assert {k: group[k] for k in clip} == clip, "the clip is this optimizer's own where the state dict has none"
    twins.step(2)
    if "momentum" in kwargs:
        twins.check()
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["momentum"] = 0.5
    twins.step(2)
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["torch", "fastclip"])
def test_a_state_dict_is_cast_to_the_parameters(target, dtype):
    twins = Twins({"lr": 0.1, "momentum": 0.9})
    twins.step(2)
    params = [p.detach().to(dtype).requires_grad_() for p in twins.ours]
    fresh = (fastclip.SGD if target == "fastclip" else torch.optim.SGD)(params, lr=5.0)
    fresh.load_state_dict(copy.deepcopy(twins.fastclip.state_dict()))
    for p, q in zip(params, twins.ours, strict=True):
        expected = twins.fastclip.state[q]["momentum_buffer"].to(dtype)
        assert fresh.state[p]["momentum_buffer"].dtype == dtype
        assert torch.equal(fresh.state[p]["momentum_buffer"], expected)
    give_grads(params)
    fresh.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.cuda
@as_torch_tests("test_state_dict_with_cuda_params")
def test_a_state_dict_goes_to_another_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that this torch can use")
    twins = Twins({"lr": 0.1, "momentum": 0.9})
    twins.step(2)
    params = [p.detach().cuda().requires_grad_() for p in twins.ours]
    fresh = fastclip.SGD(params, lr=5.0)
    fresh.load_state_dict(copy.deepcopy(twins.torch.state_dict()))
    give_grads(twins.theirs, params)
    for optimizer in (twins.torch, fresh):
        optimizer.step()
    assert all(fresh.state[p]["momentum_buffer"].is_cuda for p in params)
    assert_close(twins.theirs, [p.cpu() for p in params], 2e-6)


# ---- names -------------------------------------------------------------------------------------


def named(model):
    return {"names": model.named_parameters(), "no names": model.parameters()}


@pytest.mark.parametrize("target", ["names", "no names"])
@pytest.mark.parametrize("source", ["names", "no names"])
def test_names_travel_as_in_torch(source, target):
    """Names of the state dict replace those there are; without any, those there are stay."""
    results = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        torch.manual_seed(0)
        model, other = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2))
        optimizer, loading = cls(named(model)[source], momentum=0.9), cls(named(other)[target])
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        state_dict = through_a_file(optimizer.state_dict())
        loading.load_state_dict(state_dict)
        results.append((without_clips(state_dict), without_clips(loading.state_dict())))
    for theirs, ours in zip(*results, strict=True):
        assert_equal_trees(theirs, ours)
    expected = {"names": ["weight", "bias"], "no names": None}[source]
    if source == "no names" and target == "names":
        expected = ["0.weight", "0.bias"]
    assert results[1][1]["param_groups"][0].get("param_names") == expected


def test_a_hook_that_maps_names_loads_into_another_order():
    """torch's documentation tells to do so where the loaded parameters are ordered otherwise."""
    model = torch.nn.Linear(3, 2)
    optimizer = fastclip.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    other = fastclip.SGD(reversed(list(model.named_parameters())), lr=0.1)

    def by_name(loading, state_dict):
        (saved,), (own,) = state_dict["param_groups"], loading.param_groups
        places = {name: place for name, place in zip(saved["param_names"], saved["params"], strict=True)}
        group = {**saved, "params": [places[name] for name in own["param_names"]], "param_names": own["param_names"]}
        return {**state_dict, "param_groups": [group]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


@pytest.mark.parametrize("first", ["names", "no names"])
def test_groups_with_and_without_names_do_not_mix(first):
    second = "no names" if first == "names" else "names"
    words = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        optimizer = cls(named(torch.nn.Linear(3, 2))[first])
        with pytest.raises(ValueError, match="with/without names") as error:
            optimizer.add_param_group({"params": named(torch.nn.Linear(3, 2))[second]})
        words.append(str(error.value))
        assert len(optimizer.param_groups) == 1
    assert words[0] == words[1]


# ---- hooks -------------------------------------------------------------------------------------


@as_torch_tests("test_step_all_hooks")
@pytest.mark.parametrize("call", ["plain", "none", "positional", "named"])
def test_step_hooks_see_what_torchs_see(call):
    """Order, arguments and the parameter at that time, for global hooks and the optimizer's own."""
    traces = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        p = torch.ones(2, requires_grad=True)
        p.grad = torch.ones(2)
        optimizer, trace = cls([p], lr=0.5), []

        def closure():
            return 7.0

        def watch(name, optimizer=optimizer, closure=closure, trace=trace, p=p):
            def hook(seen, args, kwargs):
                assert seen is optimizer and args[0] is optimizer
                given = [a is closure for a in args[1:]], {k: v is closure for k, v in kwargs.items()}
                trace.append((name, given, p.tolist()))

            return hook

        handles = [
            torch_optimizer.register_optimizer_step_post_hook(watch("global post")),
            optimizer.register_step_post_hook(watch("post")),
            optimizer.register_step_pre_hook(watch("pre 1")),
            optimizer.register_step_pre_hook(watch("pre 2")),
            torch_optimizer.register_optimizer_step_pre_hook(watch("global pre")),
        ]
        steps = {
            "plain": optimizer.step,
            "none": lambda step=optimizer.step: step(None),
            "positional": lambda step=optimizer.step, closure=closure: step(closure),
            "named": lambda step=optimizer.step, closure=closure: step(closure=closure),
        }
        trace.append(steps[call]())
        for handle in handles:
            handle.remove()
            trace.append(steps[call]())
        assert p.tolist() == [-2.0, -2.0]
        traces.append(trace)
    assert traces[0] == traces[1]
    assert [entry[0] for entry in traces[1] if isinstance(entry, tuple)][:5] == [
        "global pre",
        "pre 1",
        "pre 2",
        "post",
        "global post",
    ]


@both_classes
@pytest.mark.parametrize("name", [False, True], ids=["positional", "named"])
def test_a_pre_hook_may_replace_the_closure(cls, name):
    """In the place where it was given."""
    p = torch.ones(2, requires_grad=True)
    optimizer = cls([p], lr=0.5)
    if name:
        optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 2}))
    else:
        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 2), kwargs))
    assert (optimizer.step(closure=lambda: 1) if name else optimizer.step(lambda: 1)) == 2
    assert optimizer.step() == 2


@both_classes
def test_bad_calls_and_bad_hooks(cls):
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = cls([p], lr=0.5)
    with pytest.raises(TypeError):
        optimizer.step(None, None)
    with pytest.raises(TypeError, match="multiple values"):
        optimizer.step(lambda: 1, closure=lambda: 2)
    with pytest.raises(TypeError, match="unexpected"):
        optimizer.step(other=1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple.* but got 3"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]


@both_classes
def test_a_closure_that_raises_leaves_everything(cls):
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = cls([p], lr=0.5, momentum=0.9)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert p.tolist() == [1.0, 1.0] and not optimizer.state and torch.is_grad_enabled()


@as_torch_tests("test_load_state_dict_pre_hook_and_prepend")
def test_state_dict_and_load_hooks_run_as_in_torch():
    traces = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        p = torch.ones(2, requires_grad=True)
        p.grad = torch.ones(2)
        optimizer, trace = cls([p], lr=0.5, momentum=0.9), []
        optimizer.step()

        def with_lr(lr, trace=trace):
            def hook(optimizer, state_dict):
                trace.append((lr, state_dict["param_groups"][0]["lr"]))
                (group,) = state_dict["param_groups"]
                return {**state_dict, "param_groups": [{**group, "lr": lr}]}

            return hook

        handles = [
            optimizer.register_state_dict_pre_hook(lambda o, trace=trace: trace.append("before saving")),
            optimizer.register_state_dict_post_hook(with_lr(2.0)),
            optimizer.register_state_dict_post_hook(with_lr(3.0), prepend=True),
            optimizer.register_load_state_dict_pre_hook(with_lr(4.0)),
            optimizer.register_load_state_dict_pre_hook(with_lr(5.0), prepend=True),
            optimizer.register_load_state_dict_post_hook(
                lambda o, trace=trace: trace.append(("loaded", o.param_groups[0]["lr"]))
            ),
        ]
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        traces.append((trace, p.tolist()))
    assert traces[0] == traces[1]
    assert traces[1][0] == ["before saving", (3.0, 0.5), (2.0, 3.0), (5.0, 2.0), (4.0, 5.0), ("loaded", 4.0)]


# ---- groups, copies, arguments -----------------------------------------------------------------


@every_clip
@every_input
def test_add_param_group_in_all_its_forms(kwargs, clip):
    twins = Twins(kwargs, clip)
    twins.step(2)
    forms = [
        lambda params: {"params": params[0]},
        lambda params: {"params": params, "lr": 0.3},
        lambda params: {"params": (p for p in params), "momentum": 0.5, "weight_decay": 0.2},
        lambda params: {"params": tuple(params), "maximize": True, "foreach": True},
        lambda params: {"params": {i: p for i, p in enumerate(params)}.values(), "mine": "kept"},
        lambda params: {"params": []},
    ]
    for form in forms:
        ours = make_params([(4, 3)])
        theirs = copy_params(ours)
        for optimizer, params in zip(twins.optimizers, (theirs, ours), strict=True):
            optimizer.add_param_group(form(params))
        twins.ours += ours
        twins.theirs += theirs
        twins.step()
        twins.check()
    groups = [without_clips(o.state_dict())["param_groups"] for o in twins.optimizers]
    assert len(groups[1]) == 7 and groups[1][5]["mine"] == "kept"
    for a, b in zip(*groups, strict=True):
        assert {k: v for k, v in a.items() if k != "foreach"} == {k: v for k, v in b.items() if k != "foreach"}


@both_classes
def test_what_a_bad_group_leaves(cls):
    p = torch.ones(2, requires_grad=True)
    optimizer = cls([p], lr=0.5)
    for group, error in (([p], TypeError), ({"lr": 1}, KeyError), ({"params": [p]}, ValueError)):
        with pytest.raises(error):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@as_torch_tests("test_optimizer_can_be_printed")
@every_impl
@every_input
def test_printed_like_torch_and_the_clip(kwargs, impl):
    p, q = make_params([(2,), (3,)])
    theirs = str(torch.optim.SGD([{"params": [p]}, {"params": [q], "lr": 7}], **kwargs, **impl)).splitlines()
    ours = str(fastclip.SGD([{"params": [p]}, {"params": [q], "lr": 7}], **kwargs, **impl, clip_value=3)).splitlines()
    assert [line for line in ours if line.split(":")[0].strip() not in CLIP_SETTINGS] == theirs
    assert len(ours) == len(theirs) + 2 * len(CLIP_SETTINGS)


@as_torch_tests("test_deepcopy_copies_all_public_attrs")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deep", "pickle"])
@every_clip
@every_input
def test_copies_are_whole_and_their_own(kwargs, clip, duplicate):
    twins = Twins(kwargs, clip)
    twins.step(2)
    twins.fastclip.register_step_pre_hook(print)
    other = duplicate(twins.fastclip)
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(twins.fastclip) if k[0] != "_"}
    assert_equal_trees(other.defaults, twins.fastclip.defaults)
    assert_equal_trees(copy.deepcopy(other.state_dict()), copy.deepcopy(twins.fastclip.state_dict()))
    assert not other._optimizer_step_pre_hooks, "hooks stay behind, as in torch"
    untouched = copy_params(twins.ours)
    twins.fastclip, twins.ours, original = other, other.param_groups[0]["params"], twins.ours
    twins.step(2)
    twins.check()
    assert_same_bits(untouched, original)
    new = make_params([(3,)])
    other.add_param_group({"params": new})
    assert {k: other.param_groups[1][k] for k in clip} == clip


@as_torch_tests("test_tensor_lr")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@both_precisions
@every_input
def test_a_tensor_lr_is_read_at_every_step(kwargs, dtype, lr_dtype, shape):
    kwargs = {**kwargs, "lr": torch.full(shape, 0.01, dtype=lr_dtype)}
    twins = Twins(kwargs, LOOSE["both 1e30"], dtype)
    twins.step(2)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"].fill_(0.3)
    twins.step(2)
    twins.check()
    assert twins.fastclip.param_groups[0]["lr"].shape == shape
    assert twins.fastclip.param_groups[0]["lr"].dtype == lr_dtype


@every_clip
@every_input
def test_settings_that_change_between_steps(kwargs, clip):
    twins = Twins(kwargs, clip)
    changes = [{"momentum": 0.5}, {"lr": 0.2}, {"momentum": 0}, {"weight_decay": 0.3}, {"maximize": True}]
    changes += [{"momentum": 0.9, "dampening": 0.2}, {"dampening": 0, "nesterov": True}, {"lr": 0}, {"foreach": True}]
    for change in changes:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0].update(change)
        twins.step()
        twins.check()


@every_clip
@every_input
def test_differentiable_steps(kwargs, clip):
    """Through two steps, by parameter, gradients and momentum buffer: torch's bits, and right by finite differences."""
    kwargs = {**kwargs, "differentiable": True}

    def stepped(cls, clips, p, buffer, *grads):
        p = p.clone()
        optimizer = cls([p], **copy.deepcopy(kwargs), **clips)
        if "momentum" in kwargs:  # torch cuts a buffer that it makes itself off the graph
            optimizer.state[p]["momentum_buffer"] = buffer.clone()
        for grad in grads:
            p.grad = grad
            optimizer.step()
        return p.clone()

    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    results = []
    for cls, clips in ((torch.optim.SGD, {}), (fastclip.SGD, clip)):
        out = stepped(cls, clips, *inputs)
        results.append([out.detach(), *torch.autograd.grad(out.pow(3).sum(), inputs, materialize_grads=True)])
        assert results[-1][2].any() == ("momentum" in kwargs)
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.autograd.gradcheck(lambda *x: stepped(fastclip.SGD, clip, *x), inputs)


@both_classes
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_differentiable_steps_refuse_leaves(cls, momentum):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        cls([p], differentiable=True, momentum=momentum).step()
    assert p.tolist() == [1.0] * 3 and torch.is_grad_enabled()


def test_the_inputs_are_torchs_and_cover_the_rule():
    """Guards the parametrisation: an empty list would make all tests above pass."""
    given = [p.values[0] for p in INPUTS]
    assert len(given) >= 9 and len(error_inputs()) >= 7
    assert {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"} <= {k for g in given for k in g}
    assert {"foreach", "fused", "differentiable"} <= set(INFO.supported_impls)
    assert all(math.isfinite(g["lr"]) for g in given if "lr" in g)
    assert any(isinstance(g.get("lr"), torch.Tensor) for g in given)
