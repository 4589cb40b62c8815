"""Plays a `Scenario` with fastclip and with the plain loop, and compares them after every step.

Bits are the same everywhere: in float32 and float64 as in torch, in 16 bits as in `fastclip/reference.py`. The norm
has to agree with math.hypot to 1e-14; then the loop goes on with fastclip's, so that the rest has to have its bits.
"""

import collections
import copy
import io
import math
import warnings
from contextlib import nullcontext
from unittest import mock

import torch

import fastclip
from fastclip import reference
from fastclip.optimizer import OWN_SETTINGS

from .cases import exact_square_roots
from .scenarios import SIXTEEN_BIT, bits, exact_norm, placed

NORM_TOLERANCE = 1e-14


def check(scenario):
    """Raises AssertionError where fastclip differs."""
    playback = Playback(scenario)
    for number, step in enumerate(scenario.steps):
        for event in step.before:
            getattr(playback, event[0])(*event[1:])
        playback.step(step, f"step {number}, ")


class Playback:
    def __init__(self, scenario):
        self.scenario, self.shared = scenario, scenario.shared
        self.specs, self.ours, self.theirs, self.groups = [], [], [], []
        self.state_16 = collections.defaultdict(dict)
        self.elsewhere = set()  # tensors that the kernels need not take
        self.skipped = 0
        self.ours_of, theirs_of = getattr(fastclip, scenario.optimizer), getattr(torch.optim, scenario.optimizer)
        first = [self.make(group) for group in scenario.groups]
        self.optimizer = self.ours_of([ours for ours, _ in first], **self.shared)
        self.loop = theirs_of([theirs for _, theirs in first], foreach=False)

    def make(self, group):
        """(fastclip's group, torch's)."""
        made = []
        for spec in group.params:
            place = len(self.specs)
            values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
            made.append([placed(values.to(spec.dtype), spec.layout) for _ in range(2)])
            self.specs.append(spec)
            if spec.layout.gap > 1:
                self.elsewhere.add(place)
        ours, theirs = ([(view.requires_grad_(), memory) for view, memory in side] for side in zip(*made, strict=True))
        self.ours += ours
        self.theirs += theirs
        plain = {name: value for name, value in group.settings.items() if name != "clip_value"}
        of_torch = {"differentiable": False, "decoupled_weight_decay": self.scenario.optimizer == "AdamW"}
        self.groups.append(
            {**OWN_SETTINGS, **group.settings, **self.shared, **of_torch, "params": [p for p, _ in theirs]}
        )
        return {"params": [p for p, _ in ours], **group.settings}, {"params": [p for p, _ in theirs], **plain}

    # ---- what happens between steps ----

    def add(self, group):
        ours, theirs = self.make(group)
        self.optimizer.add_param_group(ours)
        self.loop.add_param_group(theirs)

    def set(self, index, changed):
        self.groups[index].update(changed)
        self.optimizer.param_groups[index].update(changed)
        self.loop.param_groups[index].update({k: v for k, v in changed.items() if k != "clip_value"})

    def freeze(self, place):
        for params in (self.ours, self.theirs):
            params[place][0].requires_grad_(False)

    def reload(self, how):
        saved = copy.deepcopy(self.optimizer.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        if how == "torch":  # a checkpoint of plain torch: this optimizer's clips stay
            saved["param_groups"] = [
                {k: v for k, v in group.items() if k not in OWN_SETTINGS} for group in saved["param_groups"]
            ]
        if how in ("fresh", "file"):
            self.optimizer = self.ours_of([{"params": g["params"]} for g in self.optimizer.param_groups], lr=7.0)
            self.skipped = 0  # a new optimizer counts anew
        self.optimizer.load_state_dict(saved)

    # ---- a step ----

    def give_grads(self, step):
        generator = torch.Generator().manual_seed(step.seed)
        grads = []
        for place, spec in enumerate(self.specs):
            values = (step.scale * torch.randn(spec.shape, generator=generator, dtype=torch.float64)).to(spec.dtype)
            layout = (step.layouts or {}).get(place, spec.layout)
            if step.special and step.special[0] == place and values.numel():
                row = values[:1] if layout.expanded else values
                row.view(-1)[step.seed % row.numel()] = step.special[1]
            if place in step.missing:
                self.ours[place][0].grad = self.theirs[place][0].grad = None
                continue
            if (layout.gap, layout.order, layout.expanded) != (1, spec.layout.order, False):
                self.elsewhere.add(place)
            view, memory = placed(values, layout)
            self.ours[place][0].grad = view
            self.theirs[place][0].grad = placed(values, layout)[0]
            grads.append((view, memory, memory.clone()))
        return grads

    def step(self, step, where):
        grads = self.give_grads(step)
        versions = [g._version for g, _, _ in grads]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with exact_square_roots():  # of those that are stepped in plain torch
                self.optimizer.step()
        assert self.elsewhere or not caught, f"{where}the kernels were left: {caught[0].message}"
        assert [g._version for g, _, _ in grads] == versions, f"{where}a gradient's version has moved"
        for gradient, memory, before in grads:
            assert torch.equal(bits(memory), bits(before)), f"{where}a gradient of {tuple(gradient.shape)} was written"
        self.step_the_loop(where)
        self.compare(where)

    def step_the_loop(self, where):
        with_grad = [p for p, _ in self.theirs if p.grad is not None]
        skip = self.shared["skip_nonfinite"] and not all(p.grad.isfinite().all() for p in with_grad)
        self.skipped += skip
        moved, of = 0, 0
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None or skip or not reference.clips_value(group):
                    continue
                clamped = p.grad.clamp(*reference.bounds(group["clip_value"]))
                moved += ((clamped != p.grad) & ~p.grad.isnan()).sum().item()
                of += p.grad.numel()
                p.grad = writable(p.grad).copy_(clamped)
        norm = self.checked_norm([p.grad for p in with_grad], where)
        self.check_stats(norm, moved / of if of else 0.0, skip, where)
        if skip:
            return
        sixteen = {p: p.grad for p in with_grad if p.dtype in SIXTEEN_BIT}
        for p in with_grad:
            if p in sixteen:
                p.grad = None
            elif norm is not None:
                p.grad = writable(p.grad).mul_(coefficient(norm, self.shared["max_norm"]).to(p.dtype))
        with exact_square_roots():
            self.loop.step()
        for p, grad in sixteen.items():
            p.grad = grad
        narrow = [{**g, "params": [p for p in g["params"] if p in sixteen]} for g in self.groups]
        step = reference.step_sgd if isinstance(self.loop, torch.optim.SGD) else reference.step_adam
        same_norm = nullcontext() if norm is None else mock.patch.object(reference, "norm_of", lambda *_: norm)
        with same_norm, exact_square_roots():
            step(narrow, self.state_16)

    def checked_norm(self, grads, where):
        """fastclip's norm, after it was compared with the exact one of clipped gradients."""
        found = self.optimizer.total_norm
        if self.shared["max_norm"] is None:
            assert found is None, f"{where}a norm without max_norm: {found}"
            return None
        assert found.dtype == torch.float64 and found.shape == ()
        exact, value = exact_norm(grads, self.shared["norm_type"]), found.item()
        same = value == exact or (math.isnan(value) and math.isnan(exact))
        assert same or abs(value - exact) <= NORM_TOLERANCE * exact, f"{where}norm {value!r} instead of {exact!r}"
        return found

    def check_stats(self, norm, fraction, skipped, where):
        stats = self.optimizer.clip_stats()
        assert bool(stats.skipped) == skipped and stats.skipped_steps == self.skipped, f"{where}{stats}"
        assert (stats.clamped_fraction is None) == (not any(map(reference.clips_value, self.groups)))
        assert stats.clamped_fraction is None or stats.clamped_fraction.item() == fraction, f"{where}{stats}"
        assert (stats.clip_coefficient is None) == (norm is None)
        if norm is not None:
            expected = coefficient(norm, self.shared["max_norm"])
            assert torch.equal(stats.clip_coefficient, expected) or expected.isnan(), f"{where}{stats}"

    def compare(self, where):
        assert self.optimizer.skipped_steps.item() == self.skipped, f"{where}skipped {self.optimizer.skipped_steps}"
        for place, ((ours, memory), (theirs, expected)) in enumerate(zip(self.ours, self.theirs, strict=True)):
            what = f"{where}parameter {place} {tuple(ours.shape)} {ours.dtype}"
            # The memory of the views, so that the gaps and what is around them count.
            assert torch.equal(bits(memory), bits(expected)), f"{what}: {ours.tolist()} instead of {theirs.tolist()}"
            states = self.state_16 if ours.dtype in SIXTEEN_BIT else self.loop.state
            state, expected = self.optimizer.state.get(ours, {}), states.get(theirs, {})
            assert state.keys() == expected.keys(), f"{what}: state {state.keys()} instead of {expected.keys()}"
            for name in state:
                assert torch.equal(bits(state[name]), bits(expected[name])), f"{name} of {what}"


def writable(grad):
    """An expanded gradient can't be clipped in place, of which torch complains."""
    return grad.clone() if 0 in grad.stride() and grad.numel() > 1 else grad


def coefficient(norm, max_norm):
    if max_norm == math.inf:
        return torch.ones_like(norm)
    value = max_norm / (norm.item() + 1e-6)
    return torch.tensor(1.0 if value > 1.0 else value, dtype=torch.float64)
