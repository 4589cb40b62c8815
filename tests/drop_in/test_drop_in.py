"""fastclip.SGD where torch.optim.SGD was: state, hooks, schedulers, copies."""

import copy
import functools
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastclip
from tests.support.cases import CLIPS, assert_same_bits, copy_params, give_grads, make_params, pair, through_a_file


def test_is_an_sgd_with_its_arguments():
    p = torch.zeros(2, requires_grad=True)
    opt = fastclip.SGD([p], 0.1, 0.9, 0.0, 0.01, True, maximize=True, foreach=True, differentiable=False, fused=None)
    assert isinstance(opt, torch.optim.SGD)
    group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    plain = torch.optim.SGD(
        [p], 0.1, 0.9, 0.0, 0.01, True, maximize=True, foreach=True, differentiable=False, fused=None
    )
    assert group == {
        **{k: v for k, v in plain.param_groups[0].items() if k != "params"},
        "clip_value": None,
        "max_norm": None,
        "skip_norm": None,
        "norm_type": 2.0,
        "norm_scope": "global",
        "norm_replicated": False,
        "max_change": None,
        "max_relative_change": None,
        "max_update_rms": None,
        "skip_nonfinite": False,
        "master_weights": False,
        "stochastic_rounding": False,
        "rounding_seed": 0,
        "momentum_dtype": None,
        "state_bits": 32,
    }
    with pytest.raises(TypeError):
        fastclip.SGD([p], 0.1, 0.9, 0.0, 0.01, True, False, None, False, None, 0.1)


def test_defaults_are_torchs():
    p = torch.zeros(2, requires_grad=True)
    ours, theirs = fastclip.SGD([p]).defaults, torch.optim.SGD([p]).defaults
    assert {k: ours[k] for k in theirs} == theirs


@pytest.mark.parametrize("setting", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}])
def test_foreach_and_fused_are_accepted(setting):
    loop, theirs, optimizer, ours = pair([(5, 3), (4,)], CLIPS["value"], momentum=0.9)
    optimizer = fastclip.SGD(ours, lr=0.1, momentum=0.9, **CLIPS["value"], **setting)
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_no_state_without_momentum():
    _, _, optimizer, ours = pair([(3,)])
    give_grads(ours)
    optimizer.step()
    assert dict(optimizer.state) == {}


@pytest.mark.parametrize("direction", ["into fastclip", "into torch"])
def test_state_dicts_go_both_ways(direction):
    loop, theirs, optimizer, ours = pair([(5, 3), (4,)], CLIPS["value"], momentum=0.9, dampening=0.1)
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    if direction == "into fastclip":
        fresh = fastclip.SGD(ours, lr=7.0, **CLIPS["value"])
        fresh.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))  # loading shares tensors
        optimizer = fresh
    else:
        fresh = torch.optim.SGD(theirs, lr=7.0, foreach=False)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loop.optimizer = fresh
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_plain_checkpoint_keeps_this_optimizers_clip():
    p = torch.zeros(3, requires_grad=True)
    plain = torch.optim.SGD([p], lr=0.1, momentum=0.9).state_dict()
    opt = fastclip.SGD([p], lr=1.0, clip_value=0.5, max_norm=2.0, norm_type="inf")
    opt.load_state_dict(plain)
    group = opt.param_groups[0]
    assert (group["clip_value"], group["max_norm"], group["norm_type"]) == (0.5, 2.0, "inf")
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    p.grad = torch.full((3,), 7.0)
    opt.step()
    assert p.tolist() == pytest.approx([-0.1 * 0.5] * 3)


def test_each_group_keeps_its_own_clip_with_a_plain_checkpoint():
    p, q = make_params([(2,), (3,)])
    plain = torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1).state_dict()
    opt = fastclip.SGD([{"params": [p], "clip_value": 0.1}, {"params": [q], "clip_value": (0, 2)}], skip_nonfinite=True)
    opt.load_state_dict(plain)
    assert [g["clip_value"] for g in opt.param_groups] == [0.1, (0, 2)]
    assert [g["skip_nonfinite"] for g in opt.param_groups] == [True, True]


def test_own_checkpoints_restore_the_clip():
    p = torch.zeros(3, requires_grad=True)
    saved = fastclip.SGD([p], lr=0.1, clip_value=0.25, max_norm=3.0).state_dict()
    opt = fastclip.SGD([p], lr=1.0)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["clip_value"] == 0.25 and opt.param_groups[0]["max_norm"] == 3.0


