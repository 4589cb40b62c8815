"""Steps in the backward pass: the bits of ordinary steps, without their gradients in memory."""

import copy
import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastclip

from .cases import CLIPS, RULES, assert_same_bits, exact_square_roots

BITWISE = ["none", "value", "pair"]
SOME_KIB = 2e-3  # MiB: a few of Net's parameters


class Net(torch.nn.Module):
    """With a tied weight, a layer that is used twice, and one that not every pass uses."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 16)
        self.twice = torch.nn.Linear(16, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.sometimes = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 7)
        self.out.weight = self.embed.weight

    def forward(self, x, sometimes=True, checkpointed=False):
        h = self.embed(x)
        h = checkpoint(self.body, h, use_reentrant=False) if checkpointed else self.body(h)
        return self.out(self.sometimes(h) if sometimes else h)

    def body(self, h):
        return self.norm(self.twice(torch.tanh(self.twice(h))))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def groups(model, **second):
    return [
        {"params": [*model.embed.parameters(), *model.twice.parameters()]},
        {"params": [*model.norm.parameters(), *model.sometimes.parameters(), model.out.bias], "lr": 0.03, **second},
    ]


def losses(count):
    """Functions of a model: each a loss on data of its own."""
    return [
        partial(loss_of, *torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(i))) for i in range(count)
    ]


def loss_of(x, y, model, **how):
    return 3 * torch.nn.functional.cross_entropy(model(x, **how), y)


def three(clip, bucket_cap_mb=SOME_KIB, dtype=torch.float64, optimizer="SGD", **rule):
    """(model, optimizer) of plain torch, of ordinary steps and of steps in the backward pass; what does the last."""
    models = [net(dtype) for _ in range(3)]
    own = {"clip_value": 0.01} if clip != "none" else {}
    ours_of, theirs_of = getattr(fastclip, optimizer), getattr(torch.optim, optimizer)
    optimizers = [theirs_of(groups(models[0]), lr=0.1, foreach=False, **rule)]
    optimizers += [ours_of(groups(m, **own), lr=0.1, **CLIPS[clip], **rule) for m in models[1:]]
    in_backward = fastclip.step_in_backward(models[2], optimizers[2], bucket_cap_mb=bucket_cap_mb)
    return [*zip(models, optimizers, strict=True)], in_backward


def step_as_ever(model, optimizer, of=None):
    """Clips as the groups of `of` say, steps, and forgets the gradients."""
    for group, clips in zip(optimizer.param_groups, of.param_groups if of else [], strict=of is not None):
        for p in group["params"]:
            if p.grad is not None and clips["clip_value"] is not None:
                bounds = clips["clip_value"]
                p.grad.clamp_(*(bounds if isinstance(bounds, tuple) else (-bounds, bounds)))
    with exact_square_roots():
        optimizer.step()
    optimizer.zero_grad()


def assert_same(first, second):
    assert_same_bits(first[0].parameters(), second[0].parameters(), first[1], second[1])


def pair(bucket_cap_mb=SOME_KIB, **settings):
    """(model, optimizer) of ordinary steps and of steps in the backward pass; what does the latter."""
    settings = {"lr": 0.1, "momentum": 0.9, "clip_value": 0.05, **settings}
    models = [net(), net()]
    optimizers = [fastclip.SGD(groups(m), **settings) for m in models]
    in_backward = fastclip.step_in_backward(models[1], optimizers[1], bucket_cap_mb=bucket_cap_mb)
    return [*zip(models, optimizers, strict=True)], in_backward


def described(rule):
    return " ".join(f"{k}={v}" for k, v in rule.items() if v) or "plain"


RULES_OF_ADAM = [{"optimizer": "Adam", "maximize": True}, {"optimizer": "AdamW", "amsgrad": True}]


@pytest.mark.parametrize("clip", BITWISE)
@pytest.mark.parametrize("rule", [*RULES, *RULES_OF_ADAM], ids=described)
def test_same_bits_as_ordinary_steps(rule, clip):
    (plain, ordinary, stepped), _ = three(clip, **rule)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for _, o in (plain, ordinary, stepped)]
    for loss in losses(4):
        for model in (plain[0], ordinary[0], stepped[0]):
            loss(model).backward()
        assert all(p.grad is None for p in stepped[0].parameters())
        step_as_ever(*plain, of=ordinary[1])
        step_as_ever(*ordinary)
        stepped[1].step()  # nothing is left
        stepped[1].zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert not torch.equal(next(net().parameters()), next(stepped[0].parameters()))
    assert_same(plain, stepped)
    assert_same(ordinary, stepped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bucket_cap_mb", [0, 1e-3, 4])
def test_same_bits_with_buckets_of_any_size(bucket_cap_mb, dtype):
    (_, ordinary, stepped), _ = three("value", bucket_cap_mb, dtype, momentum=0.9)
    for loss in losses(3):
        for model in (ordinary[0], stepped[0]):
            loss(model).backward()
        step_as_ever(*ordinary)
        assert_same(ordinary, stepped)


LAYERS, LAYER_MIB = 12, 64 * 64 * 4 / 2**20


@pytest.mark.parametrize(("bucket_cap_mb", "most"), [(None, LAYERS), (0, 2), (3 * LAYER_MIB, 4)])
def test_how_many_gradients_are_in_memory(bucket_cap_mb, most):
    """Storages of gradients, counted each time autograd has written one."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(LAYERS)])
    storages, alive = [], []

    def count(param):
        storages.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in storages))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer = fastclip.SGD(model.parameters(), lr=0.1, clip_value=0.01)
    if bucket_cap_mb is not None:
        fastclip.step_in_backward(model, optimizer, bucket_cap_mb=bucket_cap_mb)
    before = copy.deepcopy(model)
    model(torch.randn(3, 64)).square().sum().backward()
    assert len(alive) == LAYERS
    assert max(alive) == LAYERS if most == LAYERS else 1 <= max(alive) <= most
    if bucket_cap_mb is not None:
        assert all(storage.expired() for storage in storages)
        assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), model.parameters(), strict=True))


