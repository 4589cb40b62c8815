"""Plays a `Scenario` with fastclip and with the plain loop, and compares them after every step.

Bits are the same everywhere: as in torch, or where torch rounds differently as in `fastclip/plain/step.py`. The norm
has to agree with math.hypot to 1e-14; then the loop goes on with fastclip's, so that the rest has to have its bits.
"""

import math
import warnings
from types import SimpleNamespace

import torch

from fastclip.plain import step as reference

from . import surroundings
from .cases import exact_square_roots
from .plain_loop import coefficient
from .sides import Sides
from .tensors import bits, exact_norm, flushed, placed_all

NORM_TOLERANCE = 1e-14


def check(scenario):
    """Raises AssertionError where fastclip differs."""
    playback = Playback(scenario)
    for number, step in enumerate(scenario.steps):
        for event in step.before:
            getattr(playback, event[0])(*event[1:])
        playback.step(step, f"step {number}, ")


class Playback(Sides):
    def scaled(self, step):
        """Whether the step goes through a scaler: None, "in place" where that writes to gradients, or "by the step"."""
        dtypes = {spec.dtype for place, spec in enumerate(self.specs) if place not in step.missing}
        if not (step.scaled and dtypes):  # torch's raises where there are no gradients
            return None
        # torch's refuses to unscale float16 in place.
        left = self.around.scaler == "torch's" and (torch.float16 in dtypes or not step.unscale)
        return "by the step" if left else "in place"

    def give_grads(self, step, scale):
        """[(gradient, its memory, what that was)] of fastclip's parameters."""
        generator = torch.Generator().manual_seed(step.seed)
        wanted = {}
        for place, spec in enumerate(self.specs):
            values = step.scale * torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            values = (scale * values).to(spec.dtype)
            layout = (step.layouts or {}).get(place, spec.layout)
            if step.special and step.special[0] == place and values.numel():
                row = values[:1] if layout.expanded else values
                row.view(-1)[step.seed % row.numel()] = step.special[1]
            self.ours[place][0].grad = self.theirs[place][0].grad = None
            if place not in step.missing:
                wanted[place] = values, layout
        grads = []
        for places, together in self.groups:
            there = [place for place in places if place in wanted]
            values, layouts = zip(*(wanted[place] for place in there), strict=True) if there else ((), ())
            made = [placed_all(values, layouts, together) for _ in (self.ours, self.theirs)]
            for place, layout, (view, memory), (theirs, _) in zip(there, layouts, *made, strict=True):
                if (layout.gap, layout.order, layout.expanded) != (1, self.specs[place].layout.order, False):
                    self.elsewhere.add(place)
                self.ours[place][0].grad, self.theirs[place][0].grad = view, theirs
                grads.append((view, memory, memory.clone()))
        return grads

    def step(self, step, where):
        scaled = self.scaled(step)
        grads = self.give_grads(step, self.scalers[0].get_scale() if scaled else 1.0)
        versions = [gradient._version for gradient, _, _ in grads]
        last = self.optimizer.clip_stats()
        called = self.step_ours(step, scaled, where)
        if scaled != "in place":
            assert [g._version for g, _, _ in grads] == versions, f"{where}a gradient's version has moved"
            for gradient, memory, before in grads:
                assert torch.equal(bits(memory), bits(before)), f"{where}a gradient of {[*gradient.shape]} was written"
        taken = self.step_theirs(step, scaled, where)
        if not taken:
            self.check_left_out(last, where)
        hooks = ["global pre", "pre", "post", "global post"]
        calls = taken or self.around.scaler == "torch's"  # which leaves it to the step to do nothing
        assert called == (hooks if self.around.hooks and calls else []), f"{where}hooks: {called}"
        self.compare(where)

    def step_ours(self, step, scaled, where):
        """Returns the hooks that ran."""
        scaler = self.scalers[0] if scaled else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with (
                surroundings.listened_to(self.optimizer, self.around) as called,
                exact_square_roots(),  # of those that are stepped in plain torch
                surroundings.mode(self.around),
            ):
                if scaler is None:
                    self.optimizer.step()
                else:
                    scaler.verdict = step.verdict
                    if step.unscale and scaled == "in place":
                        scaler.unscale_(self.optimizer)
                    scaler.step(self.optimizer)
                    scaler.update()
        assert self.elsewhere or not caught, f"{where}the kernels were left: {caught[0].message}"
        return called

    def step_theirs(self, step, scaled, where):
        """Returns whether the scaler, if there is one, lets the loop step."""
        if not scaled:
            self.step_the_loop(None, where)
            return True
        scaler, taken = self.scalers[1], []
        scale = scaler.get_scale() if scaled == "by the step" else None
        # torch's divides a gradient twice if its parameter is given twice. fastclip's step does not.
        groups = self.loop.groups if scale is None else [{"params": [*self.loop.params()]}]
        given = {p: p.grad.clone() for p in self.loop.by_reference if p.grad is not None}
        loop = SimpleNamespace(param_groups=groups, step=lambda: taken.append(self.step_the_loop(scale, where)))
        with surroundings.mode(self.around):
            scaler.unscale_(loop)
        if scale is None:
            for (ours, _), (theirs, _) in zip(self.ours, self.theirs, strict=True):
                same = ours.grad is None or torch.equal(bits(ours.grad), bits(theirs.grad))
                assert same, f"{where}a scaler has unscaled to {ours.grad} instead of {theirs.grad}"
        else:
            for p, grad in given.items():
                p.grad = grad
        scaler.verdict = step.verdict
        scaler.step(loop)
        scaler.update()
        scales = [scaler.state_dict() for scaler in self.scalers]
        assert scales[0] == scales[1], f"{where}scales {scales}"
        return bool(taken)

    def step_the_loop(self, grad_scale, where):
        skip = self.shared["skip_nonfinite"] and not self.loop.finite()
        with surroundings.mode(self.around):
            values, fraction = self.loop.clipped(grad_scale, skip)
        self.skipped += skip
        norm = self.checked_norm(values.values(), where)
        self.check_stats(norm, fraction, skip, where)
        if not skip:
            with surroundings.mode(self.around):
                self.loop.step(values, norm, grad_scale)

    def check_left_out(self, last, where):
        """After a step that a scaler did not take: torch's leaves it to the step to say so, others do not call it."""
        if self.around.scaler == "torch's":
            self.skipped += 1
            norm = None if self.shared["max_norm"] is None else torch.tensor(math.inf, dtype=torch.float64)
            assert norm is None or torch.equal(self.optimizer.total_norm, norm), f"{where}{self.optimizer.total_norm}"
            self.check_stats(norm, 0.0, True, where)
        else:
            stats = self.optimizer.clip_stats()
            assert all(a is b or torch.equal(bits(a), bits(b)) for a, b in zip(last, stats, strict=True)), where

    def checked_norm(self, grads, where):
        """fastclip's norm, after it was compared with the exact one of clipped gradients."""
        found = self.optimizer.total_norm
        if self.shared["max_norm"] is None:
            assert found is None, f"{where}a norm without max_norm: {found}"
            return None
        assert found.dtype == torch.float64 and found.shape == ()
        seen = map(flushed, grads) if self.around.flush else grads
        exact, value = exact_norm(seen, self.shared["norm_type"]), found.item()
        same = value == exact or (math.isnan(value) and math.isnan(exact))
        assert same or abs(value - exact) <= NORM_TOLERANCE * exact, f"{where}norm {value!r} instead of {exact!r}"
        return found

    def check_stats(self, norm, fraction, skipped, where):
        stats = self.optimizer.clip_stats()
        assert bool(stats.skipped) == skipped and stats.skipped_steps == self.skipped, f"{where}{stats}"
        assert (stats.clamped_fraction is None) == (not any(map(reference.clips_value, self.loop.groups)))
        expected = None if norm is None else coefficient(norm, self.shared["max_norm"])
        # Gradients that such a coefficient makes 0 in any case are 0 in the units in which they are clamped.
        counted = norm is None or not (0 < expected < 2.0**-126)
        if stats.clamped_fraction is not None and counted:
            assert stats.clamped_fraction.item() == fraction, f"{where}{stats} instead of {fraction}"
        assert (stats.clip_coefficient is None) == (norm is None)
        if norm is not None:
            assert torch.equal(stats.clip_coefficient, expected) or expected.isnan(), f"{where}{stats}"

    def compare(self, where):
        assert self.optimizer.skipped_steps.item() == self.skipped, f"{where}skipped {self.optimizer.skipped_steps}"
        for place, ((ours, memory), (theirs, expected)) in enumerate(zip(self.ours, self.theirs, strict=True)):
            what = f"{where}parameter {place} {tuple(ours.shape)} {ours.dtype}"
            # The memory of the views, so that the gaps and what is around them count.
            assert torch.equal(bits(memory), bits(expected)), f"{what}: {ours.tolist()} instead of {theirs.tolist()}"
            state, expected = dict(self.optimizer.state.get(ours, {})), self.loop.state(theirs)
            if place in self.foreign:
                noted = state.pop("ema", None)
                assert noted is not None and noted.tolist() == self.foreign[place].tolist(), f"{what}: ema {noted}"
            if self.loop.has_state_at_once and not state.get("step", 0) and not expected.get("step", 0):
                continue  # made by the constructor or by the first step: tests/drop_in/test_state.py
            assert state.keys() == expected.keys(), f"{what}: state {state.keys()} instead of {expected.keys()}"
            for name in state:
                assert state[name].dtype == expected[name].dtype, f"{name} of {what}: {state[name].dtype}"
                a, b = state[name], expected[name]
                # torch's first buffer is a copy of the gradient, fastclip's is computed: flushed. The next step takes
                # both for 0.
                if self.around.flush and name == "momentum_buffer":
                    a, b = flushed(a), flushed(b)
                assert torch.equal(bits(a), bits(b)), f"{name} of {what}"