def test_checkpoints_load_with_weights_only():
    _, _, optimizer, ours = pair([(3,)], {"clip_value": (-0.1, 0.2), "max_norm": 1.0}, momentum=0.9)
    give_grads(ours)
    optimizer.step()
    loaded = through_a_file(optimizer.state_dict())
    fastclip.SGD(ours, lr=0.1).load_state_dict(loaded)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_step_like_the_original(duplicate):
    _, _, optimizer, ours = pair([(5, 3), (4,)], CLIPS["value and norm"], momentum=0.9)
    give_grads(ours)
    optimizer.step()
    other = duplicate(optimizer)
    theirs = other.param_groups[0]["params"]
    assert other.param_groups[0]["clip_value"] == 0.5
    give_grads(ours, theirs)
    optimizer.step()
    other.step()
    assert_same_bits(theirs, ours, other, optimizer)
    assert torch.equal(other.total_norm, optimizer.total_norm)


def test_hooks_run_once_and_around_the_step():
    """Also when a plain SGD exists, whose step torch has wrapped."""
    p = torch.ones(1, requires_grad=True)
    torch.optim.SGD([p], lr=0.1)
    opt = fastclip.SGD([p], lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o is opt, p.item())))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o is opt, p.item())))
    p.grad = torch.ones(1)
    opt.step()
    assert seen == [("pre", True, 1.0), ("post", True, pytest.approx(0.9))]


def test_global_hooks_run():
    from torch.optim.optimizer import register_optimizer_step_post_hook

    p = torch.ones(1, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1)
    seen = []
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    opt.step()
    handle.remove()
    opt.step()
    assert seen == [opt]


def test_hooks_of_a_subclass_with_its_own_step_run_once():
    class Counting(fastclip.SGD):
        def step(self, closure=None):
            return super().step(closure)

    p = torch.ones(1, requires_grad=True)
    torch.optim.SGD([p], lr=0.1)  # makes torch wrap the step of its class
    opt = Counting([p], lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda *args: seen.append("pre"))
    opt.register_step_post_hook(lambda *args: seen.append("post"))
    opt.step()
    assert seen == ["pre", "post"]


def wrapped(step):
    @functools.wraps(step)
    def own(self, *positional, **named):
        return step(self, *positional, **named)

    return own


@pytest.mark.parametrize("by", [wrapped, torch.no_grad(), lambda step: lambda *given, **named: step(*given, **named)])
@pytest.mark.parametrize("levels", [1, 2])
def test_hooks_run_once_where_a_subclass_wraps_the_step(by, levels):
    """functools.wraps copies the mark by which torch knows that a step has been wrapped to run hooks."""
    seen, runs = {}, {}
    for module in (torch.optim, fastclip):
        names = seen[module] = []
        cls = module.SGD
        cls([torch.ones(1)], lr=0.1)  # makes torch wrap the step of its class
        for _ in range(levels):
            cls = type("Wrapping", (cls,), {"step": by(cls.step)})
        p = torch.ones(1, requires_grad=True)
        optimizer = cls([p], lr=0.1)
        optimizer.register_step_pre_hook(lambda *_, names=names: names.append("pre"))
        optimizer.register_step_post_hook(lambda *_, names=names: names.append("post"))
        everywhere = register_optimizer_step_pre_hook(lambda *_, names=names: names.append("global"))
        p.grad = torch.ones(1)
        optimizer.step()
        everywhere.remove()
        runs[module] = p.item()
        with torch.profiler.profile() as profile:
            optimizer.step()
        assert "Optimizer.step#Wrapping.step" in {event.key for event in profile.key_averages()}
    assert seen[fastclip][:3] == ["global", "pre", "post"]
    if by is wrapped:  # torch wraps a step without the mark once more, and its hooks run twice
        assert seen[fastclip] == seen[torch.optim]
    assert runs[fastclip] == runs[torch.optim]


def test_hooks_of_a_step_within_the_closure_of_another():
    seen = {}
    for module in (torch.optim, fastclip):
        names = seen[module] = []
        p = torch.ones(1, requires_grad=True)
        optimizer = module.SGD([p], lr=0.1)
        optimizer.register_step_post_hook(lambda *_, names=names: names.append("post"))

        def closure(optimizer=optimizer, p=p):
            p.grad = torch.ones(1)
            if not seen.get(optimizer):
                seen[optimizer] = True
                optimizer.step()
            return p.sum()

        optimizer.step(closure)
    assert seen[fastclip] == seen[torch.optim] == ["post", "post"]


