"""What fastclip lets go of: parameters, gradients and optimizers, as soon as their owners do."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastclip

OPTIMIZERS = {
    "SGD": partial(fastclip.SGD, lr=0.1, momentum=0.9),
    "Adam": fastclip.Adam,
    "AdamW": partial(fastclip.AdamW, amsgrad=True),
}
CLIPS = {"value": {"clip_value": 0.1}, "norm": {"max_norm": 1.0, "skip_nonfinite": True}}


@pytest.fixture
def no_collector():
    """What is freed without it is freed at once."""
    torch.optim.SGD([torch.zeros(1)])  # torch imports its compiler with the first one, and a frame keeps that one
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def linears(count=3, complex_too=False):
    """A model of `count` weights; the last one is complex, for which a step leaves the kernels."""
    model = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(count)])
    if complex_too:
        model[-1].to(torch.complex64)
    return model


def backward(model, **how):
    sum(layer(torch.ones(2, 8, dtype=layer.weight.dtype)).abs().square().sum() for layer in model).backward(**how)


def storages(tensors):
    return [StorageWeakRef(t.untyped_storage()) for t in tensors]


@pytest.mark.falls_back
@pytest.mark.filterwarnings("ignore:fastclip falls back to plain torch")
@pytest.mark.parametrize("in_plain_torch", [False, True], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("how", ["norm", "in backward"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_and_a_model_that_were_dropped_are_freed(optimizer, how, in_plain_torch, no_collector):
    model = linears(complex_too=in_plain_torch)
    opt = OPTIMIZERS[optimizer](model.parameters(), **(CLIPS["norm"] if how == "norm" else {}))
    if how == "in backward":
        fastclip.step_in_backward(model, opt, bucket_cap_mb=0)
    for _ in range(2):
        backward(model)
        opt.step()
    stats = opt.clip_stats()
    states = [value for entry in opt.state.values() for value in entry.values()]
    freed = [weakref.ref(t) for t in [opt, *model.parameters(), *states]]
    memory = storages([*model.parameters(), *states])
    assert len(memory) > 3
    del opt, model, states
    assert not any(reference() is not None for reference in freed)
    assert all(storage.expired() for storage in memory)
    assert not stats.skipped


@pytest.mark.falls_back
@pytest.mark.filterwarnings("ignore:fastclip falls back to plain torch")
@pytest.mark.parametrize(
    ("clip", "in_plain_torch"),
    [("value", False), ("norm", False), ("norm", True)],  # complex gradients have no value clip
    ids=["value", "norm", "norm in plain torch"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_are_freed_by_zero_grad(optimizer, clip, in_plain_torch, no_collector):
    model = linears(complex_too=in_plain_torch)
    opt = OPTIMIZERS[optimizer](model.parameters(), **CLIPS[clip])
    for _ in range(2):
        backward(model)
        gradients = storages([p.grad for p in model.parameters()])
        opt.step()
        assert not any(storage.expired() for storage in gradients)
        opt.zero_grad()
        assert all(storage.expired() for storage in gradients)


@pytest.mark.parametrize("in_plain_torch", [False, True], ids=["kernels", "plain torch"])
def test_gradients_that_were_clipped_are_freed(in_plain_torch, no_collector):
    model = linears(complex_too=in_plain_torch)
    backward(model)
    gradients = storages([p.grad for p in model.parameters()])
    norm = fastclip.clip_grad_norm_(model.parameters(), 1.0)
    fastclip.clip_grad_value_([p for p in model.parameters() if not p.is_complex()], 0.1)
    assert norm.grad_fn is None
    model.zero_grad()
    assert all(storage.expired() for storage in gradients)


def test_a_step_that_raises_keeps_nothing(no_collector):
    model = linears()
    opt = fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model)
    opt.state[model[2].weight]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 2"):
        opt.step()
    gradients = storages([p.grad for p in model.parameters()])
    opt.zero_grad()
    assert all(storage.expired() for storage in gradients)


# ---- parameters that leave an optimizer which steps in the backward pass -------------------------


def hooks(model):
    return [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]


def replace(optimizer, new):
    optimizer.param_groups[-1]["params"][0] = new


def drop_the_group_and_add(optimizer, new):
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [new]})


def add_and_drop_the_group(optimizer, new):
    optimizer.add_param_group({"params": [new]})
    optimizer.param_groups.pop(-2)


def replace_and_load(optimizer, new):
    replace(optimizer, new)
    optimizer.load_state_dict(optimizer.state_dict())


EXCHANGES = [replace, drop_the_group_and_add, add_and_drop_the_group, replace_and_load]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.__name__)
def test_parameters_that_were_exchanged_are_freed(exchange, no_collector):
    """One at a time is there, and is stepped; without passes, too."""
    model = linears(2)
    opt = fastclip.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    fastclip.step_in_backward(model, opt)
    memory = []
    for number in range(12):
        model[-1] = torch.nn.Linear(8, 8, bias=False)
        exchange(opt, model[-1].weight)
        if number % 3 > 0:
            before = model[-1].weight.detach().clone()
            backward(model)
            assert model[-1].weight.grad is None and not torch.equal(before, model[-1].weight)
            assert hooks(model) == [1, 1]
        memory += storages([model[-1].weight])
        before = None
        assert sum(not storage.expired() for storage in memory) == 1


def test_a_pass_that_raised_keeps_nothing(no_collector):
    """Not even what it had collected."""
    model = linears(3)
    opt = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, opt)
    fails = model[0].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model)
    collected = model[1:].parameters()
    memory = storages(collected)
    assert any(p.grad is not None for p in model[1:].parameters())
    del fails, collected, opt.param_groups[0]["params"][1:]
    model = model[:1]
    assert len(memory) == 2 and all(storage.expired() for storage in memory)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("place", [0, 2])
def test_a_parameter_that_left_is_let_go(place, used):
    """It keeps its gradient, for another optimizer of any kind."""
    model = linears(3)
    opt = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, opt)
    left = opt.param_groups[0]["params"].pop(place)
    before = left.detach().clone()
    backward(model if used else [layer for layer in model if layer.weight is not left])
    assert hooks(model) == [int(layer.weight is not left) for layer in model]
    assert torch.equal(before, left) and (left.grad is not None) == used
    other = fastclip.SGD([left], lr=0.1)
    fastclip.step_in_backward(model, other)
    backward(model)
    assert not torch.equal(before, left) and left.grad is None
    del opt
    with pytest.raises(RuntimeError, match="optimizer of step_in_backward is gone"):
        backward(model)
    assert hooks(model) == [int(layer.weight is left) for layer in model]


def test_all_parameters_replaced_by_hand():
    """No hook tells; the next step() sees it."""
    model = linears(2)
    opt = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, opt)
    model = linears(3)
    opt.param_groups[0]["params"] = list(model.parameters())
    for waits in (True, False):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model)
        assert all((p.grad is not None) == waits for p in model.parameters())
        opt.step()
        opt.zero_grad()
        assert hooks(model) == [1, 1, 1]
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_parameter_in_the_memory_of_one_that_is_gone():
    """It is another one, though Python gives it the same id."""
    model = linears(2)
    opt = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, opt)
    data, new = torch.ones(8, 8), []
    gone, model[1].weight = id(model[1].weight), None
    del opt.param_groups[0]["params"][1]
    while not new or id(new[-1]) != gone:
        assert len(new) < 1000
        new.append(torch.nn.Parameter(data))
    model[1].weight = new[-1]
    opt.add_param_group({"params": [new[-1]]})
    assert hooks(model) == [1, 1]
    backward(model)
    assert model[1].weight.grad is None and not (data == 1).all()


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_groups_cleared_then_filled():
    model = linears(3)
    opt = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, opt, bucket_cap_mb=0)
    group = opt.param_groups[0]
    opt.param_groups.clear()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, create_graph=True)  # which a pass that steps can't be
    assert hooks(model) == [0, 0, 0]
    assert all(p.grad is not None and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    opt.param_groups.append({**group, "params": [model[0].weight]})
    opt.add_param_group({"params": [model[2].weight]})
    opt.zero_grad()
    model.zero_grad()
    backward(model)
    assert hooks(model) == [1, 0, 1]
    assert [p.grad is None for p in model.parameters()] == [True, False, True]
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)] == [False, True, False]
