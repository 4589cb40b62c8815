"""Notices writes to parameters that have master weights, for plain torch; csrc/host/masters.h does for the kernels."""

import torch

from ..distributed import local_of
from .rounding import has_master
from .values import item_of


def undone(groups, state):
    """Returns (group, index) of the first parameter that somebody wrote to, and that its master weights change back; or
    None.

    Looks at this rank's shard of a sharded parameter only: other ranks may not ask.
    """
    for group_index, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            entry = state.get(param) if has_master(group, param) and param.grad is not None else None
            master = entry.get("master_param") if isinstance(entry, dict) else None
            if isinstance(master, torch.Tensor) and master.shape == param.shape:
                here, rounded = local_of(param).detach(), local_of(master).to(param.dtype)
                if not item_of(torch.isclose(rounded, here, rtol=0, atol=0, equal_nan=True).all(), unknown=True):
                    return group_index, index
    return None
