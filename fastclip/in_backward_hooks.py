"""The hooks of `step_in_backward`, on the parameters that its optimizer holds."""

import weakref

from .eager import eager
from .in_backward_checks import check_parameter
from .reasons import name_of

_REMOVE = "call remove() on what step_in_backward returned"


class Hooks:
    """The callable that autograd calls when a gradient is ready. It hands the gradient to the passes of `optimizer`.

    Parameters own their hooks, and so this object. It refers to parameters and optimizer weakly: the garbage collector
    does not look into autograd's hooks, and would free neither.
    """

    def __init__(self, optimizer):
        self._optimizer = weakref.ref(optimizer)
        self._hooked = {}  # id of a parameter: (handle, weak reference)
        self._places = {}  # id of a parameter: (group, index), its last place

    @eager
    def __call__(self, param):
        optimizer = self._optimizer()
        if optimizer is None:
            self.remove()
            raise RuntimeError(
                "the optimizer of step_in_backward is gone, and nothing has updated this model: keep a reference to it "
                "or to what step_in_backward returned. This is told once: another optimizer may take over from now on, "
                f"after zero_grad(). To drop an optimizer on purpose, {_REMOVE}"
            )
        if optimizer._in_backward is not None:
            optimizer._in_backward.gradient_is_ready(optimizer, param)

    def follow(self, groups):
        """Hooks the parameters of `groups`, and lets go of those that have left. Raises before it hooks any."""
        placed = [(g, i, param) for g, group in enumerate(groups) for i, param in enumerate(group["params"])]
        self._check_each_is_there_once(groups, placed)
        new = [place for place in placed if not self._has(place[2])]
        for group_index, index, param in new:
            check_parameter(param, groups[group_index], group_index, index)
            _take_over(param, name_of(groups[group_index], group_index, index))
        try:
            for _, _, param in new:
                self._hook(param)
        except BaseException:
            for _, _, param in new:
                self._let_go(id(param))
            raise
        self._places = {id(param): (group_index, index) for group_index, index, param in placed}
        for key in self._hooked.keys() - self._places.keys():
            self._let_go(key)

    def _check_each_is_there_once(self, groups, placed):
        places = {id(param): place for *place, param in placed}
        for *place, param in placed:
            if places[id(param)] != place:
                raise ValueError(
                    f"step_in_backward can't step {name_of(groups[place[0]], *place)}: it is given twice, and ordinary "
                    "steps update it twice by one gradient. Give it once, as model.parameters() does"
                )

    def follows(self, groups, params):
        """Returns whether no parameter has left or joined `groups`. Looks only at `params`, some of their
        parameters."""
        return len(self._places) == sum(len(group["params"]) for group in groups) and all(map(self._has, params))

    def place_of(self, param, groups):
        """Returns (group, index) of a hooked parameter; None if it has left `groups`."""
        group_index, index = self._places.get(id(param), (len(groups), 0))
        params = groups[group_index]["params"] if group_index < len(groups) else []
        if index >= len(params) or params[index] is not param:
            self.follow(groups)
        return self._places.get(id(param))

    def remove(self):
        for key in list(self._hooked):
            self._let_go(key)

    def _has(self, param):
        _, reference = self._hooked.get(id(param), (None, None))
        return reference is not None and reference() is param  # ids are reused

    def _hook(self, param):
        if not (param.is_floating_point() or param.is_complex()):
            return  # never has a gradient
        frozen = not param.requires_grad
        if frozen:  # it may be thawed later, and autograd hooks no frozen parameter
            param.requires_grad_(True)
        # torch.utils.swap_tensors would take the hook away, but it refuses a tensor with a weak reference.
        self._hooked[id(param)] = param.register_post_accumulate_grad_hook(self), weakref.ref(param)
        if frozen:
            param.requires_grad_(False)

    def _let_go(self, key):
        handle, _ = self._hooked.pop(key, (None, None))
        if handle is not None:
            handle.remove()

    def _steps(self, param):
        optimizer = self._optimizer()
        return optimizer is not None and any(param is p for group in optimizer.param_groups for p in group["params"])


def _take_over(param, where):
    """Removes the hooks of optimizers that are gone, or that the parameter has left."""
    hooks = (param._post_accumulate_grad_hooks or {}).values()
    for other in [hook for hook in hooks if isinstance(hook, Hooks)]:
        if other._steps(param):
            raise ValueError(
                f"{where} is stepped in the backward pass by another optimizer: {_REMOVE} for that one, or drop both"
            )
        other._let_go(id(param))
