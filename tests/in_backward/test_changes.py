"""Steps in the backward pass, of models and optimizers that change from pass to pass."""

import copy

import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits
from tests.support.in_backward_cases import assert_same, losses, pair, take_ordinary_step


def test_parameters_frozen_unfrozen_added_and_moved_between_groups():
    (ordinary, stepped), _ = pair()

    def freeze(model, optimizer):
        model.norm.requires_grad_(False)

    def thaw(model, optimizer):
        model.norm.requires_grad_(True)

    def exchange(model, optimizer):
        first, second = (group["params"] for group in optimizer.param_groups)
        first[1], second[1] = second[1], first[1]

    def move(model, optimizer):
        first, second = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())

    def drop_a_group(model, optimizer):
        first, second = optimizer.param_groups
        second["params"] += first["params"]
        optimizer.param_groups.remove(first)

    def add(model, optimizer):
        model.late = torch.nn.Linear(16, 16, dtype=torch.float64)
        with torch.no_grad():
            for p in model.late.parameters():
                p.fill_(0.1)
        model.sometimes.register_forward_hook(lambda _, x, y: y + model.late(x[0]))
        optimizer.add_param_group({"params": model.late.parameters(), "clip_value": None})

    for change in (freeze, thaw, exchange, move, drop_a_group, add):
        for model, optimizer in (ordinary, stepped):
            change(model, optimizer)
        for loss in losses(3):
            loss(ordinary[0]).backward()
            take_ordinary_step(*ordinary)
            loss(stepped[0]).backward()
            assert all(p.grad is None for p in stepped[0].parameters())
            assert_same(ordinary, stepped)


