"""Python that runs while a step looks at DTensors, as another thread's may: what was found stays, or is missed."""

import copy

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastclip
from tests.support.cases import assert_same_bits


@pytest.fixture
def dtensor():
    """Makes DTensors of 64 equal elements, all on this rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda value: distribute_tensor(torch.full((64,), float(value)), mesh, [Shard(0)])
    torch.distributed.destroy_process_group()


class Placements(tuple):
    """Runs something, once, when they are compared."""

    __slots__ = ()
    meanwhile = []

    def __eq__(self, other):
        if self.meanwhile:
            self.meanwhile.pop()()
        return True

    __hash__ = tuple.__hash__


def when_compared(tensor, meanwhile):
    tensor._spec = copy.copy(tensor._spec)  # the same one is known to be equal
    object.__setattr__(tensor._spec, "placements", Placements(tensor._spec.placements))
    Placements.meanwhile[:] = [meanwhile]
    return tensor


def test_a_gradient_replaced_while_it_is_clipped(dtensor):
    p, q = (torch.nn.Parameter(dtensor(0)) for _ in range(2))
    found, other = dtensor(1), dtensor(5)
    versions = found._version, other._version

    def replace():
        p.grad = other

    p.grad, q.grad = when_compared(found, replace), dtensor(3)
    fastclip.clip_grad_value_([p, q], 0.5)
    assert p.grad is other and other._version == versions[1] and other.to_local()[0] == 5
    assert found._version > versions[0] and found.to_local()[0] == q.grad.to_local()[0] == 0.5


def test_a_state_that_goes_away_while_another_is_compared(dtensor):
    p, q = (torch.nn.Parameter(value) for value in (dtensor(1), torch.ones(64)))
    optimizers = [fastclip.AdamW([x], lr=0.1, clip_value=0.5) for x in (p, q)]
    p.grad, q.grad = dtensor(1), torch.ones(64)
    for optimizer in optimizers:
        optimizer.step()
    state = optimizers[0].state[p]
    freed = []

    def pop():
        del state["exp_avg_sq"]
        freed.extend(torch.full((64,), 1e9) for _ in range(100))

    when_compared(state["exp_avg"], pop)
    for optimizer in optimizers:
        optimizer.step()
    assert not Placements.meanwhile and "exp_avg_sq" not in state
    assert_same_bits([p.to_local()], [q])


@pytest.mark.parametrize("of", ["parameter", "state"])
def test_a_tensor_swapped_for_another_is_noticed(dtensor, of):
    p, q = (torch.nn.Parameter(dtensor(0)) for _ in range(2))
    optimizer = fastclip.SGD([p, q], lr=0.1, momentum=0.9, clip_value=0.5)
    p.grad, q.grad = dtensor(1), dtensor(1)
    optimizer.step()
    before = [x.to_local().clone() for x in (p, q)]
    found = p if of == "parameter" else optimizer.state[p]["momentum_buffer"]

    def swap():
        torch.utils.swap_tensors(found._local_tensor, found._local_tensor.clone())

    q.grad = when_compared(dtensor(1), swap)
    with pytest.raises(RuntimeError, match="a tensor was swapped for another while the optimizer stepped"):
        optimizer.step()
    assert_same_bits([x.to_local() for x in (p, q)], before)
