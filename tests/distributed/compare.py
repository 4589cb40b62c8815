"""Sharded models beside whole ones: made, given the same gradients, and compared."""

import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import fastclip
from tests.support.cases import Loop

place = SimpleNamespace(device_type="cpu", folder=None)  # set by the worker
CASES = {}  # by name: (function, numbers of ranks)
CLIPS = [
    {},
    {"clip_value": 0.01},
    {"max_norm": 0.5},
    {"max_norm": 0.1, "norm_type": math.inf},
    {"clip_value": 0.01, "max_norm": 0.02, "skip_nonfinite": True},
]


def on_ranks(*world_sizes):
    """Marks a case, and on how many ranks it is run."""

    def add(case):
        CASES[case.__name__] = (case, world_sizes)
        return case

    return add


@on_ranks()
def passes():
    pass


@on_ranks()
def fails_on_rank_1():
    assert dist.get_rank() != 1, "as it has to"


def line():
    return init_device_mesh(place.device_type, (dist.get_world_size(),))


def square():
    return init_device_mesh(place.device_type, (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))


def loop_of(params, clip, optimizer=torch.optim.SGD, **rule):
    """The plain loop with the same clip."""
    params = list(params)
    loop = Loop(params, {k: v for k, v in clip.items() if k != "skip_nonfinite"}, lr=0.1)
    loop.optimizer = optimizer(params, foreach=False, **rule)
    return loop


def batch(step, *shape):
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(place.device_type)


def mine(whole):
    """This rank's rows of a batch."""
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_on_all_ranks(tensor):
    """To the bit."""
    bits = tensor.detach().double().reshape(1).view(torch.int64).to(place.device_type)
    gathered = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, bits)
    assert len({int(b) for b in gathered}) == 1, [b.view(torch.float64).item() for b in gathered]


def assert_same_model(params, plain_params, rtol=1e-12):
    for index, (p, q) in enumerate(zip(params, plain_params, strict=True)):
        torch.testing.assert_close(
            whole(p).detach(), q.detach(), rtol=rtol, atol=rtol, msg=lambda m, i=index: f"parameter {i}: {m}"
        )


def assert_state_is_placed_as_parameters(optimizer):
    for p, state in optimizer.state.items():
        for value in state.values():
            if isinstance(p, DTensor) and value.dim() > 0:
                assert isinstance(value, DTensor) and value.dtype == value._local_tensor.dtype
                assert (value.shape, value.placements) == (p.shape, p.placements)
                assert value.device_mesh == p.device_mesh


def assert_same_stats(optimizer, norm, clip):
    """The norm of the whole model, and all that is decided by it, on all ranks."""
    if "max_norm" not in clip:
        assert optimizer.total_norm is None
        return
    stats = optimizer.clip_stats()
    torch.testing.assert_close(stats.total_norm, norm.to(stats.total_norm), rtol=1e-12, atol=0)
    for value in (stats.total_norm, stats.clip_coefficient, stats.skipped, stats.skipped_steps):
        assert_same_on_all_ranks(value)


class Sharded:
    """Parameters that are placed in different ways, beside whole ones: `give_grads` gives both the same gradients."""

    def __init__(self, *placed, dtype=torch.float64):
        """Each of `placed`: (shape, mesh or None for a plain tensor, placements)."""
        self.placed = placed
        torch.manual_seed(2)
        self.plain = [nn.Parameter(torch.randn(shape, dtype=dtype, device=place.device_type)) for shape, *_ in placed]
        self.params = [
            nn.Parameter(self._place(p.detach(), *how[1:])) for p, how in zip(self.plain, placed, strict=True)
        ]

    def _place(self, tensor, mesh=None, placements=None):
        return tensor.clone() if mesh is None else distribute_tensor(tensor.clone(), mesh, placements)

    def give_grads(self, step, scale=1.0):
        torch.manual_seed(10 + step)
        for p, q, how in zip(self.params, self.plain, self.placed, strict=True):
            q.grad = (scale * torch.randn(q.shape, dtype=torch.float64, device=place.device_type)).to(q.dtype)
            p.grad = self._place(q.grad, *how[1:])

    def assert_steps_agree(self, clips=CLIPS, rtol=1e-12, scale=1.0, **rule):
        rule = {"lr": 0.1, "momentum": 0.9, **rule}
        for clip in clips:
            optimizer = fastclip.SGD(self.params, **rule, **clip)
            loop = loop_of(self.plain, clip, **rule)
            for step in range(2):
                self.give_grads(step, scale)
                before = [whole(p.grad).clone() for p in self.params]
                optimizer.step()
                assert all(torch.equal(whole(p.grad), b) for p, b in zip(self.params, before, strict=True))
                assert_same_stats(optimizer, loop.step(), clip)
            assert_same_model(self.params, self.plain, rtol)
            assert_state_is_placed_as_parameters(optimizer)
