"""Hooks, closures, groups, copies and arguments, as torch's own optimizer tests have them."""

import copy
import pickle

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import fastclip
from fastclip.settings import OWN_SETTINGS
from tests.support import optimizers
from tests.support.cases import assert_equal_trees, assert_same_bits, copy_params, make_params
from tests.support.torch_optim_db import (
    LOOSE,
    SGD,
    Twins,
    as_torch_tests,
    both_classes,
    both_precisions,
    every_clip,
    every_input,
    every_input_and_impl,
    every_optimizer,
    without_clips,
)

# ---- hooks ---------------------------------------------------------------------------------------


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
    optimizer = cls([p], **optimizers.OPTIMIZERS[cls.__name__].stateful)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert p.tolist() == [1.0, 1.0] and not optimizer.state and torch.is_grad_enabled()


@as_torch_tests("test_load_state_dict_pre_hook_and_prepend")
@every_optimizer
def test_state_dict_and_load_hooks_run_as_in_torch(optim):
    traces = []
    for cls in optim.classes:
        p = torch.ones(2, requires_grad=True)
        p.grad = torch.ones(2)
        optimizer, trace = cls([p], **{**optim.stateful, "lr": 0.5}), []
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


# ---- groups, copies, arguments -------------------------------------------------------------------


@every_clip
@every_input
def test_add_param_group_in_all_its_forms(optim, kwargs, clip):
    twins = Twins(optim, kwargs, clip)
    twins.step(2)
    forms = [
        lambda params: {"params": params[0]},
        lambda params: {"params": params, "lr": 0.3},
        lambda params: {"params": (p for p in params), **optim.stateful, **optim.another, "weight_decay": 0.2},
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
@every_input_and_impl
def test_printed_like_torch_and_the_clip(optim, kwargs, impl):
    p, q = make_params([(2,), (3,)])
    theirs = str(optim.torch([{"params": [p]}, {"params": [q], "lr": 7}], **kwargs, **impl)).splitlines()
    ours = str(optim.fastclip([{"params": [p]}, {"params": [q], "lr": 7}], **kwargs, **impl, clip_value=3)).splitlines()
    assert [line for line in ours if line.split(":")[0].strip() not in OWN_SETTINGS] == theirs
    assert len(ours) == len(theirs) + 2 * len(OWN_SETTINGS)


@as_torch_tests("test_deepcopy_copies_all_public_attrs")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deep", "pickle"])
@every_clip
@every_input
def test_copies_are_whole_and_their_own(optim, kwargs, clip, duplicate):
    twins = Twins(optim, kwargs, clip)
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
def test_a_tensor_lr_is_read_at_every_step(optim, kwargs, dtype, lr_dtype, shape):
    kwargs = {**kwargs, "lr": torch.full(shape, 0.01, dtype=lr_dtype)}
    twins = Twins(optim, kwargs, LOOSE["both 1e30"], dtype)
    in_torch, ours = (optimizer.param_groups[0] for optimizer in twins.optimizers)
    for value in (0.01, 0.3):
        ours["lr"].fill_(value)
        if optim is SGD:
            in_torch["lr"].fill_(value)
        else:  # torch's Adam computes with a tensor in the tensor's precision, and fastclip with its number
            in_torch["lr"] = float(ours["lr"])
        twins.step(2)
    twins.check()
    assert twins.fastclip.param_groups[0]["lr"].shape == shape
    assert twins.fastclip.param_groups[0]["lr"].dtype == lr_dtype


@every_clip
@every_input
def test_settings_that_change_between_steps(optim, kwargs, clip):
    twins = Twins(optim, kwargs, clip)
    changes = [{"lr": 0.2}, {"weight_decay": 0.3}, {"maximize": True}, {"lr": 0}, {"foreach": True}]
    changes += optim.changes
    for change in changes:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0].update(change)
        twins.step()
        twins.check()


@every_clip
@every_input
def test_differentiable_steps(optim, kwargs, clip):
    """Through two steps, by parameter, gradients and state: torch's bits, and right by finite differences."""
    kwargs = {**kwargs, "differentiable": True}

    def stepped(cls, clips, p, buffer, *grads):
        p = p.clone()
        optimizer = cls([p], **copy.deepcopy(kwargs), **clips)
        # torch cuts a state that it makes itself off the graph
        if optim.keeps_state(kwargs):
            optimizer.state[p].update(optim.after(buffer))
        for grad in grads:
            p.grad = grad
            optimizer.step()
        return p.clone()

    steps = 1 if any(map(kwargs.get, optim.differentiable_once)) else 2
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2 + steps)]
    results = []
    for cls, clips in ((optim.torch, {}), (optim.fastclip, clip)):
        out = stepped(cls, clips, *inputs)
        results.append([out.detach(), *torch.autograd.grad(out.pow(3).sum(), inputs, materialize_grads=True)])
        assert results[-1][2].any() == optim.keeps_state(kwargs)
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.autograd.gradcheck(lambda *x: stepped(optim.fastclip, clip, *x), inputs)


@both_classes
@pytest.mark.parametrize("stateful", [False, True])
def test_differentiable_steps_refuse_leaves(cls, stateful):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        cls([p], differentiable=True, **(optimizers.OPTIMIZERS[cls.__name__].stateful if stateful else {})).step()
    assert p.tolist() == [1.0] * 3 and torch.is_grad_enabled()
