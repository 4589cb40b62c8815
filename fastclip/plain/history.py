"""What the rules among the limits remember, and the limits that follow: csrc/rules/norm_limit.h in plain Python.

A history is a float64 tensor: [norms seen, place of the next one in the ring, mean, variance, 0, 0, 0, 0], and for a
quantile twice its window: the norms in the order of the steps, as a ring, and sorted.
"""

import math

import torch

from ..reasons import no_tensor
from .values import item_of

# Under these names a history stands in the state of one parameter.
CLIP_HISTORY, SKIP_HISTORY = "clip_history", "skip_history"
HISTORIES = {"max_norm": CLIP_HISTORY, "skip_norm": SKIP_HISTORY}
NUMBERS = 8  # before the ring


def find(state, name):
    """Returns the history of this name, and the entry of the state that holds it; (None, None) if there is none."""
    for entry in state.values():
        if isinstance(entry, dict) and entry.get(name) is not None:
            return entry[name], entry
    return None, None


def norms_in(numbers):
    """Returns the norms in a quantile's history, given as a list, the oldest first."""
    seen, following = numbers[:2]
    window = (len(numbers) - NUMBERS) // 2
    ring = numbers[NUMBERS : NUMBERS + window]
    if not seen >= window:  # also NaN
        return ring[: int(max(seen, 0))] if seen > 0 else []
    following = int(following) if 0 <= following < window else 0
    return ring[following:] + ring[:following]


def adopted(history, window, device):
    """Returns a history that fits of one that may not: it is on another device, of another window, of another rule, or
    was rounded to 16 bits by `torch.optim.Optimizer.load_state_dict`. Keeps the newest norms that are norms.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(history, torch.Tensor):
        raise no_tensor("the history of norms in the state", history)
    numbers = history.detach().flatten().double().tolist()
    if not _is_sound(numbers, window):
        numbers = _rebuilt(numbers, window)
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _is_sound(numbers, window):
    if len(numbers) != NUMBERS + 2 * window:
        return False
    seen, following, mean, variance = numbers[:4]
    norms = norms_in(numbers) if window else [mean] * (seen > 0)
    return (
        0 <= seen < math.inf
        and 0 <= variance < math.inf
        and (0 <= following < window or not window)
        and all(0 < norm < math.inf for norm in norms)
        and (not window or numbers[NUMBERS + window :][: len(norms)] == sorted(norms))
    )


def _rebuilt(numbers, window):
    ring = norms_in(numbers) if window and len(numbers) > NUMBERS else []
    ring = [norm for norm in ring if 0 < norm < math.inf][-window:]
    rest = [0.0] * (window - len(ring))
    following = len(ring) % window if window else 0
    return [float(len(ring)), float(following), *[0.0] * (NUMBERS - 2), *ring, *rest, *sorted(ring), *rest]


def level_of(rule, numbers):
    """Returns (center, deviation) of the norms in a history, given as a list; a center of inf during the warm-up."""
    seen, _, mean, variance, *_ = numbers
    if seen < rule["warmup"]:
        return math.inf, 0.0
    if rule["rule"] == "ema":
        return mean, math.sqrt(variance)
    window = rule["window"]
    count = int(min(seen, window))
    norms = numbers[NUMBERS + window :][:count]
    place = rule["q"] * (count - 1)
    below = int(place)
    low, high, weight = norms[below], norms[min(below + 1, count - 1)], place - below
    return low + (high - low) * weight if weight < 0.5 else high - (high - low) * (1 - weight), 0.0


def unbounded_limit(rule, level, norm):
    """Returns the limit for a step with this norm, without floor and ceiling."""
    center, deviation = level
    if rule["rule"] == "quantile":
        return rule["scale"] * center
    above, distance = rule["z"] * deviation, norm - center
    if rule["above"] == "reciprocal" and distance > above:
        above *= above / distance
    return rule["ratio"] * center + above


def limit_of(rule, numbers, norm):
    return min(rule["ceiling"], max(rule["floor"], unbounded_limit(rule, level_of(rule, numbers), norm)))


def push(rule, numbers, norm, leaves_out):
    """Remembers the norm of a step in a history, given as a list. `leaves_out`: the limit is `skip_norm`."""
    if not 0 < norm < math.inf:
        return
    seen, following, mean, variance, *_ = numbers
    if rule["rule"] == "quantile":
        window = rule["window"]
        ring = numbers[NUMBERS : NUMBERS + window]
        ring[int(following)] = norm
        count = int(min(seen + 1, window))
        numbers[:2] = seen + 1, (following + 1) % window
        numbers[NUMBERS:] = [*ring, *sorted(ring[:count]), *[0.0] * (window - count)]
        return
    if seen < rule["warmup"]:
        weight, distance = 1 / (seen + 1), norm - mean
        following_mean = mean + distance * weight
        variance += (distance * (norm - following_mean) - variance) * weight
    else:
        most = unbounded_limit(rule, level_of(rule, numbers), norm)
        if most < (2 * mean if leaves_out else mean):  # it would fall to 0, or might never rise
            most = 2 * mean
        entering, decay = min(norm, most), rule["decay"]
        following_mean = decay * mean + (1 - decay) * entering
        distance = entering - following_mean
        variance = decay * variance + (1 - decay) * (distance * distance)
    if variance < math.inf:
        numbers[0], numbers[2:4] = seen + 1, (following_mean, variance)


class Histories:
    """What a step's rules remember, and the limits that follow."""

    def __init__(self, groups, state, params):
        self._state = state
        self._holder = params[0] if params else next((p for group in groups for p in group["params"]), None)
        self._limits = {name: groups[0][name] for name in HISTORIES} if groups else {}
        self._rules = {name: limit for name, limit in self._limits.items() if isinstance(limit, dict)}
        self._numbers = {name: self._read(name, rule) for name, rule in self._rules.items()}

    def _read(self, name, rule):
        """Returns a history as a list; None where nobody knows its values."""
        window = rule.get("window", 0)
        history, entry = find(self._state, HISTORIES[name])
        if history is None:
            return [0.0] * (NUMBERS + 2 * window)
        if isinstance(history, torch.Tensor) and history.numel() > 0:
            if item_of(history.detach().flatten()[0], unknown=None) is None:
                return None
            if history.dtype == torch.float64 and history.dim() == 1 and _is_sound(history.tolist(), window):
                return history.tolist()
        history = entry[HISTORIES[name]] = adopted(history, window, self._holder.device)
        return history.tolist()

    def limit(self, name, norm):
        """Returns the limit of this name for a step with this norm, a float; None if it is not set."""
        if name not in self._rules:
            return self._limits.get(name)
        norm = item_of(torch.as_tensor(norm), unknown=None)
        known = norm is not None and self._numbers[name] is not None
        rule = self._rules[name]
        return limit_of(rule, self._numbers[name], norm) if known else rule["ceiling"]

    def push(self, norm, stores):
        """Remembers the norm of a step. New histories get into the state where the step `stores` states."""
        number = item_of(norm, unknown=None) if self._rules else None
        for name, rule in self._rules.items():
            numbers = self._numbers[name]
            if numbers is None:
                continue
            if number is not None:
                push(rule, numbers, number, leaves_out=name == "skip_norm")
            history, _ = find(self._state, HISTORIES[name])
            values = torch.tensor(numbers, dtype=torch.float64, device=self._holder.device)
            if history is None and stores:
                self._state[self._holder][HISTORIES[name]] = values
            elif history is not None:
                history.copy_(values)


