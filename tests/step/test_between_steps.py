"""What changes between steps: gradients, tensors, state and settings that come, go and are replaced."""

import gc
import weakref

import pytest
import torch

import fastclip
from tests.support.cases import (
    CLIPS,
    SHAPES,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
    pair,
    param,
    step_both,
)

both_rules = pytest.mark.parametrize(
    "rule", [{"momentum": 0.9, "dampening": 0.5}, {"optimizer": "AdamW"}], ids=["momentum", "adam"]
)


@both_rules
def test_a_gradient_that_first_appears_later_and_one_that_goes_away(rule):
    """Momentum starts per tensor, undampened, when the tensor's first gradient comes; Adam counts its own steps."""
    loop, theirs, optimizer, ours = pair([(5,), (7,), (3, 3)], CLIPS["value"], **rule)
    for step in range(7):
        give_grads(theirs, ours)
        for params in (theirs, ours):
            for index, p in enumerate(params):
                if (step + index) % 3 == 0:
                    p.grad = None
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_momentum_switched_on_and_off_between_steps():
    loop, theirs, optimizer, ours = pair([(5,), (7,)], CLIPS["value"])
    for momentum in (0, 0.9, 0.9, 0, 0.5):
        loop.optimizer.param_groups[0]["momentum"] = optimizer.param_groups[0]["momentum"] = momentum
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@both_rules
def test_data_grad_and_dtype_replaced_between_steps(rule):
    loop, theirs, optimizer, ours = pair([(5,), (7,)], CLIPS["value"], **rule)
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    fresh = torch.randn(5)
    theirs[0].data, ours[0].data = fresh.clone(), fresh.clone()
    for params, opt in ((theirs, loop.optimizer), (ours, optimizer)):
        params[1].data = params[1].data.double()
        opt.state[params[1]].update({name: value.double() for name, value in opt.state[params[1]].items()})
        params[1].grad = None
    for _ in range(3):
        gc.collect()
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_module_moved_with_swapped_tensors():
    """A C++ copy of a parameter would make this raise."""
    model = torch.nn.Linear(4, 3)
    opt = fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
    model(torch.ones(2, 4)).sum().backward()
    fastclip.clip_grad_norm_(model.parameters(), 0.5)
    opt.step()
    opt.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.float64
    before = model.weight.detach().clone()
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    fastclip.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.weight, before - 0.1 * model.weight.grad)


@pytest.mark.parametrize("cls", [fastclip.SGD, fastclip.Adam])
def test_the_plan_keeps_no_gradient_alive(cls):
    p = torch.zeros(1000, requires_grad=True)
    opt = cls([p], lr=0.1, max_norm=1.0, **({"momentum": 0.9} if cls is fastclip.SGD else {}))
    p.grad = torch.ones(1000)
    opt.step()
    references = [weakref.ref(tensor) for tensor in (p.grad, *opt.state[p].values())]
    assert len(references) == (2 if cls is fastclip.SGD else 4)
    p.grad = None
    opt.state.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)


@both_rules
def test_gradients_freed_and_replaced_between_steps(rule, device):
    """Their memory is full of something else by the next step."""
    loop, theirs, optimizer, ours = pair([(300, 257), (7,)], CLIPS["value"], device=device, **rule)
    for _ in range(5):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        optimizer.zero_grad(set_to_none=True)
        junk = [torch.full_like(p, float("nan")) for p in ours]  # takes the memory of the gradients
        del junk
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_module_cast_between_steps():
    """`module.to(dtype)` puts other memory behind the same parameters; the buffers stay what they were, as in torch."""
    models = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = cls(model.parameters(), lr=0.1)
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            optimizer.zero_grad()
            model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
            optimizer.step()
        models.append(list(model.parameters()))
    assert_same_bits(*models)


def test_version_counters_of_all_that_is_written():
    """Parameters, buffers, gradients that a clip function changes; not of gradients that a step reads."""
    p = param(3)
    optimizer = fastclip.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0)
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    before = p._version, buffer._version, p.grad._version
    optimizer.step()
    assert p._version > before[0] and buffer._version > before[1] and p.grad._version == before[2]
    adam = fastclip.Adam([p], amsgrad=True)
    adam.step()
    before = {name: value._version for name, value in adam.state[p].items()}
    adam.step()
    assert len(before) == 4 and all(value._version > before[name] for name, value in adam.state[p].items())
    for clip in (fastclip.clip_grad_value_, fastclip.clip_grad_norm_):
        version = p.grad._version
        clip([p], 0.1)
        assert p.grad._version > version


