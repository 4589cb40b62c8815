"""Steps in the backward pass: the bits of ordinary steps, without their gradients in memory."""

import copy
import threading
import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastclip
from tests.support.cases import RULES, assert_same_bits
from tests.support.in_backward_cases import SOME_KIB, assert_same, losses, net, pair, take_ordinary_step, three

BITWISE = ["none", "value", "pair"]
RULES_OF_ADAM = [{"optimizer": "Adam", "maximize": True}, {"optimizer": "AdamW", "amsgrad": True}]


def described(rule):
    return " ".join(f"{k}={v}" for k, v in rule.items() if v) or "plain"


@pytest.mark.parametrize("clip", BITWISE)
@pytest.mark.parametrize("rule", [*RULES, *RULES_OF_ADAM], ids=described)
def test_same_bits_as_ordinary_steps(rule, clip):
    (plain, ordinary, stepped), _ = three(clip, **rule)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for _, o in (plain, ordinary, stepped)]
    for loss in losses(4):
        for model in (plain[0], ordinary[0], stepped[0]):
            loss(model).backward()
        assert all(p.grad is None for p in stepped[0].parameters())
        take_ordinary_step(*plain, of=ordinary[1])
        take_ordinary_step(*ordinary)
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
        take_ordinary_step(*ordinary)
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
        take_ordinary_step(*ordinary)
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
        take_ordinary_step(*ordinary)
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
            take_ordinary_step(*ordinary)
            loss(stepped[0]).backward()
            assert_same(ordinary, stepped)


@pytest.mark.parametrize("bucket_cap_mb", [0, SOME_KIB, 4])
def test_clip_stats_are_those_of_the_whole_pass(bucket_cap_mb):
    (ordinary, stepped), in_backward = pair(bucket_cap_mb)
    stepped[1].param_groups[1]["clip_value"] = ordinary[1].param_groups[1]["clip_value"] = 0.001
    for loss in losses(3):
        loss(ordinary[0]).backward()
        take_ordinary_step(*ordinary)
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
            take_ordinary_step(model, optimizer)
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
        take_ordinary_step(*ordinary)
    for thread in threads:
        thread.join()
    for stepped in both:
        assert_same(ordinary, stepped)
