"""Fastclip's optimizer and the plain loop over the same parameters, and what may happen to both between two steps.

The events of a `Scenario` are methods here.
"""

import copy
import io

import torch

import fastclip
from fastclip.settings import OWN_SETTINGS

from . import surroundings
from .plain_loop import PlainLoop, duplicates_are_meant
from .tensors import placed_all


class Sides:
    """`ours` and `theirs` are (tensor, memory) by the parameter's place over all groups."""

    def __init__(self, scenario):
        self.around, self.shared = scenario.around, scenario.shared
        self.specs, self.ours, self.theirs = [], [], []
        self.groups = []  # (the places of its parameters, whether they lie together in memory)
        self.elsewhere = set()  # tensors that the kernels need not take
        self.foreign = {}  # states beside fastclip's
        self.skipped = 0
        self.scalers = surroundings.scalers(self.around.scaler) if self.around.scaler else None
        self.ours_of = surroundings.subclass(getattr(fastclip, scenario.optimizer), self.around.step)
        self.loop = PlainLoop(scenario.optimizer, self.shared)
        first = [self.make(group) for group in scenario.groups]
        with duplicates_are_meant():
            self.optimizer = self.ours_of(first, **self.shared)
        in_form = surroundings.in_form(self.shared, self.around.numbers)
        for index, group in enumerate(scenario.groups):
            self.set_ours(index, group.settings)
            self.optimizer.param_groups[index].update(in_form)

    def make(self, group):
        """Adds a group to the loop, and returns fastclip's."""
        places = range(len(self.specs), len(self.specs) + len(group.params))
        given = [*places] if group.twice is None else [*places, places[group.twice]]
        self.specs += group.params
        values = []
        for place, spec in zip(places, group.params, strict=True):
            of_place = torch.Generator().manual_seed(place)
            values.append(torch.randn(spec.shape, generator=of_place, dtype=torch.float64).to(spec.dtype))
            if spec.layout.gap > 1 or (spec.dtype == torch.float64 and group.settings.get("momentum_dtype")):
                self.elsewhere.add(place)
        if group.twice is not None:
            self.elsewhere.add(given[-1])
        self.groups.append((places, group.together))
        for side in (self.ours, self.theirs):
            made = placed_all(values, [spec.layout for spec in group.params], group.together)
            side += [(surroundings.leaf(view, self.around.params), memory) for view, memory in made]
        self.loop.add([self.theirs[place][0] for place in given], group.settings)
        ours = surroundings.PARAMS[self.around.params](given, [self.ours[place][0] for place in given])
        return {"params": ours, **group.settings}

    # ---- what happens between steps ----

    def add(self, group):
        with duplicates_are_meant():
            self.optimizer.add_param_group(self.make(group))
        self.set_ours(-1, group.settings)

    def set(self, index, changed):
        self.loop.set(index, changed)
        self.set_ours(index, changed)

    def set_ours(self, index, changed):
        """Not in the constructor, where torch compares numbers that know only their float."""
        self.optimizer.param_groups[index].update(surroundings.in_form(changed, self.around.numbers))

    def freeze(self, place):
        for params in (self.ours, self.theirs):
            params[place][0].requires_grad_(False)

    def cast(self, place, which, dtype):
        """A state to another floating-point dtype, if there is one."""
        ours, theirs = self.ours[place][0], self.theirs[place][0]
        state = self.optimizer.state.get(ours, {})
        names = [name for name in self.loop.own_rule.arrays if name in state]
        if not names:
            return
        name = names[which % len(names)]
        state[name] = state[name].to(dtype)
        self.loop.cast(theirs, name, dtype)
        if torch.float64 in (dtype, ours.dtype):
            self.elsewhere.add(place)

    def note(self, place):
        """A state that is not fastclip's, as others leave them there; of values that survive any cast."""
        self.foreign[place] = torch.tensor([0.5, -2.0])
        self.optimizer.state[self.ours[place][0]]["ema"] = self.foreign[place].clone()

    def reload(self, how, hook=None):
        saved = copy.deepcopy(self.optimizer.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=self.around.numbers == "plain")
        if how == "torch":  # a checkpoint of plain torch: this optimizer's clips stay
            saved["param_groups"] = [
                {k: v for k, v in group.items() if k not in OWN_SETTINGS} for group in saved["param_groups"]
            ]
        if how in ("fresh", "file"):
            with duplicates_are_meant():
                self.optimizer = self.ours_of([{"params": g["params"]} for g in self.optimizer.param_groups], lr=7.0)
            self.skipped = 0  # a new optimizer counts from 0
        self.loop.reload()
        handles = []
        if hook == "renamed":
            saved = surroundings.renamed(saved)
            handles.append(self.optimizer.register_load_state_dict_pre_hook(surroundings.named_back))
        elif hook is not None:
            place = hook[1]
            self.loop.reset(self.theirs[place][0])
            self.foreign.pop(place, None)
            handles.append(
                self.optimizer.register_load_state_dict_post_hook(
                    lambda loaded: loaded.state.pop(self.ours[place][0], 0)
                )
            )
        self.optimizer.load_state_dict(saved)
        for handle in handles:
            handle.remove()
