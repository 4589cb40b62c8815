"""Sharded parameters: the norm of one rank's shard is never taken for the norm of the model."""

import subprocess
import sys

import pytest
import torch

import fastclip

from .cases import param

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RANK = """if True:
    import sys
    import torch, fastclip
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(values):
        return distribute_tensor(torch.tensor(values), mesh, [Shard(0)])

    def make(*grad):
        p = torch.nn.Parameter(sharded([0.0] * 4))
        p.grad = sharded([*grad])
        return p

    def whole(tensor):
        return [round(x, 6) for x in tensor.detach().full_tensor().tolist()]

    results = []
    for settings in ({"max_norm": 1.0}, {"skip_nonfinite": True}):
        p = make(3.0, 4.0, 0.0, float("inf"))
        try:
            fastclip.SGD([p], lr=1.0, **settings).step()
        except TypeError as error:
            results.append("parameter 0 of group 0" in str(error) and "DTensor" in str(error))
        results.append(whole(p))
    p = make(3.0, 4.0, 0.0, -12.0)
    fastclip.SGD([p], lr=1.0, clip_value=3.5).step()
    results.append(whole(p))
    norm = fastclip.clip_grad_norm_([p], 6.5)
    results += [norm.full_tensor().item(), whole(p.grad)]
    fastclip.clip_grad_value_([p], 1.75)
    results.append(whole(p.grad))
    print(results)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_a_local_norm_is_not_taken_for_the_norm_of_a_sharded_model(tmp_path):
    """A step refuses a norm, or a verdict, of its shard; a value clip needs none; clip_grad_norm_ takes that of all."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    expected = [True, [0.0] * 4, True, [0.0] * 4]
    expected += [[-3.0, -3.5, 0.0, 3.5], 13.0, [1.5, 2.0, 0.0, -6.0], [1.5, 1.75, 0.0, -1.75]]
    for rank in ranks:
        out, errors = rank.communicate(timeout=120)
        assert out.strip() == str(expected), errors


def test_a_norm_of_the_shards_of_one_rank_is_refused():
    """FullyShardedDataParallel's parameters are plain tensors with a mark."""
    p = param(3)
    p._fsdp_flattened = True
    for settings in ({"max_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} can't be applied to param_groups.0.: each rank"):
            fastclip.SGD([p], lr=0.1, **settings)
    fastclip.SGD([p], lr=1.0, clip_value=0.5).step()
    assert p.tolist() == [-0.5] * 3