def test_param_groups_is_an_attribute_like_others():
    optimizer = fastclip.SGD([torch.ones(1)], lr=0.1)
    groups = optimizer.param_groups
    assert optimizer.param_groups is groups and vars(optimizer)["param_groups"] is groups
    optimizer.param_groups = list(groups)
    assert optimizer.param_groups == groups and optimizer.param_groups is not groups
    del optimizer.param_groups
    assert not hasattr(optimizer, "param_groups") and not hasattr(fastclip.SGD.__new__(fastclip.SGD), "param_groups")


def test_a_training_step_under_torch_compile():
    """The graph breaks at the step, as at torch's own."""
    trained = []
    for module, settings in ((torch.optim, {"foreach": False}), (fastclip, {"clip_value": 0.05})):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = module.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings)

        @torch.compile(backend="eager")
        def step(x, model=model, optimizer=optimizer, clip=module is torch.optim):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if clip:
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()

        for _ in range(3):
            step(torch.ones(3, 4))
        trained.append(list(model.parameters()))
    assert_same_bits(*trained)


def test_steps_show_in_profiles():
    p = torch.ones(1, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1)
    with torch.profiler.profile() as profile:
        opt.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_closure_runs_with_gradients_enabled():
    p = torch.ones(1, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, clip_value=0.5)

    def closure():
        opt.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss.item() == 3.0 and p.item() == pytest.approx(1 - 0.1 * 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(make, tensor_lr):
    lr = 0.1
    loop, theirs, optimizer, ours = pair(
        [(5, 3), (4,)], CLIPS["value"], momentum=0.9, lr=torch.tensor(lr) if tensor_lr else lr
    )
    optimizer.param_groups[0]["lr"] = torch.tensor(lr) if tensor_lr else lr  # not the same tensor
    schedulers = make(loop.optimizer), make(optimizer)
    for _ in range(8):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_tensor_lr_has_its_own_precision():
    for dtype in (torch.float32, torch.float64):
        lr = torch.tensor(0.1, dtype=dtype)
        loop, theirs, optimizer, ours = pair([(50,)], dtype=torch.float64, lr=lr)
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
        assert_same_bits(theirs, ours)


def test_add_param_group():
    loop, theirs, optimizer, ours = pair([(5,)], CLIPS["value"], momentum=0.9)
    give_grads(theirs, ours)
    loop.step()
    optimizer.step()
    new = make_params([(7,)])
    new_theirs = copy_params(new)
    optimizer.add_param_group({"params": (p for p in new), "lr": 0.01, "clip_value": None})
    loop.optimizer.add_param_group({"params": new_theirs, "lr": 0.01})
    for _ in range(2):
        give_grads(theirs + new_theirs, ours + new)
        loop.step()  # clips theirs, not the new group
        optimizer.step()
    assert_same_bits(theirs + new_theirs, ours + new, loop.optimizer, optimizer)


@pytest.mark.parametrize("shared", [{"max_norm": 3.0}, {"max_norm": 0.5, "norm_type": "inf"}, {"skip_nonfinite": True}])
def test_a_new_group_takes_the_norm_clip_that_was_loaded_or_set(shared):
    """Not the one that the optimizer was made with: all groups have the same."""
    _, _, saved, ours = pair([(5,)], shared)
    opt = fastclip.SGD(ours, lr=0.1)
    opt.load_state_dict(saved.state_dict())
    opt.add_param_group({"params": make_params([(3,)])})
    for name, value in shared.items():
        assert opt.param_groups[1][name] == value
        opt.param_groups[0][name] = opt.param_groups[1][name] = opt.defaults[name]
    opt.add_param_group({"params": make_params([(2,)])})
    assert all(opt.param_groups[2][name] == opt.defaults[name] for name in shared)
    with pytest.raises(ValueError, match="max_norm must be the same in all groups"):
        opt.add_param_group({"params": make_params([(2,)]), "max_norm": 7.0})
    assert len(opt.param_groups) == 3


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    opt = fastclip.SGD(model.named_parameters(), lr=0.1, clip_value=0.1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 3)).sum().backward()
    opt.step()


def test_lbfgs_style_positional_and_keyword_closures():
    p = torch.ones(1, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1)
    opt.register_step_pre_hook(lambda *args: None)
    assert opt.step(lambda: 5) == 5 and opt.step(closure=lambda: 6) == 6


def test_zero_grad_and_repr():
    p = torch.ones(1, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, clip_value=0.5)
    p.grad = torch.ones(1)
    opt.zero_grad()
    assert p.grad is None
    assert "clip_value: 0.5" in repr(opt)
