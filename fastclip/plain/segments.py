"""The parts of a model that have a norm, and a `max_norm`, of their own: csrc/rules/segment.h in plain torch."""

import math
from functools import partial, reduce

import torch

from .history import CLIP_HISTORIES, NormLimit, find
from .limits import limits_of, scaling_of
from .measure import combined, norm_of
from .values import item_of
from .weighted_clip import MODEL_NORMS, NUMBERS, adopted, coefficient_of_step


class Segment:
    """A group, or one parameter; and what a step finds out about it."""

    def __init__(self, limit, params):
        self.limit = limit
        self.params = params
        self.norm = None
        self.factors = ()


class Segments:
    """All segments of a step; none where `max_norm` is over all gradients, and the rule needs no norm of its own."""

    def __init__(self, rule, groups, state):
        limits = limits_of(groups)
        self.limited = limits.of_segments
        self._norm_type = 2.0 if rule.needs_norm else limits.norm_type
        self.weighted = rule.weight is not None
        used = self.limited or rule.needs_norm
        self._by_group = [self._of_group(rule, group, state) for group in groups if used]
        self._all = [segment for segments in self._by_group for segment in segments]

    def _of_group(self, rule, group, state):
        scope = group["norm_scope"]
        limit = group["max_norm"] if self.limited else None
        by_parameter = scope == "parameter" or rule.needs_norm
        parts = [[param] for param in group["params"]] if by_parameter else [group["params"]]
        return [Segment(NormLimit(limit, CLIP_HISTORIES[scope], state, part), part) for part in parts]

    def __len__(self):
        return len(self._all)

    def sums(self, measures, among, device):
        """Returns the measure of each segment, float64 [3 * segments]; `among` are the parameters that count here."""
        among = {param for param in among if param in measures}
        nothing = torch.zeros(3, dtype=torch.float64, device=device)
        totals = [torch.zeros(0, dtype=torch.float64, device=device)]
        for segment in self._all:
            there = [measures[param].to(device) for param in dict.fromkeys(segment.params) if param in among]
            totals.append(reduce(partial(combined, norm_type=self._norm_type), there, nothing))
        return torch.cat(totals)

    def decide(self, sums):
        """Derives the factors of each segment's clip from its measure."""
        for segment, measure in zip(self._all, sums.view(-1, 3), strict=True):
            segment.norm = norm_of(measure, self._norm_type)
            max_norm = segment.limit.value(segment.norm)
            segment.factors = scaling_of(segment.norm, math.inf if max_norm is None else max_norm)

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
        return torch.stack(
            [math.prod(segment.factors).masked_fill(segment.norm == 0, 1.0) for segment in self._all]
        ).min()

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
