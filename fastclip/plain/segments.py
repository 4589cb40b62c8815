"""The parts of a model that have a norm, and limits on it, of their own: csrc/rules/segment.h in plain torch."""

import math
from functools import partial, reduce

import torch

from .history import CLIP_HISTORIES, NormLimit, find
from .limits import limits_of, scaling_of, scaling_of_change, smaller, smallest_norm
from .measure import combined, measure_of, norm_of
from .values import item_of
from .weighted_clip import MODEL_NORMS, NUMBERS, adopted, coefficient_of_step


class Segment:
    """A group, or one parameter; and what a step finds out about it."""

    def __init__(self, limit, group, params, change):
        self.limit = limit
        self.group = group
        self.params = params
        self.change_of_norm = change  # that a gradient of norm 1 makes in the end; None if that is not limited
        self.norm = None
        self.change = 0.0  # after the limits on it
        self.factors = ()

    def decide(self, norm, of_params, smallest):
        """Derives the factors of the clip from the norms of the gradients, and of the parameters where that counts."""
        self.norm = norm
        max_norm = self.limit.value(norm)
        self.factors = scaling_of(norm, math.inf if max_norm is None else max_norm)
        if self.change_of_norm is None:
            return
        change = torch.zeros_like(norm) if self.change_of_norm == 0 else norm * self.change_of_norm
        self.factors = smaller(self.factors, scaling_of_change(self.group, change, of_params, smallest))
        self.change = change * math.prod(self.factors)


class Segments:
    """All segments of a step; none where `max_norm` is over all gradients, and the rule needs no norm of its own."""

    def __init__(self, rule, groups, state):
        limits = limits_of(rule, groups)
        self.limited = limits.of_segments
        self.of_params = self.limited and any(group["max_relative_change"] is not None for group in groups)
        self._norm_type = 2.0 if rule.needs_norm else limits.norm_type
        self.weighted = rule.weight is not None
        used = self.limited or rule.needs_norm
        self._by_group = [self._of_group(rule, group, state) for group in groups if used]
        self._all = [segment for segments in self._by_group for segment in segments]
        self.limits_change = any(segment.change_of_norm is not None for segment in self._all)

    def _of_group(self, rule, group, state):
        scope = group["norm_scope"]
        limit = group["max_norm"] if self.limited else None
        limits_change = group["max_change"] is not None or group["max_relative_change"] is not None
        change = rule.change(group) if self.limited and limits_change and rule.change is not None else None
        by_parameter = scope == "parameter" or rule.needs_norm
        parts = [[param] for param in group["params"]] if by_parameter else [group["params"]]
        return [Segment(NormLimit(limit, CLIP_HISTORIES[scope], state, part), group, part, change) for part in parts]

    def __len__(self):
        """The number of the sums."""
        return len(self._all) * (6 if self.of_params else 3)

    def sums(self, measures, counted, among, device):
        """Returns the measure of the gradients of each segment, and behind all of them that of its parameters where
        that counts, float64 [3 * segments] or [6 * segments].

        Args:
            measures (dict): of gradients, by parameter.
            counted (dict or None): the values of parameters, see `limits.counted_params`.
            among (list): the parameters that count here.
        """
        among = dict.fromkeys(among)
        of_params = {}
        if self.of_params:
            of_params = {p: measure_of([counted[p]], self._norm_type, device) for p in among if p in counted}
        nothing = torch.zeros(3, dtype=torch.float64, device=device)
        totals = [torch.zeros(0, dtype=torch.float64, device=device)]
        for measured in (measures, of_params) if self.of_params else (measures,):
            for segment in self._all:
                params = dict.fromkeys(segment.params)
                there = [measured[param].to(device) for param in params if param in among and param in measured]
                totals.append(reduce(partial(combined, norm_type=self._norm_type), there, nothing))
        return torch.cat(totals)

    def decide(self, sums, counted, numels):
        """Derives the factors of each segment's clip from its sums. `counted` as in `sums`; `numels` has the sizes of
        sharded parameters."""
        norms = [norm_of(measure, self._norm_type) for measure in sums.view(-1, 3)]
        of_params = norms[len(self._all) :] or [None] * len(self._all)
        for segment, norm, size in zip(self._all, norms[: len(self._all)], of_params, strict=True):
            params = [param for param in dict.fromkeys(segment.params) if param in (counted or ())]
            segment.decide(norm, size, smallest_norm(params, numels, self._norm_type))

    def change(self):
        """Returns the change of all segments together, after all limits."""
        changes = torch.stack([torch.as_tensor(segment.change, dtype=torch.float64) for segment in self._all])
        return torch.linalg.vector_norm(changes, self._norm_type)

    def of(self, group, index):
        """Returns the segment of a parameter, by the place of the parameter; None if there is none."""
        if not self._all:
            return None
        segments = self._by_group[group]
        return segments[index if len(segments) > 1 else 0]

    def factors(self, group, index):
        """Returns the factors of a parameter's gradient."""
        segment = self.of(group, index)
        return () if segment is None else segment.factors

    def norm_after(self, group, index, decision):
        """Returns the norm of a parameter's gradient after all clips; None if it has no segment."""
        segment = self.of(group, index)
        return None if segment is None else segment.norm * math.prod((*decision.factors, *segment.factors))

    def smallest_coefficient(self):
        """Returns the factor of the segment that is scaled down the most. One of zeros is not."""
        factors = [math.prod(segment.factors).masked_fill(segment.norm == 0, 1.0) for segment in self._all]
        return torch.stack(factors).min() if factors else 1.0

    def clip_groups(self, rule, groups, state, decision):
        """Takes the clip that the rule has of its own, of each group."""
        for index, group in enumerate(groups):
            stepped = [(i, param) for i, param in enumerate(group["params"]) if param.grad is not None]
            scale, period = group["clipping_scale"], int(group["clipping_update_period"])
            if not scale or not stepped:
                continue
            square = 0.0
            for i, param in stepped:
                row = state.get(param, {}).get(rule.scalar[0])
                size = 0.0 if row is None else item_of(row.flatten()[0], unknown=0.0)
                norm = item_of(self.norm_after(index, i, decision), unknown=0.0)
                square += (norm * rule.weight(group, param, size)) ** 2
            first = stepped[0][1]
            step = int(item_of(state.get(first, {}).get("step", torch.zeros(())), unknown=0))
            memory, entry = find(state, MODEL_NORMS, group["params"])
            device = first.device
            fits = torch.zeros(NUMBERS + period) if memory is None else adopted(memory, period, "cpu")
            numbers = fits.tolist()
            coefficient = coefficient_of_step(scale, period, numbers, step, math.sqrt(square))
            (state[first] if entry is None else entry)[MODEL_NORMS] = torch.tensor(
                numbers, dtype=torch.float64, device=device
            )
            for i, _ in stepped:
                segment = self.of(index, i)
                segment.factors = (*segment.factors, torch.tensor(coefficient, dtype=torch.float64, device=device))

    def push(self, stores):
        """Remembers the norm of each segment."""
        for segment in self._all:
            segment.limit.push(segment.norm, stores)
