"""Devices and seeds for all tests."""

import signal

import pytest
import torch

NO_GPU = "needs a GPU that this torch can use"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return request.param


@pytest.fixture(autouse=True)
def seed_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal: a shell ignores it for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_silent_fallback(request, recwarn):
    """A step that leaves the kernels without being meant to would make a test of the kernels worthless."""
    yield
    if "falls_back" not in request.keywords:
        slow = [w for w in recwarn if "plain torch" in str(w.message)]
        assert not slow, f"the step left the kernels: {slow[0].message}"
