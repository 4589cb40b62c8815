"""The base of the optimizers: adds clips to a torch.optim optimizer, and takes its steps in the kernels."""

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from . import amp, counts, deferred
from ._extension import _C
from .arguments import complete_group, complete_params, complete_settings, complete_value, groups_among
from .checkpoints import complete, groups_in_file, is_flat_loader, numbers_in, restore_dtypes
from .distributed import (
    gradients_placed_as,
    is_dtensor,
    process_groups_in,
    reduction_of,
    step_on_shards,
    total_measure,
    who_shares_out,
)
from .double_clip import DoubleClip
from .eager import eager
from .hidden import hide
from .norm_rules import has_rule
from .pieces import Given
from .plain import history
from .plain import step as plain
from .plain.history import HISTORIES
from .plain.masters import undone
from .reasons import name_of, not_shared
from .results import Results
from .settings import OWN_SETTINGS, SCOPED, needs_skip_nonfinite, of_all_gradients, of_whole_gradients, shared_settings


class ClippedOptimizer(Results, torch.optim.Optimizer):
    """Mixed in before an optimizer of `torch.optim`: takes over its `step`, and keeps everything else.

    A subclass names its row of the table in `plain/rules.py` by `_rule`.
    """

    _step_supports_amp_scaling = amp.SupportsAmpScaling()
    _optional = frozenset(OWN_SETTINGS)  # the settings that a checkpoint of others may lack

    def __init_subclass__(cls, **named):
        super().__init_subclass__(**named)
        if cls.__module__.startswith("fastclip."):
            hide(cls)

    def __init__(self, params, *positional, norm_process_group=None, **named):
        self._beyond = process_groups_in(norm_process_group)
        complete_settings(named, named, " in param_groups[0]")
        positional = self._complete_positional(positional)
        params = complete_params(params)
        if any(map(has_rule, [named, *groups_among(params)])):
            named.setdefault("skip_nonfinite", True)  # in all groups, whichever has the rule
        own = {name: named.pop(name) for name in OWN_SETTINGS if name in named}
        self._own_defaults = {**OWN_SETTINGS, **own}
        super().__init__(params, *positional, **named)
        del self._own_defaults  # from now on a new group takes max_norm from the existing ones
        deferred.carry_out_earlier([param for group in self.param_groups for param in group["params"]])

    def _complete_positional(self, values):
        """`values` are what a constructor of ours hands on: those behind `params` in its signature."""
        ours = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("fastclip."))
        names = [*inspect.signature(ours).parameters][1:]
        return [
            complete_value(names[place] if place < len(names) else f"argument {place}", value)
            for place, value in enumerate(values)
        ]

    @property
    def _takes_clips(self):
        """Whether clips can be deferred to its step: not to one in the backward pass, or of a subclass."""
        return self._in_backward is None and type(self).step is ClippedOptimizer.step

    @property
    def param_groups(self):
        """As in torch: a list of dicts, each with its `params` and its settings, those of fastclip among them.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, clip_value=0.01)
            >>> opt.param_groups[0]["clip_value"] = 0.02  # from the next step on
        """
        try:
            groups = self.__dict__["param_groups"]
        except KeyError:
            raise AttributeError("param_groups") from None
        if torch.compiler.is_compiling():  # which traces no frames
            return groups
        frame = sys._getframe(1)
        return groups_in_file(groups, self._optional, frame) if is_flat_loader(frame) else groups

    @param_groups.setter
    def param_groups(self, groups):
        self.__dict__["param_groups"] = groups

    @param_groups.deleter
    def param_groups(self):
        self.__dict__.pop("param_groups", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; it may have a `clip_value` of its own. Refuses bad values.

        Example:
            >>> opt = fastclip.SGD([torch.zeros(3)], clip_value=0.01)
            >>> opt.add_param_group({"params": [torch.zeros(2)], "clip_value": None})
        """
        if "_engine" not in self.__dict__:  # torch's __init__ is at work
            self._start()
            self.defaults.update(self.__dict__.get("_own_defaults", OWN_SETTINGS))
        param_group = complete_group(param_group)
        if isinstance(param_group, dict):
            if not isinstance(param_group["params"], (torch.Tensor, set)):
                param_group["params"] = list(param_group["params"])  # a generator can be read once
            complete_settings(param_group, self.defaults, f" in param_groups[{len(self.param_groups)}]")
            if "_own_defaults" not in self.__dict__ and self.param_groups:  # may have been loaded, or changed
                if not self.param_groups[0].keys() >= OWN_SETTINGS.keys():
                    self._complete(self.param_groups)
                param_group.setdefault("norm_scope", self.param_groups[0]["norm_scope"])
                for name in shared_settings(param_group):
                    param_group.setdefault(name, self.param_groups[0][name])
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._in_backward is not None:
            try:
                self._in_backward.add_group()
            except BaseException:
                self.param_groups.pop()
                raise
        self._given.add(self.param_groups[-1]["params"])

    def _check_group(self, group):
        index = len(self.param_groups)
        params = group["params"] if isinstance(group["params"], (list, set)) else [group["params"]]
        self._engine.check_group({**group, "params": []}, index)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        of_all_ranks, of_whole = of_all_gradients(group), of_whole_gradients(group)
        needs_whole = of_whole or self._rule.needs_whole(group)
        if needs_whole and any(hasattr(p, "_fsdp_flattened") for p in tensors):
            way_out = "its clip_grad_norm_ looks at all shards" if of_whole else "fully_shard keeps the parameters"
            raise TypeError(
                f"{(of_whole or [self._rule.title])[0]} can't be applied to param_groups[{index}]: each rank of "
                f"FullyShardedDataParallel sees its own shard only; {way_out}"
            )
        if of_all_ranks and (zero := who_shares_out()):
            raise TypeError(
                f"{of_all_ranks[0]} can't be applied under {zero}: each rank steps on some of the "
                "parameters only; fastclip.clip_grad_norm_ over all of them, before the step, takes the norm of all"
            )
        for i, tensor in enumerate(tensors):
            if is_dtensor(tensor):
                reduction_of(tensor._spec, name_of(group, index, i))
        if self.param_groups and any(group[name] != self.param_groups[0][name] for name in shared_settings(group)):
            raise not_shared([*self.param_groups, group], index)

    def _start(self):
        """Makes the attributes that are not state, for a new or copied optimizer."""
        self.__dict__.setdefault("_beyond", ())  # whose ranks hold parameters that this one has nothing of
        total = partial(total_measure, beyond=self._beyond) if self._beyond else total_measure
        self._engine = _C.Engine(self._rule.name, reduction_of, total, bool(self._beyond))
        self._given = Given(self._rule)
        self._loading = None
        self._reference_stats = None  # of the last step, if it was in plain torch
        self._reference_measures = None
        self._in_backward = None  # see step_in_backward
        self._reference_skips = 0
        self._warned = set()
        self._deferred = None  # a clip that the next step carries out, see fastclip/deferred.py
        self._drops = 0  # of such clips, in a row
        deferred.enlist(self)
        self._double_clip = DoubleClip()

    def __getstate__(self):
        if self._beyond:
            raise TypeError(
                "an optimizer with a norm_process_group can't be copied or pickled, as the group can't: make another "
                "one with it, and load the state_dict"
            )
        return super().__getstate__()

    def __setstate__(self, state):
        own_groups = self.__dict__.get("param_groups", [])
        with numbers_in(state.get("state", {}), self._rule.number_states):
            super().__setstate__(state)
        if "_engine" not in self.__dict__:  # else a checkpoint is loaded: a CUDA graph may hold memory of the engine's
            self._start()
            for group in self.param_groups:
                self._given.add(group["params"])
        # A checkpoint of plain torch knows of no clip: this optimizer's own settings stay.
        for index, group in enumerate(self.param_groups):
            own = own_groups[index] if index < len(own_groups) else self.defaults
            if "max_norm" in group and "norm_scope" not in group:  # by a fastclip that knew no other scope
                group["norm_scope"] = "global"
                if own.get("norm_scope") != "global":  # limits of this optimizer's own are of something else
                    for name in SCOPED:
                        group.setdefault(name, None)
            complete(group, own)
        if any(map(needs_skip_nonfinite, self.param_groups)):  # a rule of this optimizer's, and the rest the file's
            for group in self.param_groups:
                group["skip_nonfinite"] = True
        if self._loading is not None:
            restore_dtypes(self, self._rule, self._loading)

    def state_dict(self):
        """Returns the state as torch does. Norms that rules remember stand beside the first parameter that has states.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm="quantile")
            >>> torch.save(opt.state_dict(), "optimizer.pt")
        """
        history.settle(self.param_groups, self.state)
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """Loads as torch does, except that states keep the dtypes that this optimizer gives them. torch rounds all
        states to the parameter's dtype: master weights and averages of 16-bit parameters would lose their precision.

        Example:
            >>> opt = fastclip.AdamW(model.bfloat16().parameters(), master_weights=True)
            >>> opt.load_state_dict(torch.load("optimizer.pt"))
        """
        loading = {}  # the state as the last hook leaves it; __setstate__ reads it before other hooks run
        hooks = self._optimizer_load_state_dict_pre_hooks
        outer, self._loading = self._loading, loading  # a hook may load, too
        self._optimizer_load_state_dict_pre_hooks = {**hooks, "last": lambda _, hooked: loading.update(hooked)}
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
            self._loading = outer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. A clip that was deferred to a step that did not come is forgotten.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1)
            >>> opt.zero_grad()
        """
        deferred.forget(self)
        super().zero_grad(set_to_none)

    @eager
    def step(self, *positional: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and updates all parameters that have a gradient; the gradients are left as they are.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss, as in torch; by position or by
                name, and hooks see it as it was given.

        Raises:
            ValueError, TypeError: bad hyperparameters, or a gradient that does not fit its parameter. Nothing was
                changed then.
        """
        # torch wraps every step, to run hooks and to show it in profiles. That costs as much as the whole update of a
        # small model, so it is done only if somebody listens. torch may have wrapped the step of a subclass already.
        listened = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or _C.is_recording()
        ) and not _is_in_hooked_step(self)
        try:
            if not listened and not positional:
                return self._step(closure)
            named = {} if closure is None else {"closure": closure}
            return _hooked_step(self, *positional, **named) if listened else self._step(*positional, **named)
        except BaseException:
            # GradScaler leaves these if a step raises, and would multiply its scale by them at the next try.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    step.hooked = True  # type: ignore[attr-defined]  # tells torch not to wrap it
    step.__signature__ = inspect.signature(torch.optim.Optimizer.step)  # type: ignore[attr-defined]  # (self, closure=None)

    def _step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        grad_scale, found_inf = attributes.get("grad_scale"), attributes.get("found_inf")
        if self._in_backward is not None:
            if found_inf is not None:
                raise RuntimeError(amp.IN_BACKWARD)
            if not self._in_backward.leaves_a_step():
                return loss
        if type(found_inf) is int:  # GradScaler's sum over no gradients at all; other ranks may have some
            found_inf = torch.zeros((), device="cpu")
        groups = attributes["param_groups"]
        self._given.check(groups)
        factor = None
        if self._deferred is not None:
            groups, factor = self._deferred.in_step(groups)
        self._update(groups, grad_scale, found_inf, factor)
        if self._deferred is not None:
            self._deferred.carried_out = True
        if self._double_clip is not None:
            self._double_clip = self._double_clip.look(self)
        return loss

    def _update(self, groups, grad_scale=None, found_inf=None, grad_factor=None):
        """Takes a step over `groups`, which have the form of `param_groups`, without hooks."""
        asked = grad_scale, found_inf, grad_factor
        try:
            not_covered = self._engine.step(groups, self.state, *asked)
        except KeyError:
            if not self._complete(groups):
                raise
            self._given.check(groups)  # which now say whether there is a norm
            not_covered = self._engine.step(groups, self.state, *asked)
        taken = not_covered is None
        self._reference_measures = None
        self._reference_stats = None if taken else self._step_elsewhere(groups, not_covered, *asked)

    def _complete(self, groups):
        """Gives groups that were made by hand, with torch's settings only, the settings that `add_param_group` gives.
        Returns whether there are such groups."""
        own = dict(self.defaults)
        own["norm_scope"] = next((group["norm_scope"] for group in groups if "norm_scope" in group), own["norm_scope"])
        for name in shared_settings(own):
            own[name] = next((group[name] for group in groups if name in group), own[name])
        return any([complete(group, own) for group in groups])

    def _step_elsewhere(self, groups, not_covered, *asked):
        """Takes a step that the kernels did not take: with gradients in the right places, or in plain torch."""
        if not not_covered.misplaced:
            return self._step_in_plain_torch(groups, not_covered.reason, *asked)
        with gradients_placed_as(not_covered.misplaced):
            again = self._engine.step(groups, self.state, *asked)
            if again is None:
                return None
            if again.misplaced:
                raise TypeError(again.reason)
            return self._step_in_plain_torch(groups, again.reason, *asked)

    def _step_in_plain_torch(self, groups, why_not, *asked):
        if why_not not in self._warned and not self.defaults["differentiable"]:
            self._warned.add(why_not)
            warnings.warn(f"fastclip falls back to plain torch (slower): {why_not}", stacklevel=6)
        if (place := undone(groups, self.state)) is not None:
            self._engine.warn_of_undone(name_of(groups[place[0]], *place), 6)
        numbers = (*self._rule.number_states, *HISTORIES)  # no shards
        counts.steps_in_plain_torch += 1
        measures: dict[int, torch.Tensor] = {}
        step = partial(plain.step, self._rule, by_parameter=measures, beyond=self._beyond)
        stats = step_on_shards(step, numbers, groups, self.state, *asked)
        self._reference_measures = measures, groups
        self._reference_skips = stats.skipped_steps + self._reference_skips
        return stats


hide(ClippedOptimizer)
_hooked_step = torch.optim.Optimizer.profile_hook_step(ClippedOptimizer._step)


def _is_in_hooked_step(optimizer):
    """Returns whether torch's wrapper is at work on this optimizer. No mark on a class tells: `functools.wraps` copies
    the marks of a step to a wrapper."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _hooked_step.__code__ and frame.f_locals.get("self") is optimizer:
            return True
        if frame.f_code is ClippedOptimizer._step.__code__ and frame.f_locals.get("self") is optimizer:
            return False  # in a closure of another step
        frame = frame.f_back
    return False
