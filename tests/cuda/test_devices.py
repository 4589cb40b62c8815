"""Parameters on several devices, streams and threads: one step, one norm. Needs a GPU, for some tests two."""

import threading

import pytest
import torch

import fastclip
from tests.conftest import NO_GPU
from tests.support.cases import (
    LARGE,
    SHAPES,
    Loop,
    assert_close,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLACES = [("cuda", "cpu"), ("cpu", "cuda"), pytest.param(("cuda:0", "cuda:1", "cpu"), marks=two_gpus)]


def spread(devices):
    return [p for device in devices for p in make_params(SHAPES + LARGE, device=device)]


@pytest.mark.parametrize("devices", PLACES, ids=str)
@pytest.mark.parametrize(
    "clip", [{"clip_value": 0.5}, {"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": "inf"}], ids=str
)
def test_one_norm_over_all_devices(clip, devices):
    ours = spread(devices)
    on_cpu = [p.detach().cpu().requires_grad_() for p in ours]
    settings = {"lr": 0.1, "momentum": 0.9, **clip}
    optimizer, expected = fastclip.SGD(ours, **settings), fastclip.SGD(on_cpu, **settings)
    for _ in range(3):
        give_grads(ours, on_cpu)
        optimizer.step()
        expected.step()
    assert_close(on_cpu, [p.detach().cpu() for p in ours], 1e-6)
    if "max_norm" in clip:
        assert optimizer.total_norm.device == ours[0].device
        torch.testing.assert_close(optimizer.total_norm.cpu(), expected.total_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("devices", PLACES, ids=str)
@pytest.mark.parametrize("where", [0, -1])
def test_a_nonfinite_gradient_anywhere_skips_all(where, devices):
    params = spread(devices)
    before = copy_params(params)
    optimizer = fastclip.SGD(params, lr=0.1, clip_value=0.5, skip_nonfinite=True)
    give_grads(params)
    [p for p in params if p.numel()][where].grad.view(-1)[0] = float("nan")
    optimizer.step()
    assert_same_bits(before, params)
    assert optimizer.skipped_steps.item() == 1


@two_gpus
def test_a_device_that_is_not_the_current_one():
    params = make_params(SHAPES, device="cuda:1")
    loop = Loop(copy_params(params), {"clip_value": 0.5}, lr=0.1)
    optimizer = fastclip.SGD(params, lr=0.1, clip_value=0.5)
    give_grads(params, loop.params)
    with torch.cuda.device(0):
        optimizer.step()
    loop.step()
    assert_close(loop.params, params, 1e-6)
    assert torch.cuda.current_device() == 0


def test_the_current_stream_is_used():
    """Work on it before the step is waited for, and work after it waits."""
    params = make_params([(2000, 2000)], device="cuda")
    theirs = copy_params(params)
    optimizer, expected = fastclip.SGD(params, lr=0.1, max_norm=1.0), fastclip.SGD(theirs, lr=0.1, max_norm=1.0)
    give_grads(params, theirs)
    expected.step()
    torch.cuda.synchronize()
    grad = params[0].grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        params[0].grad.zero_()
        torch.cuda._sleep(50_000_000)
        params[0].grad.copy_(grad)
        optimizer.step()
        result = params[0].detach().clone()
    side.synchronize()
    assert torch.equal(result, theirs[0])


def test_nothing_waits_for_the_device():
    params = make_params(SHAPES + LARGE, device="cuda")
    optimizers = [
        fastclip.SGD(params, lr=0.1, momentum=0.9, **clip)
        for clip in ({"clip_value": 0.5}, {"max_norm": 1.0}, {"clip_value": 0.5, "skip_nonfinite": True})
    ]
    give_grads(params)
    for optimizer in optimizers:
        optimizer.step()  # makes the buffers
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about half a second
        done = torch.cuda.Event()
        for optimizer in optimizers:
            optimizer.step()
            logged = optimizer.total_norm, optimizer.skipped_steps
        done.record()
        assert not done.query(), "a step has waited for the work before it"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert logged[1].item() == 0


def test_gradients_freed_and_replaced_between_steps():
    params = make_params(LARGE, device="cuda")
    theirs = copy_params(params)
    optimizer, expected = fastclip.SGD(params, lr=0.1, max_norm=1.0), fastclip.SGD(theirs, lr=0.1, max_norm=1.0)
    for _ in range(20):
        give_grads(params, theirs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        junk = [torch.full_like(p, float("nan")) for p in params]  # takes the memory of the gradients
        expected.step()
        del junk
    assert_same_bits(theirs, params)


def test_two_optimizers_in_two_threads():
    def train(seed, results):
        generator = torch.Generator().manual_seed(seed)
        p = torch.randn(300_000, generator=generator).cuda().requires_grad_()
        optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                p.grad = torch.randn(300_000, generator=generator).cuda()
                optimizer.step()
        torch.cuda.synchronize()
        results[seed] = p.detach().cpu()

    alone, together = {}, {}
    for seed in (1, 2):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[seed], together[seed]) for seed in (1, 2))


def test_more_than_2_to_the_31_elements():
    numel = 2**31 + 5001
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("needs 11 GB of device memory")
    p = torch.zeros(numel, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = fastclip.SGD([p], lr=1.0, clip_value=1.0, max_norm=numel**0.5 / 2)
    optimizer.step()
    assert optimizer.total_norm.item() == pytest.approx(numel**0.5, rel=1e-12)
    for start in range(0, numel, 2**28):
        assert (p.detach()[start : start + 2**28] == -0.5).all()