def test_accumulated_gradients_are_stepped_on_by_the_next_pass():
    """Also those of a parameter that this one does not use; with gradients that were set to 0, as without."""
    (ordinary, stepped), in_backward = pair()
    for number, (first, second) in enumerate(zip(losses(4), losses(8)[4:], strict=True)):
        stepped[1].zero_grad(set_to_none=number % 2 == 0)
        first(ordinary[0]).backward()
        second(ordinary[0], sometimes=False).backward()
        step_as_ever(*ordinary)
        before = copy.deepcopy(stepped[0])
        with in_backward.accumulate():
            first(stepped[0]).backward()
        assert_same_bits(before.parameters(), stepped[0].parameters())
        second(stepped[0], sometimes=False).backward()
        assert_same(ordinary, stepped)
        assert all(p.grad is None for p in stepped[0].parameters())


def test_accumulated_gradients_are_stepped_on_by_step():
    (ordinary, stepped), in_backward = pair()
    for loss in losses(2):
        loss(ordinary[0]).backward()
        step_as_ever(*ordinary)
        with in_backward.accumulate():
            loss(stepped[0]).backward()
        stepped[1].step()
        stepped[1].zero_grad()
        assert_same(ordinary, stepped)


def test_a_closure():
    (ordinary, stepped), _ = pair()
    for loss in losses(3):
        returned = []
        for model, optimizer in (ordinary, stepped):

            def closure(model=model, optimizer=optimizer, loss=loss):
                optimizer.zero_grad()
                value = loss(model)
                value.backward()
                return value

            returned.append(optimizer.step(closure))
        assert torch.equal(*returned)
        assert_same(ordinary, stepped)


def test_schedulers_do_not_miss_the_calls_of_step():
    (_, (model, optimizer)), _ = pair()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in losses(2):
            loss(model).backward()
            scheduler.step()


def test_checkpoints_go_to_and_from_ordinary_steps():
    """load_state_dict replaces the groups; settings are read from those it loads."""
    (ordinary, stepped), _ = pair()
    for loss in losses(2):
        loss(stepped[0]).backward()
    for (model, optimizer), (to_model, to_optimizer) in [(stepped, ordinary), (ordinary, stepped)]:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][1]["lr"] *= 3
        to_model.load_state_dict(model.state_dict())
        to_optimizer.load_state_dict(saved)
        optimizer.param_groups[1]["lr"] *= 3
        for loss in losses(2):
            loss(ordinary[0]).backward()
            step_as_ever(*ordinary)
            loss(stepped[0]).backward()
            assert_same(ordinary, stepped)


def test_parameters_frozen_thawed_added_and_moved_between_groups():
    (ordinary, stepped), _ = pair()

    def freeze(model, optimizer):
        model.norm.requires_grad_(False)

    def thaw(model, optimizer):
        model.norm.requires_grad_(True)

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

    for change in (freeze, thaw, move, drop_a_group, add):
        for model, optimizer in (ordinary, stepped):
            change(model, optimizer)
        for loss in losses(3):
            loss(ordinary[0]).backward()
            step_as_ever(*ordinary)
            loss(stepped[0]).backward()
            assert all(p.grad is None for p in stepped[0].parameters())
            assert_same(ordinary, stepped)


@pytest.mark.parametrize("change", ["thawed", "added"])
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
    step_as_ever(model, halves[1])
    fastclip.step_in_backward(model, halves[1])
    loss(model).backward()
    for _ in range(2):
        loss(ordinary[0]).backward()
        step_as_ever(*ordinary)
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
    step_as_ever(*ordinary)
    second(stepped[0]).backward()
    assert_same(ordinary, stepped)


