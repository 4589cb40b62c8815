"""Checkpoints of icefall's ScaledAdam: the states of all parameters of one dtype and shape are one tensor, which stands
beside the first of them."""

import torch

from .plain.weighted_clip import MODEL_NORMS, NUMBERS


def batches(params):
    """Returns the places of parameters that icefall updates together, in its order."""
    found = {}
    for place, param in enumerate(params):
        found.setdefault((str(param.dtype), *param.shape), []).append(place)
    return [found[key] for key in sorted(found)]


def taken_apart(state_dict, groups):
    """Returns a checkpoint of icefall's with a state for each parameter; any other one as it is."""
    states, saved = state_dict["state"], state_dict["param_groups"]
    if not any("delta" in entry and "sizes" not in entry for entry in states.values()):
        return state_dict
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return state_dict  # which torch refuses
    apart = {}
    for of_file, group in zip(saved, groups, strict=True):
        keys, params = of_file["params"], group["params"]
        period = int(of_file["size_update_period"])
        for order, batch in enumerate(batches(params)):
            entry = states.get(keys[batch[0]])
            if not entry:
                continue
            for i, place in enumerate(batch):
                apart.setdefault(keys[place], {}).update(_one_of(entry, i, params[place], period))
            if order == 0 and "model_norms" in entry:
                apart.setdefault(keys[0], {})[MODEL_NORMS] = _memory_of(entry)
    return {**state_dict, "state": apart}


def _one_of(entry, i, param, period):
    row = torch.zeros(2 + period)
    if param.numel() != 1:
        row[0] = entry["param_rms"][i].flatten()[0]
        row[1] = entry["scale_exp_avg_sq"][i].flatten()[0]
        row[2:] = entry["scale_grads"][:, i].flatten()
    arrays = {name: entry[name][i].clone() for name in ("delta", "exp_avg_sq")}
    return {"step": torch.tensor(float(entry["step"])), "sizes": row, **arrays}


def _memory_of(entry):
    norms = entry["model_norms"].detach().double().cpu()
    numbers = [float(entry.get("model_norm_threshold", 0.0)), float(entry.get("num_clipped", 0)), 0.0, 0.0]
    return torch.cat([torch.tensor(numbers, dtype=torch.float64), norms])


def put_together(state_dict, groups):
    """Returns a checkpoint as icefall loads it.

    Raises:
        ValueError: parameters of a shape have taken different numbers of steps.
    """
    states, together = state_dict["state"], {}
    for of_file, group in zip(state_dict["param_groups"], groups, strict=True):
        keys, params = of_file["params"], group["params"]
        memory = next((states[key][MODEL_NORMS] for key in keys if MODEL_NORMS in states.get(key, {})), None)
        for order, batch in enumerate(batches(params)):
            entries = [states.get(keys[place], {}) for place in batch]
            if not any("step" in entry for entry in entries):
                continue
            counts = {int(entry["step"]) if "step" in entry else 0 for entry in entries}
            if len(counts) > 1:
                raise ValueError(
                    f"parameters of shape {[*params[batch[0]].shape]} have taken {sorted(counts)} steps, and icefall "
                    "counts them together"
                )
            entry = _all_of(entries, params[batch[0]])
            entry["step"] = counts.pop()
            if order == 0 and memory is not None:
                entry["model_norms"] = memory[NUMBERS:].float()
                if memory[0] != 0:
                    entry["model_norm_threshold"] = float(memory[0])
                    entry["num_clipped"] = int(memory[1])
            together[keys[batch[0]]] = entry
    return {**state_dict, "state": together}


def _all_of(entries, param):
    found = {name: torch.stack([entry[name] for entry in entries]) for name in ("delta", "exp_avg_sq")}
    if param.numel() != 1:
        rows = torch.stack([entry["sizes"].to(param.device).float() for entry in entries])
        ones = [1] * param.dim()
        found["param_rms"] = rows[:, 0].reshape(-1, *ones)
        found["scale_exp_avg_sq"] = rows[:, 1].reshape(-1, *ones)
        found["scale_grads"] = rows[:, 2:].T.reshape(-1, len(entries), *ones)
    return found
