"""Other threads and processes beside a step: what they may do meanwhile, and what is refused."""

import collections
import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastclip
from tests.support.cases import CLIPS, assert_close, give_grads, pair, step_both
from tests.support.scripts import run_script

LARGE = 2**18 + 4097  # elements: the step releases the GIL, and its last chunk is not a whole one


def param(size=LARGE):
    """Zeros with a gradient of ones: under lr=1 each step takes 1 off every element, and no clip below is tight."""
    p = torch.zeros(size, requires_grad=True)
    p.grad = torch.ones(size)
    return p


@pytest.fixture
def frequent_switches():
    """Between threads: every 100 microseconds instead of every 5,000."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


class Number:
    """A hyperparameter that runs some code when a step reads it, as a switch to another thread would."""

    def __init__(self, value, meddle):
        self.value, self.meddle = value, meddle

    def __float__(self):
        self.meddle()
        return self.value


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


# ---- Python that runs in the middle of a step --------------------------------------------------


@pytest.fixture
def run_in_look_up(monkeypatch):
    """run_in_look_up(optimizer, call, meddle): a step, and `meddle` in its look-up number `call` of a tensor's state.

    Such a look-up runs Tensor.__hash__, in Python: for each parameter, and again to make its entry.
    """

    def step(optimizer, call, meddle):
        calls = 0

        def meddling_hash(self):
            nonlocal calls
            if calls == call:
                meddle()
            calls += 1
            return id(self)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__hash__", meddling_hash)
            optimizer.step()
        assert calls > call

    return step


@pytest.mark.parametrize("call", range(6))
def test_gradients_dropped_while_a_state_is_looked_up(call, run_in_look_up):
    params = [param(1000) for _ in range(3)]
    garbage = []

    def drop():
        for p in params:
            p.grad = None
            garbage.extend(torch.full((1000,), 1e9) for _ in range(2))

    run_in_look_up(fastclip.SGD(params, lr=1.0, momentum=0.9), call, drop)
    for index, p in enumerate(params):
        found = index < call  # before it was dropped
        assert torch.equal(p.detach(), torch.full_like(p, -1.0 if found else 0.0))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("call", range(2))
def test_the_state_of_adam_replaced_while_it_is_looked_up(call, stepped, run_in_look_up):
    """What the step has found, or makes, is whole. With gradients of ones every update is of 1, the first or not."""
    params = [param(1000) for _ in range(3)]
    optimizer = fastclip.Adam(params, lr=1.0, betas=(0.5, 0.75), eps=0.0)
    if stepped:
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())  # into another dict: all are looked up anew
    garbage = []

    def drop():
        optimizer.state = collections.defaultdict(dict)
        garbage.extend(torch.full((1000,), 1e9) for _ in range(6))

    run_in_look_up(optimizer, call, drop)
    optimizer.step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -2.0 - stepped))


@pytest.mark.parametrize("call", range(6))
def test_parameters_dropped_while_a_state_is_looked_up(call, run_in_look_up):
    optimizer = fastclip.SGD([param(1000) for _ in range(3)], lr=1.0, momentum=0.9)
    params = optimizer.param_groups[0]["params"]
    memory = [p.detach() for p in params]
    run_in_look_up(optimizer, call, params.clear)
    for index, values in enumerate(memory):
        found = index <= call
        assert torch.equal(values, torch.full_like(values, -1.0 if found else 0.0))


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize(
    "settings", [{"master_weights": True}, {"stochastic_rounding": True}], ids=lambda s: next(iter(s))
)
def test_parameters_without_a_state_dropped_while_it_is_looked_up(settings, call, run_in_look_up):
    """Nothing is made of the parameter that could hold it."""
    optimizer = fastclip.SGD([param(1000) for _ in range(3)], lr=1.0, **settings)
    params = optimizer.param_groups[0]["params"]
    memory = [p.detach() for p in params]
    garbage = []

    def drop():
        params.clear()
        garbage.extend(param(1000) for _ in range(6))

    run_in_look_up(optimizer, call, drop)
    for index, values in enumerate(memory):
        found = index <= call
        assert torch.equal(values, torch.full_like(values, -1.0 if found else 0.0))
    assert all(torch.equal(p, torch.zeros(1000)) and p._version == 0 for p in garbage)


# What happens to the groups, and what is left of a step of two groups.
CHANGES = {
    "another list of parameters": (lambda optimizer, group: group.update(params=[]), [-1, -1]),
    "an emptied list of parameters": (lambda optimizer, group: group["params"].clear(), [0, -1]),
    "another number": (lambda optimizer, group: group.update(lr=1.0, clip_value=4.0, max_norm=1e9), [-1, -1]),
    "a checkpoint loaded": (lambda optimizer, group: optimizer.load_state_dict(optimizer.state_dict()), [-1, -1]),
    "no groups": (lambda optimizer, group: optimizer.param_groups.clear(), [-1, 0]),
}


@pytest.mark.parametrize("name", ["lr", "clip_value", "max_norm"])
@pytest.mark.parametrize("change", CHANGES)
def test_groups_changed_while_a_number_is_read(change, name):
    """The step goes on with what it has found, which nobody else may hold any more."""
    meddle, expected = CHANGES[change]
    params = [param(5), param(5)]
    numbers = {"lr": 1.0, "clip_value": 4.0, "max_norm": 1e9}
    optimizer = fastclip.SGD([{"params": [p]} for p in params], **numbers)
    first = optimizer.param_groups[0]
    first[name] = Number(numbers[name], lambda: meddle(optimizer, first))
    optimizer.param_groups[1][name] = Number(numbers[name], lambda: meddle(optimizer, first))
    optimizer.step()
    assert [p[0].item() for p in params] == expected


# ---- processes ---------------------------------------------------------------------------------


def test_a_forked_child_can_step():
    """As with stock torch: after set_num_threads(1), since OpenMP's threads do not survive a fork."""
    result = run_script("""if True:
        import os, torch, fastclip
        p = torch.zeros(300_000, requires_grad=True)
        opt = fastclip.SGD([p], lr=1.0, momentum=0.9, max_norm=1e9)
        torch.set_num_threads(2)
        p.grad = torch.ones_like(p)
        opt.step()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            opt.step()
            os._exit(0 if torch.allclose(p.detach(), torch.tensor(-2.9)) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert result.stdout == "0\n", result.stderr


def test_data_loader_workers_beside_steps():
    """They are forked between the steps of one thread and in the middle of another's, and step themselves."""
    result = run_script("""if True:
        import threading, torch, fastclip
        from torch.utils.data import DataLoader, Dataset

        SIZE = 300_000

        class StepsInTheWorker(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                p = torch.zeros(SIZE, requires_grad=True)
                p.grad = torch.full_like(p, float(index))
                fastclip.SGD([p], lr=1.0, momentum=0.9, max_norm=1e9).step()
                assert (p == p[0]).all()
                return p[0].item()

        def train(p, optimizer):
            p.grad = torch.ones_like(p)
            optimizer.step()

        torch.set_num_threads(2)
        # The first call of a function of torch's registers something with glibc's atexit, whose lock a child that is
        # forked meanwhile finds locked for good.
        StepsInTheWorker()[1], torch.Generator()
        params = [torch.zeros(SIZE, requires_grad=True) for _ in range(2)]
        optimizers = [fastclip.SGD([p], lr=1.0, max_norm=1e9) for p in params]
        for p, optimizer in zip(params, optimizers):
            train(p, optimizer)
            p.data.zero_()
        stop, steps, batches = threading.Event(), [0, 0], []

        def train_until_stopped():
            while not stop.is_set():
                train(params[1], optimizers[1])
                steps[1] += 1

        thread = threading.Thread(target=train_until_stopped)
        thread.start()
        for epoch in range(2):
            for batch in DataLoader(StepsInTheWorker(), num_workers=2, multiprocessing_context="fork"):
                train(params[0], optimizers[0])
                steps[0] += 1
                batches.append(batch.item())
        stop.set()
        thread.join()
        print(batches, steps[0], all((p == -n).all().item() for p, n in zip(params, steps)), steps[1] > 0)
    """)
    batches = [0.0, -1.0, -2.0, -3.0] * 2
    assert result.stdout == f"{batches} 8 True True\n", result.stdout + result.stderr
