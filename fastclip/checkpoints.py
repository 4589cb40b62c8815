"""Loading checkpoints: keeps the dtypes of states, and the settings that a file lacks."""

from contextlib import contextmanager

import torch

from .plain import quantized
from .plain.history import HISTORIES, NUMBERS, adopted
from .plain.quantized import CODES, SCALES
from .plain.rounding import state_dtype
from .plain.weighted_clip import MODEL_NORMS
from .settings import OWN_SETTINGS


def complete(group, own):
    """Gives a group the settings that it lacks, from `own`. Returns whether it lacked any."""
    missing = {name: own.get(name, none) for name, none in OWN_SETTINGS.items() if name not in group}
    group.update(missing)
    return bool(missing)


@contextmanager
def numbers_in(states, names):
    """Gives each of these dicts numbers of these names, for a `with` block. torch's optimizers look for them when they
    load or copy, even in a dict that holds only states of others."""
    missing = [
        (entry, name) for entry in states.values() if isinstance(entry, dict) for name in names if name not in entry
    ]
    for entry, name in missing:
        entry[name] = torch.zeros(())
    try:
        yield
    finally:
        for entry, name in missing:
            del entry[name]


def restore_dtypes(optimizer, rule, state_dict):
    """Gives states that were just loaded the dtypes in which the optimizer makes them. torch has cast them to the
    parameters' dtypes; `state_dict` holds them as they were."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    pairs = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    for key, (group, param) in zip(saved, pairs, strict=True):
        loaded = optimizer.state.get(param, {})
        for name, value in state_dict["state"].get(key, {}).items():
            if name == MODEL_NORMS and isinstance(value, torch.Tensor):
                loaded[name] = value.to(loaded[name].device, torch.float64)
                continue
            if name.endswith((CODES, SCALES)) and isinstance(value, torch.Tensor):
                loaded[name] = value.to(loaded[name].device)
                continue
            if name in HISTORIES and isinstance(value, torch.Tensor):
                window = max(value.numel() - NUMBERS, 0) // 2
                loaded[name] = adopted(value, window, loaded[name].device)
                continue
            if name != "step" and isinstance(loaded.get(name), torch.Tensor) and value.is_floating_point():
                is_number = name in rule.number_states  # which torch keeps in float32 or float64
                dtype = value.dtype if is_number else state_dtype(rule, group, param, name)
                dtype = torch.float32 if is_number and dtype.itemsize < 4 else dtype  # an average would stand still
                if loaded[name].dtype != dtype:
                    loaded[name] = value.to(device=loaded[name].device, dtype=dtype)
        quantized.adapt(rule, group, param, loaded)


def is_flat_loader(frame):
    """Returns whether this is the frame in which torch.distributed.checkpoint reads a flattened optimizer."""
    return frame.f_code.co_name == "_unflatten_optim_state_dict"


def groups_in_file(groups, optional, frame):
    """Returns the groups without the `optional` settings that the file lacks: the file is from plain torch, or from a
    fastclip that had fewer. The loader raises KeyError for each key of a group that is not in the file. Later,
    `load_state_dict` keeps the optimizer's own settings."""
    state_dict, names = frame.f_locals["state_dict"], frame.f_locals["info"].fqn_param_mapping

    def is_saved(group, setting):
        keys = (f"param_groups.{name}.{setting}" for param in group["params"] for name in names[param])
        return setting not in optional or any(key in state_dict for key in keys)

    return [{key: value for key, value in group.items() if is_saved(group, key)} for group in groups]
