"""The backward passes of an optimizer: collects gradients, steps on them and frees them."""

import threading
import weakref
from collections import defaultdict
from functools import partial

import torch

from .eager import eager
from .in_backward_checks import check_not_replicated, check_pass
from .in_backward_hooks import Hooks
from .in_backward_stats import StepStats, clips_of, together


class Passes:
    """The passes of one optimizer. Owned by it, and by the object that `step_in_backward` returned for it."""

    def __init__(self, optimizer, bucket_cap_mb):
        self._reference = weakref.ref(optimizer)  # weak: its last owner frees it, not the garbage collector
        self._cap = bucket_cap_mb * 2**20
        self._lock = threading.RLock()  # autograd has a thread for each device; a step may run any Python
        self.accumulating = False
        self._checked = False
        self._last = None  # a weak reference to the last _Pass
        self._steps = []  # the StepStats of each step of this pass but the last
        self._clips = None  # the Clips of the last step; None if it had none
        self._hooks = Hooks(optimizer)
        self._hooks.follow(optimizer.param_groups)
        optimizer._in_backward = self

    @property
    def _optimizer(self):
        return self._reference()

    def remove(self):
        self._hooks.remove()
        optimizer = self._optimizer
        if optimizer._in_backward is self:
            optimizer._reference_stats = self.clip_stats() or optimizer._reference_stats
            optimizer._in_backward = None

    def leaves_a_step(self):
        """Returns whether gradients are left for `optimizer.step()`. Its statistics then replace those of the pass."""
        with self._lock:
            left = self._left(self._optimizer.param_groups)
        if left:
            self._steps.clear()
        return bool(left)

    def clip_stats(self):
        """Returns the ClipStats of the whole pass; None if it took one step, whose statistics the optimizer has."""
        if not self._steps:
            return None
        return together([*self._steps, *self._stats_of_last()], self._optimizer._stats_of_call())

    @property
    def took_several_steps(self):
        return bool(self._steps)

    def _stats_of_last(self):
        """Returns the last step's StepStats in a list, which is empty if it had no clip."""
        return [] if self._clips is None else [StepStats(self._optimizer._stats_of_call(), self._clips)]

    def add_group(self):
        """Hooks the parameters of a new group. Raises before it hooks any."""
        with self._lock:
            self._hooks.follow(self._optimizer.param_groups)

    def gradient_is_ready(self, optimizer, param):
        grad = param.grad
        if self.accumulating or grad is None:
            return
        with self._lock:
            if self._hooks.place_of(param, optimizer.param_groups) is None:
                return
            buckets = self._pass_under_way(optimizer).buckets
            # A gradient may be read on the stream that computed it, and on any stream at the end of the pass.
            stream = torch.cuda.current_stream(param.device) if param.is_cuda else None
            bucket = buckets[stream]
            bucket.parameters.append(param)
            bucket.bytes += grad.numel() * grad.element_size()
            if bucket.bytes >= self._cap:
                self._step_bucket(optimizer, buckets.pop(stream).parameters)

    def _pass_under_way(self, optimizer):
        number = torch._C._current_graph_task_id()
        last = self._last and self._last()
        if last is not None and last.number == number:
            return last
        check_pass(optimizer)
        if not self._checked:
            check_not_replicated(optimizer)
        self._checked = True
        self._steps.clear()
        self._clips = None
        begun = _Pass(number)
        self._last = weakref.ref(begun)
        # Autograd frees the callback when the pass is over, also if it raises. Until then it holds the optimizer.
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, optimizer, begun))
        return begun

    def _step_bucket(self, optimizer, parameters):
        # Each parameter in its place, and nothing in the places of the others: so errors name it as usual.
        nothing = torch.empty(0, device=parameters[0].device)
        places = [(param, self._hooks.place_of(param, optimizer.param_groups)) for param in parameters]
        groups = [{**group, "params": [nothing] * len(group["params"])} for group in optimizer.param_groups]
        placed = [(*place, param) for param, place in places if place is not None]
        for group_index, index, param in placed:
            groups[group_index]["params"][index] = param
        self._step(optimizer, groups, placed)

    @eager
    def _end(self, optimizer, this_pass):
        """Steps on all gradients that are left: in buckets, and from `accumulate` on unused parameters."""
        with self._lock:
            if self._last() is not this_pass or optimizer._in_backward is not self:
                return
            groups = optimizer.param_groups
            left = self._left(groups)
            for _, _, param in left:
                if param.is_cuda:  # freed on this stream, and maybe computed on another
                    param.grad.record_stream(torch.cuda.current_stream(param.device))
            if left:
                self._step(optimizer, groups, left)
            optimizer._opt_called = True  # if not, schedulers warn that step() was never called

    def _left(self, groups):
        """Returns (group, index, parameter) for each gradient. Notices parameters that joined or left the groups."""
        left = [
            (group_index, index, param)
            for group_index, group in enumerate(groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None
        ]
        if not self._hooks.follows(groups, [param for *_, param in left]):
            self._hooks.follow(groups)
        return left

    def _step(self, optimizer, groups, placed):
        """Steps on `placed`, the parameters of `groups` that have a gradient, and frees the gradients."""
        self._steps += self._stats_of_last()
        self._clips = None
        optimizer._update(groups)
        self._clips = clips_of(groups, placed)
        for _, _, param in placed:
            param.grad = None


class _Pass:
    """The record of a backward pass, kept until it is over."""

    def __init__(self, number):
        self.number = number  # autograd's number of the pass
        self.buckets = defaultdict(_Bucket)  # one per stream


class _Bucket:
    """Parameters whose gradients wait to be stepped in one call."""

    def __init__(self):
        self.parameters = []
        self.bytes = 0