def test_checkpointed_and_compiled_models():
    (ordinary, stepped), _ = pair()
    compiled = torch.compile(stepped[0], backend="aot_eager")
    for how in ({"checkpointed": True}, {}):
        for loss in losses(2):
            loss(ordinary[0], **how).backward()
            step_as_ever(*ordinary)
            loss(compiled if not how else stepped[0], **how).backward()
            assert_same(ordinary, stepped)


def test_losses_that_share_a_graph():
    """torch notices that what the graph needs has changed; accumulated, they are right."""
    (ordinary, stepped), in_backward = pair()
    loss = losses(1)[0]
    value = loss(ordinary[0])
    value.backward(retain_graph=True)
    (2 * value).backward()
    step_as_ever(*ordinary)
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
            step_as_ever(*ordinary)
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
            step_as_ever(*each)
    assert_same(ordinary, (model, optimizer))


def test_copies_step_as_ever():
    _, in_backward = pair()
    (_, (model, optimizer)), in_backward = pair()
    both = copy.deepcopy((model, optimizer))
    losses(1)[0](both[0]).backward()
    assert all(p.grad is not None for p in both[0].parameters())
    fastclip.step_in_backward(*both)


@pytest.mark.parametrize("bucket_cap_mb", [0, SOME_KIB, 4])
def test_clip_stats_are_those_of_the_whole_pass(bucket_cap_mb):
    (ordinary, stepped), in_backward = pair(bucket_cap_mb)
    stepped[1].param_groups[1]["clip_value"] = ordinary[1].param_groups[1]["clip_value"] = 0.001
    for loss in losses(3):
        loss(ordinary[0]).backward()
        step_as_ever(*ordinary)
        loss(stepped[0]).backward()
        stepped[1].step()
        expected, stats = ordinary[1].clip_stats(), stepped[1].clip_stats()
        assert 0 < expected.clamped_fraction < 1
        assert stats == expected
    in_backward.remove()
    assert stepped[1].clip_stats() == expected
    assert stepped[1].total_norm is None


def test_clip_stats_of_accumulated_gradients_are_those_of_step():
    (ordinary, stepped), in_backward = pair(0)
    first, second = losses(2)
    for model, optimizer in (ordinary, stepped):
        first(model).backward()
        if optimizer is ordinary[1]:
            step_as_ever(model, optimizer)
        with in_backward.accumulate():
            second(model).backward()
        optimizer.step()
    assert stepped[1].clip_stats() == ordinary[1].clip_stats()


def test_hooks_of_step_run_when_it_is_called():
    (_, (model, optimizer)), _ = pair()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(copy.deepcopy(model.out.bias)))
    losses(1)[0](model).backward()
    assert not seen
    optimizer.step()
    assert torch.equal(seen[0], model.out.bias)


def test_errors_name_the_parameter_and_its_place():
    (_, (model, optimizer)), _ = pair()
    optimizer.state[model.norm.bias]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 1 of group 1"):
        losses(1)[0](model).backward()


@pytest.mark.falls_back
def test_gradients_that_the_kernels_do_not_cover():
    models = [torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [fastclip.SGD(m.parameters(), lr=0.1) for m in models]
    fastclip.step_in_backward(models[1], optimizers[1], bucket_cap_mb=0)
    for model, optimizer in zip(models, optimizers, strict=True):
        with warnings.catch_warnings(record=True):
            model(torch.tensor([1, 3, 3])).square().sum().backward()
            optimizer.step()
    assert models[0][0].weight.grad.is_sparse and models[1][0].weight.grad is None
    assert_same_bits(models[0].parameters(), models[1].parameters())


def test_models_in_two_threads():
    ordinary, both = pair()[0][0], [pair()[0][1] for _ in range(2)]

    def train(model):
        for loss in losses(20):
            loss(model).backward()

    threads = [threading.Thread(target=train, args=(model,)) for model, _ in both]
    for thread in threads:
        thread.start()
    for loss in losses(20):
        loss(ordinary[0]).backward()
        step_as_ever(*ordinary)
    for thread in threads:
        thread.join()
    for stepped in both:
        assert_same(ordinary, stepped)


def test_nothing_is_kept_alive_and_an_optimizer_that_is_gone_is_told():
    model = net()
    optimizer = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="the optimizer of step_in_backward is gone"):
        losses(1)[0](model).backward()
    before = copy.deepcopy(model)
    optimizer = fastclip.SGD(model.parameters(), lr=0.1)
    fastclip.step_in_backward(model, optimizer)
    model.zero_grad()
    losses(1)[0](model).backward()
    assert not torch.equal(before.out.bias, model.out.bias)
    weight = weakref.ref(model.out.weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
