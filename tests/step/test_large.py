"""Tensors of more than 2**31 elements, on the CPU, in a few megabytes: its pages are the same ones over and over."""

import ctypes
import math
import mmap
import os
import sys

import pytest
import torch

import fastclip
from fastclip.plain import rounding

NUMEL = 2**31 + 5001
PIECE = 2 << 20  # bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memfd_create")


class Repeated:
    """A bfloat16 tensor of many elements, all zero: one piece of memory for its start, one for its end, and one that
    is mapped again and again in between. Nobody may touch what lies before and behind."""

    NOWHERE = 16 << 30

    def __init__(self, numel):
        length = -(-numel * 2 // PIECE) * PIECE
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.size = length + 2 * self.NOWHERE
        no_reserve, fixed = 0x4000, 0x10
        self.reserved = self.map(None, self.size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve, -1)
        files = [os.memfd_create(name) for name in ("start", "middle", "end")]
        for file in files:
            os.ftruncate(file, PIECE)
        start, last = self.reserved + self.NOWHERE, length - PIECE
        for at in range(0, length, PIECE):
            file = files[(at > 0) + (at == last)]
            self.map(start + at, PIECE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, file)
        for file in files:
            os.close(file)
        memory = (ctypes.c_char * (numel * 2)).from_address(start)
        self.tensor = torch.frombuffer(memory, dtype=torch.bfloat16)

    def map(self, *arguments):
        address = self.libc.mmap(*arguments, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return address

    def unmap(self):
        self.libc.munmap(self.reserved, self.size)


@pytest.fixture
def repeated():
    made = []

    def make(numel=NUMEL):
        made.append(Repeated(numel))
        return made[-1].tensor

    yield make
    for memory in made:
        memory.unmap()


def ends(tensor):
    """All that is there to be looked at: the start, what is repeated, the end."""
    size = PIECE // 2
    return tensor[:size], tensor[size : 2 * size], tensor[tensor.numel() // size * size :]


def test_more_than_2_to_the_31_elements(repeated):
    """Written at both ends; the update is one that gives the same however often it is repeated: p - (g + p)."""
    p, grad = repeated(), repeated()
    for part in ends(grad):
        part.fill_(1)
    p.requires_grad_().grad = grad
    optimizer = fastclip.SGD([p], lr=1.0, weight_decay=1.0, clip_value=2.0, max_norm=math.sqrt(NUMEL) / 2)
    optimizer.step()
    assert optimizer.total_norm.item() == pytest.approx(math.sqrt(NUMEL), rel=1e-12)
    for part in ends(p.detach()):
        assert part.numel() > 0 and (part == -0.5).all()
    fastclip.clip_grad_value_([p], 0.25)
    for part in ends(grad):
        assert (part == 0.25).all()
    assert fastclip.clip_grad_norm_([p], math.inf).item() == pytest.approx(math.sqrt(NUMEL) / 4, rel=1e-6)


def test_adamw_on_more_than_2_to_the_31_elements(repeated):
    """As above: with nothing left of what was, all are written the same however often."""
    p, grad, exp_avg, exp_avg_sq = (repeated() for _ in range(4))
    for part in ends(grad):
        part.fill_(2)
    for part in ends(p):
        part.fill_(1)
    p.requires_grad_().grad = grad
    optimizer = fastclip.AdamW([p], lr=1.0, betas=(0.0, 0.0), weight_decay=1.0, clip_value=0.5)
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.step()
    for part in ends(exp_avg):
        assert part.numel() > 0 and (part == 0.5).all()
    for part in ends(exp_avg_sq):
        assert (part == 0.25).all()
    for part in ends(p.detach()):
        assert (part == -1).all()  # 0 · p - gradient / |gradient|
    assert optimizer.state[p]["step"] == 1


def test_rounding_at_random_beyond_2_to_the_32_elements(repeated, monkeypatch):
    """The random numbers are others than those of the first elements, as in plain torch."""
    p, grad = (repeated(2**32 + 5001) for _ in range(2))
    end = ends(grad)[2].copy_(torch.randn(5001))
    p.requires_grad_().grad = grad
    fastclip.SGD([p], lr=0.3, stochastic_rounding=True, rounding_seed=3).step()
    monkeypatch.setattr(rounding, "_places", lambda tensor: 2**32 + torch.arange(tensor.numel()))
    expected, change = torch.empty_like(end), -0.3 * end.float()
    group = {"stochastic_rounding": True, "rounding_seed": 3}
    rounding.Rounding(group, 0, torch.tensor(1.0)).store(0, expected, change)
    assert torch.equal(ends(p.detach())[2], expected)
    assert not torch.equal(expected, change.bfloat16())