def test_version_counters_move():
    """autograd's check of in-place changes must see the step."""
    p = torch.ones(3, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_old_checkpoints_with_an_empty_buffer():
    p = torch.zeros(3, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    opt.state[p]["momentum_buffer"] = None
    p.grad = torch.ones(3)
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(3))


def test_state_in_another_order_than_the_parameters():
    """The walk remembers where a state was; it must not believe it."""
    loop, theirs, optimizer, ours = pair([(n + 1,) for n in range(200)], CLIPS["value"], momentum=0.9)
    for _ in range(2):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        for params, opt in ((theirs, loop.optimizer), (ours, optimizer)):
            opt.state = type(opt.state)(dict, [(p, opt.state[p]) for p in reversed(params)])
    optimizer.state.pop(ours[3])
    loop.optimizer.state.pop(theirs[3])
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


class Owner:
    """Its attributes are an entry of a state."""


def owned(state, p):
    owner = Owner()
    vars(owner).update(state[p])
    state[p] = vars(owner)
    return owner


def others(entry):
    return {name: value * 2 for name, value in entry.items() if name != "step"}


def doubled(entry):
    for name, value in others(entry).items():
        entry[name] = value


def made_again(entry):
    for name, value in others(entry).items():
        entry.pop(name)
        entry.setdefault(name, value)


def swapped(first, second):
    copy = dict(first)
    first.update(second)
    second.update(copy)


# Each writes to a state of two parameters.
WRITES = {
    "items": lambda state, a, b: doubled(state[a]),
    "update": lambda state, a, b: state[a].update(others(state[a])),
    "operator": lambda state, a, b: state[a].__ior__(others(state[a])),
    "taken out and put back": lambda state, a, b: made_again(state[a]),
    "no states": lambda state, a, b: state[a].clear(),
    "another entry": lambda state, a, b: state.update({a: {**state[a], **others(state[a])}}),
    "no entry": lambda state, a, b: state.pop(a),
    "no entries": lambda state, a, b: state.clear(),
    "each other's entries": lambda state, a, b: state.update({a: state[b], b: state[a]}),
    "each other's states": lambda state, a, b: swapped(state[a], state[b]),
    "in place": lambda state, a, b: [value.mul_(2) for name, value in state[a].items() if name != "step"],
    "data": lambda state, a, b: [setattr(state[a][name], "data", value) for name, value in others(state[a]).items()],
    "swapped tensors": lambda state, a, b: [
        torch.utils.swap_tensors(state[a][name], value) for name, value in others(state[a]).items()
    ],
}


@both_rules
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_state_that_is_written_to_between_steps(rule, write):
    """A step remembers what it has found in a dict; it must notice that the dict has changed."""
    loop, theirs, optimizer, ours = pair([(5,), (5,)], CLIPS["value"], **rule)
    for step in range(6):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        if step in (1, 3):
            write(loop.optimizer.state, *theirs)
            write(optimizer.state, *ours)
            gc.collect()
            junk = [torch.full((5,), float("nan")) for _ in range(8)]  # takes the memory of what is gone
            del junk
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@both_rules
def test_states_that_an_object_owns(rule):
    """An object may write to its attributes past their dict."""
    loop, theirs, optimizer, ours = pair([(5,), (5,)], CLIPS["value"], **rule)
    for step in range(6):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        if step == 1:
            owners = owned(loop.optimizer.state, theirs[0]), owned(optimizer.state, ours[0])
        if step > 1:
            for owner in owners:
                for name, value in others(vars(owner)).items():
                    setattr(owner, name, value)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("write", ["replaced", "in place"])
def test_another_states_dict(write):
    loop, theirs, optimizer, ours = pair([(5,), (5,)], CLIPS["value"], momentum=0.9)
    for _ in range(4):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        for opt, params in ((loop.optimizer, theirs), (optimizer, ours)):
            states = {p: {name: value * 3 for name, value in opt.state[p].items()} for p in params}
            if write == "replaced":
                opt.state = type(opt.state)(dict, states)
            else:
                opt.state.clear()
                opt.state.update(states)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_hyperparameters_are_read_at_every_step():
    loop, theirs, optimizer, ours = pair([(5,), (7,)], {"clip_value": 0.5}, momentum=0.9)
    for step in range(4):
        for group in (loop.optimizer.param_groups[0], optimizer.param_groups[0]):
            group.update(lr=0.1 / (step + 1), weight_decay=0.01 * step, maximize=bool(step % 2))
        loop.clip = {"clip_value": 0.1 * (step + 1)}
        optimizer.param_groups[0]["clip_value"] = 0.1 * (step + 1)
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_one_group_per_tensor():
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    loop = torch.optim.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(theirs)], foreach=False)
    optimizer = fastclip.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ours)])
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours)


def test_containers_that_torch_takes():
    a, b = param(3), param(2)
    optimizer = fastclip.SGD([a], lr=1.0)
    optimizer.param_groups[0]["params"] = (a,)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [b]})
    del optimizer.param_groups[1]["differentiable"]
    optimizer.param_groups = tuple(optimizer.param_groups)
    optimizer.step()
    assert torch.equal(a.detach(), -torch.ones(3)) and torch.equal(b.detach(), -torch.ones(2))