def settle(groups, state):
    """Lets histories stand where a checkpoint needs them: beside the first parameter of the groups that has states of
    its own. Where none has, all get an entry: `torch.distributed.checkpoint` refuses a file in which some have none."""
    found = {name: find(state, name) for name in HISTORIES.values()}
    found = {name: (history, entry) for name, (history, entry) in found.items() if history is not None}
    params = [param for group in groups for param in group["params"]]
    if not found or not params:
        return
    with_states = [param for param in params if state.get(param, {}).keys() - found.keys()]
    trained = [param for param in params if param.requires_grad] or params
    for param in [] if with_states else trained:
        state.setdefault(param, {})
    holder = state[(with_states or trained)[0]]
    for name, (history, entry) in found.items():
        del entry[name]
        holder[name] = history
    kept = set(map(id, params))
    for param in [p for p, entry in state.items() if entry == {} and id(p) not in kept]:
        del state[param]  # as without a rule: a dropped parameter had no state


def norm_history(groups, state):
    """Returns the norms that the first quantile rule looks at, the oldest first."""
    for name, key in HISTORIES.items():
        if groups and isinstance(groups[0][name], dict) and groups[0][name]["rule"] == "quantile":
            history, _ = find(state, key)
            device = next(p.device for group in groups for p in group["params"])
            norms = [] if history is None else norms_in(history.tolist())
            return torch.tensor(norms, dtype=torch.float64, device=device)
    raise RuntimeError(
        "norm_history needs a fastclip.QuantileNorm as max_norm or skip_norm: other limits keep no norms"
    )