@pytest.mark.parametrize("change", ["unfrozen", "added"])
def test_parameters_that_are_the_only_ones_in_a_pass(change):
    """Also where all hooks that there were belong to others."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(4)]).requires_grad_(False)
    first = [model[0].weight] if change == "added" else model.parameters()
    optimizer = fastclip.SGD(first, lr=0.1)
    fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
    assert not any(p.requires_grad for p in model.parameters())
    if change == "added":
        optimizer.add_param_group({"params": model[1:].parameters()})
    model[1:].requires_grad_(True)
    before, left = copy.deepcopy(model), []
    model[1].weight.register_hook(lambda _: left.append(sum(p.grad is not None for p in model.parameters())))
    model(torch.randn(2, 8)).sum().backward()
    assert left == [0]
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert same == [True, False, False, False]


def test_parameters_of_no_optimizer_and_of_two():
    """Those of another optimizer keep their gradients, until it steps in the backward pass, too."""
    (ordinary, (model, optimizer)), in_backward = pair()
    in_backward.remove()
    halves = [fastclip.SGD([group], momentum=0.9, clip_value=0.05) for group in optimizer.param_groups]
    fastclip.step_in_backward(model, halves[0])
    loss = losses(1)[0]
    loss(model).backward()
    first, second = ([p.grad is None for p in half.param_groups[0]["params"]] for half in halves)
    assert all(first) and not any(second)
    take_ordinary_step(model, halves[1])
    fastclip.step_in_backward(model, halves[1])
    loss(model).backward()
    for _ in range(2):
        loss(ordinary[0]).backward()
        take_ordinary_step(*ordinary)
    assert_same_bits(ordinary[0].parameters(), model.parameters())


def test_a_pass_that_raises_is_over():
    """What was not stepped on yet keeps its gradient, and zero_grad forgets it."""
    (ordinary, stepped), _ = pair(bucket_cap_mb=1)
    fails = stepped[0].embed.weight.register_hook(lambda _: 1 / 0)
    first, second = losses(2)
    before = copy.deepcopy(stepped[0])
    with pytest.raises(ZeroDivisionError):
        first(stepped[0]).backward()
    assert_same_bits(before.parameters(), stepped[0].parameters())
    assert stepped[0].out.bias.grad is not None
    fails.remove()
    stepped[1].zero_grad()
    second(ordinary[0]).backward()
    take_ordinary_step(*ordinary)
    second(stepped[0]).backward()
    assert_same(ordinary, stepped)


@pytest.mark.parametrize("bucket_cap_mb", [0, 4])
@pytest.mark.parametrize(
    ("name", "bad"), [("lr", "much"), ("clip_value", -1.0), ("momentum", None)], ids=["lr", "clip_value", "momentum"]
)
def test_a_bad_setting_between_passes(name, bad, bucket_cap_mb):
    """Told before anything is updated, and forgotten when it is mended: by a pass, or by step() on what is there."""
    (ordinary, stepped), _ = pair(bucket_cap_mb)
    model, optimizer = stepped
    first, second = losses(2)
    good, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], bad
    before = copy.deepcopy(model)
    with pytest.raises((TypeError, ValueError), match=rf"{name} in param_groups\[1\]"):
        first(model).backward()
    assert_same_bits(before.parameters(), model.parameters())
    optimizer.param_groups[1][name] = good
    if bucket_cap_mb > 0:  # all gradients are there
        optimizer.step()
        first(ordinary[0]).backward()
        take_ordinary_step(*ordinary)
    optimizer.zero_grad()
    second(ordinary[0]).backward()
    take_ordinary_step(*ordinary)
    second(model).backward()
    assert_same(ordinary, stepped)


@pytest.mark.parametrize("bucket_cap_mb", [0, 4])
def test_gradients_of_some_inputs_only(bucket_cap_mb):
    """torch.autograd.grad accumulates nothing, and is no pass; backward(inputs=) is one of these parameters."""
    (ordinary, stepped), _ = pair(bucket_cap_mb)
    for loss in losses(2):
        for model, optimizer in (ordinary, stepped):
            before = copy.deepcopy(model)
            torch.autograd.grad(loss(model), list(model.parameters()))
            assert_same_bits(before.parameters(), model.parameters())
            loss(model).backward(inputs=[model.out.bias, *model.norm.parameters()])
            if optimizer is ordinary[1]:
                take_ordinary_step(model, optimizer)
            assert torch.equal(before.twice.weight, model.twice.weight)
        assert_same(ordinary, stepped)


def test_checkpointed_and_compiled_models():
    (ordinary, stepped), _ = pair()
    compiled = torch.compile(stepped[0], backend="aot_eager")
    for how in ({"checkpointed": True}, {}):
        for loss in losses(2):
            loss(ordinary[0], **how).backward()
            take_ordinary_step(*ordinary)
            loss(compiled if not how else stepped[0], **how).backward()
            assert_same(ordinary, stepped)


def test_losses_that_share_a_graph():
    """torch notices that what the graph needs has changed; accumulated, they are right."""
    (ordinary, stepped), in_backward = pair()
    loss = losses(1)[0]
    value = loss(ordinary[0])
    value.backward(retain_graph=True)
    (2 * value).backward()
    take_ordinary_step(*ordinary)
    value = loss(stepped[0])
    with in_backward.accumulate():
        value.backward(retain_graph=True)
    (2 * value).backward(retain_graph=True)
    assert_same(ordinary, stepped)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_model_cast_between_passes():
    (ordinary, stepped), _ = pair()
    for dtype in (torch.float32, torch.float64):
        for model, optimizer in (ordinary, stepped):
            model.to(dtype)
            optimizer.load_state_dict(optimizer.state_dict())  # casts the state
        for loss in losses(2):
            loss(ordinary[0]).backward()
            take_ordinary_step(*ordinary)
            loss(stepped[0]).backward()
            assert_same(ordinary, stepped)


def test_swapped_tensors_would_lose_their_hooks():
    (_, (model, _)), in_backward = pair()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="swap"):
            model.float()
        in_backward.remove()
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.out.weight.dtype == torch.float32


def test_remove_and_leaving_a_with():
    (ordinary, (model, optimizer)), in_backward = pair()
    in_backward.remove()
    in_backward.remove()
    with fastclip.step_in_backward(model, optimizer):
        pass
    for loss in losses(2):
        for each in (ordinary, (model, optimizer)):
            loss(each[0]).backward()
            assert each[0].out.bias.grad is not None
            take_ordinary_step(*each)
    assert_same(ordinary, (model, optimizer))


def test_copies_take_ordinary_steps():
    _, in_backward = pair()
    (_, (model, optimizer)), in_backward = pair()
    both = copy.deepcopy((model, optimizer))
    losses(1)[0](both[0]).backward()
    assert all(p.grad is not None for p in both[0].parameters())
    fastclip.step_in_backward(*both)
