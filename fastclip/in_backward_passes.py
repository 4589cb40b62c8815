"""The backward passes of an optimizer: collects gradients, steps on them and frees them."""

import threading
import weakref
from collections import defaultdict
from functools import partial

import torch

from .eager import eager
from .in_backward_checks import check_not_replicated, check_pass
from .in_backward_hooks import Hooks
from .plain.step import clips_value


class Passes:
    """The passes of one optimizer. Owned by it, and by the object that `step_in_backward` returned for it."""

    def __init__(self, optimizer, bucket_cap_mb):
        self._reference = weakref.ref(optimizer)  # weak: its last owner frees it, not the garbage collector
        self._cap = bucket_cap_mb * 2**20
        self._lock = threading.RLock()  # autograd has a thread for each device; a step may run any Python
        self.accumulating = False
        self._checked = False
        self._last = None  # a weak reference to the last _Pass
        self._clamped = []  # each step of this pass but the last: (fraction, number of elements)
        self._clampable = 0  # elements under a value clip in the last step
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
            self._clamped.clear()
        return bool(left)

    def clip_stats(self):
        """Returns the ClipStats of the whole pass; None if it took one step, whose statistics the optimizer has."""
        if not self._clamped:
            return None
        last = self._optimizer._stats_of_call()
        device = last.skipped.device
        steps = [*self._clamped, (last.clamped_fraction, self._clampable)] if self._clampable else self._clamped
        clamped = sum((fraction * count).round().to(device) for fraction, count in steps)
        return last._replace(clamped_fraction=clamped / sum(count for _, count in steps))

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
        self._clamped.clear()
        self._clampable = 0
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
        if self._clampable:
            self._clamped.append((optimizer._stats_of_call().clamped_fraction, self._clampable))
            self._clampable = 0
        optimizer._update(groups)
        clips = [clips_value(group) for group in groups]
        self._clampable = sum(param.numel() for group_index, _, param in placed if clips[group_index])
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
