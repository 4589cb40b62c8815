"""Trainings of torch's own optimizer tests, with its schedulers; and steps that do nothing."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import fastclip
from tests.support.cases import assert_same_bits, copy_params, exact_square_roots, give_grads, make_params
from tests.support.torch_optim_db import (
    ADAM,
    IMPLS,
    SGD,
    Twins,
    as_torch_tests,
    every_clip,
    every_input,
    falls_back,
)

# ---- training ------------------------------------------------------------------------------------


class Regression:
    """Least squares by one optimizer, in two groups: what a training loop does, with a closure."""

    def __init__(self, cls, kwargs, **clip):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(16, 5, generator=generator), torch.randn(16, 10, generator=generator)
        self.params = [torch.randn(s, generator=generator).requires_grad_() for s in ((10, 5), (10,))]
        impl = {} if cls.__module__.startswith("fastclip") else {"foreach": False}
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 3e-3, "weight_decay": 0.01}]
        self.optimizer = cls(groups, **copy.deepcopy(kwargs), **impl, **clip)

    def loss(self):
        self.optimizer.zero_grad()
        loss = (self.x @ self.params[0].t() + self.params[1] - self.y).square().mean()
        loss.backward()
        return loss

    def settings(self):
        """What schedulers change."""
        return [(float(g["lr"]), g.get("momentum", g.get("betas"))) for g in self.optimizer.param_groups]

    def train(self, schedulers, steps):
        """Trains; the trajectory of losses, of what the schedulers set and of what they say of themselves."""
        trajectory = []
        for _ in range(steps):
            with exact_square_roots():
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
@pytest.mark.parametrize("schedulers", [[], *SGD.info.scheduler_inputs], ids=range(len(SGD.info.scheduler_inputs) + 1))
@every_input
def test_trains_like_torch_with_torchs_schedulers(optim, kwargs, schedulers, clip):
    runs = [Regression(optim.torch, kwargs), Regression(optim.fastclip, kwargs, **clip)]
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
@pytest.mark.parametrize("optim", [SGD, ADAM], ids=repr)
def test_schedulers_set_the_same_and_resume(optim, name, clip, tensor_lr):
    """OneCycleLR and CyclicLR also set the momentum, or beta1. In the middle, everything is saved and made again."""
    kwargs = {**optim.stateful, "lr": torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01}
    trajectories, runs = [], []
    for cls, clips in ((optim.torch, {}), (optim.fastclip, clip)):
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
    kwargs, schedulers = SGD.info.metadata_for_sparse
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


# ---- what does not step --------------------------------------------------------------------------


@as_torch_tests("test_step_is_noop_when_params_have_no_grad")
@every_clip
@every_input
def test_without_gradients_a_step_does_nothing(optim, kwargs, clip):
    twins = Twins(optim, kwargs, clip)
    before = copy_params(twins.ours)
    for optimizer in twins.optimizers:
        optimizer.step()
    assert_same_bits(before, twins.ours)
    twins.check()
    assert bool(twins.fastclip.state) == bool(twins.torch.state) == optim.has_state_at_once
    give_grads(twins.theirs[:2], twins.ours[:2])
    twins.step_as_given()
    twins.check()
    assert_same_bits(before[2:], twins.ours[2:])


@as_torch_tests("test_step_is_noop_for_zero_grads")
@every_clip
@every_input
def test_zero_gradients(optim, kwargs, clip):
    twins = Twins(optim, kwargs, clip)
    before = copy_params(twins.ours)
    for _ in range(3):
        give_grads(twins.theirs, twins.ours, scale=0.0)
        twins.step_as_given()
    twins.check()
    if not twins.fastclip.param_groups[0]["weight_decay"]:
        assert_same_bits(before, twins.ours)


@pytest.mark.parametrize("impl", IMPLS, ids=str)
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
def test_state_is_what_torchs_is_and_belongs_to_no_graph(optim, kwargs):
    """Also after backward(create_graph=True), whose gradients have a history."""
    twins = Twins(optim, kwargs)
    for optimizer, params in zip(twins.optimizers, (twins.theirs, twins.ours), strict=True):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sum((p**3).sum() for p in params).backward(create_graph=True)
        assert params[0].grad.requires_grad
    twins.step_as_given()
    twins.check()
    assert bool(twins.fastclip.state) == optim.keeps_state(kwargs)
    for p in twins.ours:
        assert p.is_leaf and all(not s.requires_grad for s in twins.fastclip.state.get(p, {}).values())
