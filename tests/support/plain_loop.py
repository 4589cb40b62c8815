"""The plain loop that the property tests check fastclip against: clips, then torch's optimizer with foreach=False.

Where torch would round differently, `fastclip/plain/step.py` takes the step.
"""

import collections
import math
import warnings
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

import fastclip
from fastclip.plain import limits
from fastclip.plain import step as reference
from fastclip.plain.rounding import SIXTEEN_BIT, state_dtype
from fastclip.settings import OWN_SETTINGS

from .cases import exact_square_roots
from .optimizers import OPTIMIZERS
from .tensors import writable


class PlainLoop:
    """A loop over all groups. The reference steps those in `by_reference`, whose states are in `reference_state`."""

    def __init__(self, rule, shared):
        self.rule, self.shared = getattr(torch.optim, rule), shared
        self.own_rule = getattr(fastclip, rule)._rule
        self.has_state_at_once = OPTIMIZERS[rule].has_state_at_once
        self.of_torch = {"differentiable": False, "decoupled_weight_decay": rule == "AdamW"}
        self.optimizer = None
        self.groups = []  # with all settings, as the reference needs them
        self.by_reference = set()
        self.reference_state = collections.defaultdict(dict)

    def add(self, params, settings):
        group = {**OWN_SETTINGS, **self.of_torch, **settings, **self.shared, "params": params}
        self.groups.append(group)
        rounds = group["momentum_dtype"] or group["stochastic_rounding"]
        self.by_reference.update(p for p in params if rounds or p.dtype in SIXTEEN_BIT)
        of_torch = {"params": params, **without_own(settings)}
        with duplicates_are_meant():
            if self.optimizer is None:
                self.optimizer = self.rule([of_torch], foreach=False)
                self.optimizer.state.clear()
            else:
                self.optimizer.add_param_group(of_torch)
        self.begin_states()

    def set(self, index, changed):
        self.groups[index].update(changed)
        self.optimizer.param_groups[index].update(without_own(changed))

    def states(self, param):
        return self.reference_state if param in self.by_reference else self.optimizer.state

    def state(self, param):
        return self.states(param).get(param, {})

    def cast(self, param, name, dtype):
        """A state, from another dtype than torch keeps it in: so the parameter goes on by reference."""
        if param not in self.by_reference:
            self.reference_state[param] = self.optimizer.state.pop(param)
            self.by_reference.add(param)
        self.reference_state[param][name] = self.reference_state[param][name].to(dtype)

    def reload(self):
        """What loading a file does to states."""
        for group in self.groups:
            for p in group["params"]:
                for name, value in self.reference_state.get(p, {}).items():
                    if name not in self.own_rule.number_states:
                        self.reference_state[p][name] = value.to(state_dtype(self.own_rule, group, p, name))

    def begin_states(self):
        """torch's Adagrad does so in its constructor, by the settings that all groups share: not for a later group, nor
        after a reset."""
        for group in self.groups if self.has_state_at_once else ():
            names = self.own_rule.states(group)
            for p in group["params"]:
                own = self.states(p).setdefault(p, {})
                reference.make_states(self.own_rule, group, p, own, names, counts=True)

    def reset(self, param):
        self.states(param).pop(param, None)

    # ---- a step ----

    def params(self):
        """Those with a gradient; each once, also where a group has it twice."""
        return dict.fromkeys(p for group in self.groups for p in group["params"] if p.grad is not None)

    def finite(self):
        return all(p.grad.isfinite().all() for p in self.params())

    def clipped(self, grad_scale, skip):
        """({parameter: its gradient, unscaled and clamped}, the fraction of elements that were clamped). In a step that
        is to be skipped none are, so that the norm says why."""
        grads = {p: self.unscaled(p, grad_scale) for p in self.params()}
        values, moved, of = dict(grads), 0, 0
        for group in () if skip else filter(reference.clips_value, self.groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                # The bounds are rounded to the gradient's dtype, whatever it is computed in.
                low, high = torch.tensor(reference.bounds(group["clip_value"]), dtype=p.dtype).tolist()
                values[p] = grads[p].clamp(low, high)
                moved += ((grads[p] < low) | (grads[p] > high)).sum().item()
                of += grads[p].numel()
        return values, moved / of if of else 0.0

    def unscaled(self, param, grad_scale):
        """torch's scaler has divided what torch steps on."""
        if grad_scale is None or param not in self.by_reference:
            return param.grad
        return (param.grad.float() if param.dtype in SIXTEEN_BIT else param.grad) * (1 / grad_scale)

    def step(self, values, norm, grad_scale):
        """With what `clipped` has returned, and the norm to clip by or None. Writes gradients."""
        given = {p: p.grad for p in values}
        for p, value in values.items():
            if p in self.by_reference:
                p.grad = None
                continue
            if value is not p.grad:
                p.grad = writable(p.grad).copy_(value)
            for factor in () if norm is None else factors(norm, self.shared["max_norm"]):
                p.grad = writable(p.grad).mul_(factor.to(p.dtype))
        self.begin_states()
        with exact_square_roots():
            self.optimizer.step()
        for p in values:
            p.grad = given[p] if p in self.by_reference else None
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        same_norm = nullcontext() if norm is None else mock.patch.object(limits, "norm_of", lambda *_: norm)
        with same_norm, exact_square_roots():
            reference.step(self.own_rule, self.groups, self.reference_state, scale)


@contextmanager
def duplicates_are_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate")
        yield


def without_own(settings):
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def factors(norm, max_norm):
    """What a norm clip multiplies by: two numbers, of which the first is 1 but for very large norms."""
    value = 1.0 if max_norm == math.inf else max_norm / (norm.item() + 1e-6)
    unit = 2.0**-100 if value < 2.0**-126 and max_norm > 0 and norm < math.inf else 1.0
    if unit != 1:
        value = max_norm / ((norm.item() + 1e-6) * unit)
    return [torch.tensor(number, dtype=torch.float64) for number in (unit, 1.0 if value > 1.0 else value)]


def coefficient(norm, max_norm):
    return math.prod(factors(norm, max_norm))  # as `ClipStats.clip_coefficient`
