"""Other threads beside a step: what they may do meanwhile, and what is refused."""

import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastclip
from tests.support.cases import CLIPS, assert_close, give_grads, pair, step_both
from tests.support.threads import LARGE, Number, param


@pytest.fixture
def frequent_switches():
    """Between threads: every 100 microseconds instead of every 5,000."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


# ---- steps in several threads ------------------------------------------------------------------


def test_two_optimizers_in_two_threads():
    """The GIL is released for large steps."""

    def work(seed, results):
        loop, theirs, optimizer, ours = pair([(600, 700), (5,)], CLIPS["value and norm"], momentum=0.9)
        for _ in range(5):
            give_grads(theirs, ours)
            step_both(loop, theirs, optimizer, ours)
        results[seed] = (theirs, ours)

    results = {}
    threads = [threading.Thread(target=work, args=(seed, results)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for theirs, ours in results.values():
        assert_close(theirs, ours, 2e-6)
    assert len(results) == 2


def test_a_second_thread_is_refused_while_a_step_is_under_way():
    p = param()
    optimizer = fastclip.SGD([p], lr=1.0)

    def step_in_another_thread():
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="being stepped by another thread"):
            pool.submit(optimizer.step).result()

    optimizer.param_groups[0]["lr"] = Number(1.0, step_in_another_thread)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, -2.0))


def test_one_optimizer_stepped_by_two_threads(frequent_switches):
    """Each step is taken as a whole or refused as a whole."""
    torch.set_num_threads(2)
    p = param()
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=1e9)

    def steps_taken():
        taken = 0
        for _ in range(50):
            try:
                optimizer.step()
                taken += 1
            except RuntimeError as error:
                assert "being stepped by another thread" in str(error)
        return taken

    with ThreadPoolExecutor(2) as pool:
        taken = sum(f.result() for f in [pool.submit(steps_taken) for _ in range(2)])
    assert taken > 0 and torch.equal(p.detach(), torch.full_like(p, -taken))


def test_steps_in_two_threads_share_their_gradients(frequent_switches):
    """A step never writes to a gradient, not even for a moment; a norm that is only measured doesn't, either."""
    torch.set_num_threads(2)
    mine, theirs = param(), param()
    theirs.grad = mine.grad
    optimizers = [fastclip.SGD([p], lr=1.0, clip_value=2.0, max_norm=1e9) for p in (mine, theirs)]

    def work(optimizer):
        for _ in range(20):
            optimizer.step()
            norm = fastclip.clip_grad_norm_(optimizer.param_groups[0]["params"], math.inf)
            assert norm.item() == pytest.approx(math.sqrt(LARGE), rel=1e-6)

    with ThreadPoolExecutor(2) as pool:
        for worked in [pool.submit(work, optimizer) for optimizer in optimizers]:
            worked.result()
    for p in (mine, theirs):
        assert torch.equal(p.detach(), torch.full_like(p, -20.0)) and torch.equal(p.grad, torch.ones(LARGE))


# ---- a step, and a thread that does something else ---------------------------------------------


def steps_beside(beside, step, at_least=20):
    """Steps while another thread calls `beside` over and over; returns the number of steps."""
    calls, stop = 0, threading.Event()

    def repeat():
        nonlocal calls
        while not stop.is_set():
            beside()
            calls += 1

    with ThreadPoolExecutor(1) as pool:
        repeated = pool.submit(repeat)
        steps = 0
        try:
            while (steps < at_least or calls < 3) and not repeated.done():
                step()
                steps += 1
        finally:
            stop.set()
        repeated.result()
    return steps


def test_a_reader_sees_every_element_as_it_was_before_or_after_a_step(frequent_switches):
    torch.set_num_threads(2)
    p = param()
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=1e9, skip_nonfinite=True)
    optimizer.step()
    last = p.detach().clone()

    def read():
        nonlocal last
        seen = p.detach().clone()
        assert torch.equal(seen, seen.round()) and (seen <= last).all()
        assert torch.equal(p.grad, torch.ones(LARGE))
        assert optimizer.total_norm.item() == math.sqrt(LARGE) and optimizer.skipped_steps.item() == 0
        assert optimizer.state_dict()["param_groups"][0]["params"] == [0]
        last = seen

    steps = steps_beside(read, optimizer.step)
    assert (last >= -1 - steps).all() and torch.equal(p.detach(), torch.full_like(p, -1.0 - steps))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: fastclip.SGD(params, lr=1.0),
        lambda params: fastclip.SGD(params, lr=1.0, momentum=0.9),
        lambda params: fastclip.Adam(params, lr=1.0, betas=(0.5, 0.75), eps=0.0),  # a first update is of 1
    ],
    ids=["plain", "momentum", "adam"],
)
@pytest.mark.parametrize("sizes", [[LARGE], [50] * 40], ids=["large", "small"])
def test_gradients_replaced_meanwhile(sizes, make, frequent_switches):
    """A step takes each gradient as it found it; freed memory would be full of 1e9.

    No thread sets one to None: torch frees it first, lets other threads run, and empties `p.grad` last, so that even
    reading `p.grad` in another thread crashes (2.13).
    """
    params = [param(size) for size in sizes]
    garbage = []

    def replace():
        for p in params:
            p.grad = torch.ones_like(p)
            garbage[:-4] = [torch.full_like(p, 1e9, requires_grad=False)]

    steps = steps_beside(replace, lambda: make(params).step())
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -steps))


def test_steps_while_another_thread_imports_what_knows_dtensors(monkeypatch):
    """Whoever makes the first optimizer does, which takes seconds. Meanwhile the module is there, without a DTensor."""
    fastclip.SGD([param(3)])  # torch's own imports want it whole
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", types.ModuleType("torch.distributed.tensor"))
    p = param(3)
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=10.0)
    optimizer.step()
    optimizer.add_param_group({"params": [param(3)]})
    assert optimizer.first_nonfinite() is None
    fastclip.clip_grad_value_([p], 0.5)
    fastclip.clip_grad_norm_([p], 10.0, norm_type=1.0)
    assert torch.equal(p.detach(), torch.full((3,), -1.0)) and torch.equal(p.grad, torch.full((3,), 0.5))
