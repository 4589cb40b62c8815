"""What the rules among the limits remember, and the limits that follow: csrc/rules/norm_limit.h in plain Python.

A history is a float64 tensor: [norms seen, place of the next one in the ring, mean, variance, 0, 0, 0, 0], and for a
quantile twice its window: the norms in the order of the steps, as a ring, and sorted.
"""

import math

import torch

from ..reasons import no_tensor
from .values import item_of
from .weighted_clip import MODEL_NORMS

# Under these names a history stands in the state of a parameter: that of max_norm by its scope.
CLIP_HISTORIES = {"global": "clip_history", "group": "clip_history_of_group", "parameter": "clip_history_of_parameter"}
SKIP_HISTORY = "skip_history"
HISTORIES = (*CLIP_HISTORIES.values(), SKIP_HISTORY, MODEL_NORMS)
NUMBERS = 8  # before the ring


def find(state, name, among=None):
    """Returns the history of this name, and the entry of the state that holds it; (None, None) if there is none.
    `among` are the parameters beside which it may stand; None: any."""
    for entry in state.values() if among is None else (state.get(param) for param in among):
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


class NormLimit:
    """A limit on a norm: a number, or a rule and what it remembers in the state.

    Args:
        limit (float, dict or None): None if it is not set.
        name (str): of the history in the state.
        state (dict): of the optimizer.
        params (list): the parameters that have the norm. The history stands beside the first that has a gradient.
        anywhere (bool): the norm is that of all, and a history beside any parameter is its own.
        leaves_out (bool): the limit is `skip_norm`.
    """

    def __init__(self, limit, name, state, params, anywhere=False, leaves_out=False):
        self._limit, self._name, self._state, self._leaves_out = limit, name, state, leaves_out
        self._holder = next((p for p in params if p.grad is not None), next(iter(params), None))
        self._among = None if anywhere else params
        self._has_grad = anywhere or getattr(self._holder, "grad", None) is not None
        self._numbers = self._read(limit.get("window", 0)) if self._is_rule else None

    @property
    def _is_rule(self):
        return isinstance(self._limit, dict)

    def _read(self, window):
        """Returns a history as a list; None where nobody knows its values."""
        history, entry = find(self._state, self._name, self._among)
        if history is None:
            return [0.0] * (NUMBERS + 2 * window)
        if isinstance(history, torch.Tensor) and history.numel() > 0:
            if item_of(history.detach().flatten()[0], unknown=None) is None:
                return None
            if history.dtype == torch.float64 and history.dim() == 1 and _is_sound(history.tolist(), window):
                return history.tolist()
        history = entry[self._name] = adopted(history, window, self._holder.device)
        return history.tolist()

    def value(self, norm):
        """Returns the limit for a step with this norm, a float; None if it is not set."""
        if not self._is_rule:
            return self._limit
        norm = item_of(torch.as_tensor(norm), unknown=None)
        known = norm is not None and self._numbers is not None
        return limit_of(self._limit, self._numbers, norm) if known else self._limit["ceiling"]

    def push(self, norm, stores):
        """Remembers the norm of a step. A new history gets into the state where the step `stores` states."""
        if self._numbers is None or self._holder is None:
            return
        number = item_of(norm, unknown=None)
        if number is not None:
            push(self._limit, self._numbers, number, self._leaves_out)
        history, _ = find(self._state, self._name, self._among)
        values = torch.tensor(self._numbers, dtype=torch.float64, device=self._holder.device)
        # A state is not begun for what has no gradient, here or on other ranks.
        if history is None and stores and (self._has_grad or (number or 0) > 0):
            self._state[self._holder][self._name] = values
        elif history is not None:
            history.copy_(values)


def settle(groups, state):
    """Lets histories stand where a checkpoint needs them: one of several parameters beside the first of them that has
    states of its own."""
    params = [param for group in groups for param in group["params"]]
    if not any(isinstance(entry, dict) and entry.keys() & {*HISTORIES} for entry in state.values()) or not params:
        return
    # Where none has states, all get an entry: `torch.distributed.checkpoint` refuses a file in which some have none.
    if not any(state.get(param, {}).keys() - {*HISTORIES} for param in params):
        for param in [param for param in params if param.requires_grad] or params:
            state.setdefault(param, {})
    for name in (CLIP_HISTORIES["global"], SKIP_HISTORY):
        _settle(name, params, state, None)
    for group in groups:
        for name in (CLIP_HISTORIES["group"], MODEL_NORMS):
            _settle(name, group["params"], state, group["params"])
    kept = set(map(id, params))
    for param in [p for p in state if id(p) not in kept]:  # as without a rule: a dropped parameter had no state
        entry = state[param]
        for name in entry.keys() & {*HISTORIES} if isinstance(entry, dict) else ():
            del entry[name]
        if entry == {}:
            del state[param]


def _settle(name, params, state, among):
    history, entry = find(state, name, among)
    if history is None:
        return
    with_states = [param for param in params if state.get(param, {}).keys() - {*HISTORIES}]
    with_entries = [param for param in params if param in state]
    del entry[name]
    state[(with_states or with_entries or params)[0]][name] = history


def norm_history(groups, state):
    """Returns the norms that the first quantile rule looks at, the oldest first."""
    scope = groups[0]["norm_scope"] if groups else "global"
    names = {"max_norm": CLIP_HISTORIES["global"] if scope == "global" else None, "skip_norm": SKIP_HISTORY}
    for setting, name in names.items():
        if name and groups and isinstance(groups[0][setting], dict) and groups[0][setting]["rule"] == "quantile":
            history, _ = find(state, name)
            device = next(p.device for group in groups for p in group["params"])
            norms = [] if history is None else norms_in(history.tolist())
            return torch.tensor(norms, dtype=torch.float64, device=device)
    raise RuntimeError(
        "norm_history needs a fastclip.QuantileNorm as skip_norm, or as max_norm over all gradients: other limits keep "
        "no norms, or several lists"
    )
