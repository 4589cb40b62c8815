"""Steps in the backward pass beside other threads, and what is dropped, and when."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits
from tests.support.in_backward_cases import loss_of, losses, pair, take_ordinary_step


@pytest.fixture
def frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_optimizers_made_and_dropped_in_several_threads(frequent_switches):
    """Each of a model of its own, which is trained as in one thread."""

    def train():
        model = torch.nn.Linear(4, 4, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        for number in range(60):
            optimizer = [fastclip.SGD, fastclip.Adam][number % 2](model.parameters(), lr=0.01)
            in_backward = fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
            model(torch.ones(1, 4, dtype=torch.float64)).square().sum().backward()
            assert model.weight.grad is None
            if number % 3 == 0:
                in_backward.remove()
            del optimizer, in_backward
        return model

    with ThreadPoolExecutor(4) as pool:
        first, *others = [trained.result() for trained in [pool.submit(train) for _ in range(8)]]
    assert not torch.equal(first.bias, torch.full_like(first.bias, 0.1))
    for other in others:
        assert_same_bits(first.parameters(), other.parameters())


def at_gradient_of(param, act):
    """Acts once, in a backward pass, when the gradient of `param` has been computed, and before it is applied."""

    def hook(_):
        handle.remove()
        act()

    handle = param.register_hook(hook)


@pytest.mark.parametrize("bucket_cap_mb", [0, 4])
def test_a_pass_under_way_is_finished_by_its_optimizer_that_is_dropped(bucket_cap_mb):
    (ordinary, stepped), in_backward = pair(bucket_cap_mb)
    model, optimizers = stepped[0], [stepped[1]]
    first, second = losses(2)
    loss = first(model)
    del stepped, in_backward
    at_gradient_of(model.twice.weight, optimizers.clear)
    loss.backward()
    assert not optimizers
    first(ordinary[0]).backward()
    take_ordinary_step(*ordinary)
    assert_same_bits(ordinary[0].parameters(), model.parameters())
    with pytest.raises(RuntimeError, match="the optimizer of step_in_backward is gone"):
        second(model).backward()
    assert_same_bits(ordinary[0].parameters(), model.parameters())


def test_an_optimizer_dropped_before_its_first_gradient():
    (_, stepped), in_backward = pair()
    model, optimizers = stepped[0], [stepped[1]]
    del stepped, in_backward
    before = [p.detach().clone() for p in model.parameters()]
    loss = losses(1)[0](model)
    at_gradient_of(model.out.bias, optimizers.clear)
    with pytest.raises(RuntimeError, match="the optimizer of step_in_backward is gone"):
        loss.backward()
    assert_same_bits(before, model.parameters())


def forget_parameter(optimizer, param):
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not param]


def forget_its_group(optimizer, param):
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if not any(p is param for p in g["params"])]


def forget_all(optimizer, param):
    optimizer.param_groups.clear()


# When a parameter leaves: its own gradient has been applied, or waits, or is computed later.
@pytest.mark.parametrize("leave", [forget_parameter, forget_its_group, forget_all], ids=lambda leave: leave.__name__)
@pytest.mark.parametrize("when", ["out.bias", "norm.bias", "twice.weight", "embed.weight"])
@pytest.mark.parametrize("bucket_cap_mb", [0, 2e-3, 4])
def test_a_parameter_leaves_while_a_pass_is_under_way(bucket_cap_mb, when, leave):
    """From then on it keeps its gradient; each parameter is stepped once at most, with its own group's settings."""
    (ordinary, (model, optimizer)), _ = pair(bucket_cap_mb)
    loss = losses(1)[0]
    loss(ordinary[0]).backward()
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: p.grad.clone() for name, p in ordinary[0].named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_ordinary_step(*ordinary)
    after = {name: p.detach() for name, p in ordinary[0].named_parameters()}
    at_gradient_of(model.get_parameter(when), lambda: leave(optimizer, model.norm.bias))
    loss(model).backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name in names:
        param = model.get_parameter(name)
        if param.grad is None:
            assert torch.equal(param, after[name]), name
        else:
            assert torch.equal(param, before[name]) and torch.equal(param.grad, gradients[name]), name
        assert (param.grad is None) >= (id(param) in held), name
    assert model.norm.bias.grad is None or id(model.norm.bias) not in held


def test_a_group_added_by_what_a_step_reads():
    """Python code that a step runs may change the optimizer, which must not wait for itself."""
    (_, (model, optimizer)), _ = pair()
    late = torch.nn.Linear(3, 3)

    class Lr:
        def __float__(self):
            if len(optimizer.param_groups) == 2:
                optimizer.add_param_group({"params": late.parameters()})
            return 0.1

    optimizer.param_groups[0]["lr"] = Lr()
    before = copy.deepcopy(model)
    thread = threading.Thread(target=lambda: losses(1)[0](model).backward(), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert not torch.equal(before.twice.weight, model.twice.weight)
    late(torch.ones(3)).sum().backward()
    assert late.weight.grad is None


def test_two_models_that_share_parameters():
    """A pass of either steps the shared ones where the optimizer of the first holds them, and its own later."""
    (ordinary, (model, optimizer)), in_backward = pair()
    forget_parameter(optimizer, model.embed.weight)
    forget_parameter(ordinary[1], ordinary[0].embed.weight)
    in_backward.remove()
    fastclip.step_in_backward(model, optimizer)
    heads = []
    for body in (ordinary[0], model):
        torch.manual_seed(1)
        head = torch.nn.Sequential(body, torch.nn.Linear(7, 7, dtype=torch.float64))
        heads.append((head, fastclip.SGD(head[1].parameters(), lr=0.2)))
    fastclip.step_in_backward(*heads[1])
    with pytest.raises(ValueError, match="stepped in the backward pass by another optimizer: call remove"):
        fastclip.step_in_backward(heads[1][0], fastclip.SGD(heads[1][0].parameters()))
    for number in range(4):
        x, y = torch.randint(7, (2, 5))
        for (head, own), steps in zip(heads, [True, False], strict=True):
            loss_of(x, y, head if number % 2 else head[0]).backward()
            for each in [ordinary[1], own] if steps else []:
                each.step()
                each.zero_grad()
        assert_same_bits(heads[0][0].parameters(), heads[1][0].parameters())
    assert model.embed.weight.grad is not None
