"""Steps in the backward pass: each gradient is clipped, applied and freed soon after autograd has computed it."""

import threading
import weakref
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import torch

from .checks import name_of
from .eager import eager
from .in_backward_checks import check_arguments, check_not_replicated, check_parameter, check_pass
from .reference import clips_value

_in_use = weakref.WeakSet()  # every StepInBackward


def step_in_backward(model, optimizer, *, bucket_cap_mb=4.0):
    """Lets `backward()` update the parameters, and free each gradient as soon as it was used.

    After each backward pass parameters and state are, to the bit, as after `optimizer.step()` and
    `optimizer.zero_grad()`; no more gradients than `bucket_cap_mb` and one were in memory at a time. `step()` and
    `zero_grad()` may stay in the training loop, and find nothing to do. Schedulers, checkpoints and groups work as
    ever, and `clip_stats()` is about the whole pass.

    What it can't do: `max_norm`, `skip_nonfinite` and `GradScaler` need all gradients first. What changes gradients
    between `backward()` and `step()` (a trainer's clip, an all-reduce, hooks of `step`) comes too late; hooks of a
    tensor come in time. A second pass through a graph of updated parameters raises: add the losses up instead. A pass
    that raises may have updated some parameters. Passes in several threads at once must be of different optimizers.
    `torch.compile` hands over all gradients of a graph at once: the same bits, and no memory saved; its compiled
    autograd, an option of it, raises.

    Args:
        model (torch.nn.Module): holds all parameters of the optimizer. Those that the optimizer does not hold keep
            their gradients, as ever.
        optimizer (fastclip.SGD): any of fastclip's. Keep it for as long as the model is trained.
        bucket_cap_mb (float): gradients of so many MiB are collected and stepped in one call, which takes less time
            than a call each. 0 for a call each.

    Returns:
        StepInBackward: to accumulate gradients, and to go back to ordinary steps; also a context manager.

    Raises:
        ValueError: `max_norm` or `skip_nonfinite` is set, now or (raised in `backward()`) later; the optimizer is not
            the model's; a parameter is stepped in the backward pass by another optimizer; a negative bucket_cap_mb.
        TypeError: parameters of `DistributedDataParallel` or `FullyShardedDataParallel`, DTensors; an optimizer with a
            `step` of its own.
        RuntimeError: in `backward()`: `create_graph=True`, a reentrant `torch.utils.checkpoint`; in `step()`:
            `GradScaler`, when the first pass has stepped on scaled gradients already.

    Sources: torch's tutorial "How to save memory by fusing the optimizer step into the backward pass"; LOMO, Lv et al.
    (2023), https://arxiv.org/abs/2306.09782.

    Example:
        >>> opt = fastclip.SGD(model.parameters(), lr=0.01, momentum=0.9, clip_value=0.01)
        >>> fastclip.step_in_backward(model, opt)
        >>> model(x).square().sum().backward()  # and that was the step
    """
    check_arguments(model, optimizer, bucket_cap_mb)
    for index, group in enumerate(optimizer.param_groups):
        _check_group(group, index)
    return StepInBackward(optimizer, bucket_cap_mb)


class StepInBackward:
    """What `fastclip.step_in_backward` returns.

    Example:
        >>> with fastclip.step_in_backward(model, opt) as in_backward:
        ...     with in_backward.accumulate():
        ...         model(x1).sum().backward()  # adds to the gradients
        ...     model(x2).sum().backward()  # steps on their sum
    """

    def __init__(self, optimizer, bucket_cap_mb):
        self._optimizer = optimizer
        self._cap = bucket_cap_mb * 2**20
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._accumulating = False
        self._passes = 0
        self._pass = None  # autograd's number of the pass under way; where one raises, nothing tells that it is over
        self._buckets = defaultdict(_Bucket)  # of each stream
        self._clamped = []  # of the steps of this pass but the last: (fraction, of how many elements)
        self._clampable = 0  # elements under a value clip in the last one
        self._hooks = {}  # parameter: (handle, weak reference)
        optimizer._in_backward = self
        _in_use.add(self)
        for group_index in range(len(optimizer.param_groups)):
            self._hook_group(group_index)

    @contextmanager
    def accumulate(self):
        """Within it, backward passes add to the gradients and update nothing. The next pass outside of it, or
        `optimizer.step()`, takes the step on the sums.

        All gradients are in memory from one pass to the next: that is what adding them up costs.

        Example:
            >>> with in_backward.accumulate():
            ...     (loss(x1) / 2).backward()
            >>> (loss(x2) / 2).backward()
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self):
        """From now on only `optimizer.step()` steps. Gradients that are there stay. May be called twice.

        Example:
            >>> fastclip.step_in_backward(model, opt).remove()
        """
        for hook, _ in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._optimizer._in_backward is self:
            self._optimizer._reference_stats = self.clip_stats() or self._optimizer._reference_stats
            self._optimizer._in_backward = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def leaves_a_step(self):
        """Whether there are gradients for `optimizer.step()`, whose statistics are then the last ones."""
        left = any(param.grad is not None for group in self._optimizer.param_groups for param in group["params"])
        if left:
            self._clamped.clear()
        return left

    def clip_stats(self):
        """ClipStats of the whole pass; None where it took one step, which the optimizer knows of."""
        if not self._clamped:
            return None
        last = self._optimizer._stats_of_call()
        device = last.skipped.device
        steps = [*self._clamped, (last.clamped_fraction, self._clampable)] if self._clampable else self._clamped
        clamped = sum((fraction * count).round().to(device) for fraction, count in steps)
        return last._replace(clamped_fraction=clamped / sum(count for _, count in steps))

    def add_group(self, group_index):
        """A group that was added to the optimizer; raises before anything is hooked."""
        _check_group(self._optimizer.param_groups[group_index], group_index)
        self._hook_group(group_index)

    def _hook_group(self, group_index):
        for index, param in enumerate(self._optimizer.param_groups[group_index]["params"]):
            self._hook(group_index, index, param)

    def _hook(self, group_index, index, param):
        if not (param.is_floating_point() or param.is_complex()):
            return  # never has a gradient
        frozen = not param.requires_grad
        if frozen:  # it may be thawed later, and autograd takes no hook for one that is frozen
            param.requires_grad_(True)
        # The garbage collector does not see what autograd's hooks hold: a strong reference would keep the optimizer and
        # the model forever.
        ready = partial(_gradient_is_ready, weakref.ref(self), group_index, index)
        # torch.utils.swap_tensors would take the hook away, and refuses a tensor that is referred to weakly.
        self._hooks[param] = param.register_post_accumulate_grad_hook(ready), weakref.ref(param)
        if frozen:
            param.requires_grad_(False)

    def _gradient_is_ready(self, group_index, index, param):
        grad = param.grad
        if self._accumulating or grad is None:
            return
        with self._lock:
            self._begin(torch._C._current_graph_task_id())
            groups = self._optimizer.param_groups  # anew: load_state_dict replaces them
            params = groups[group_index]["params"] if group_index < len(groups) else []
            if index >= len(params) or params[index] is not param:
                return  # the groups were rearranged: it is stepped where the pass ends
            # A gradient may be read on the stream it was computed on; at the end of the pass, on any.
            stream = torch.cuda.current_stream(param.device) if param.is_cuda else None
            bucket = self._buckets[stream]
            bucket.parameters.append((group_index, index, param))
            bucket.bytes += grad.numel() * grad.element_size()
            if bucket.bytes >= self._cap:
                self._step_bucket(self._buckets.pop(stream).parameters)

    def _begin(self, this_pass):
        if self._pass == this_pass:
            return
        check_pass(self._optimizer)
        if self._passes == 0:
            check_not_replicated(self._optimizer)
        self._buckets.clear()
        self._clamped.clear()
        self._clampable = 0
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, this_pass))
        self._pass = this_pass
        self._passes += 1

    def _step_bucket(self, parameters):
        # Each in its place and nothing in the others', so that errors name it as ever.
        nothing = torch.empty(0, device=parameters[0][2].device)
        groups = [{**group, "params": [nothing] * len(group["params"])} for group in self._optimizer.param_groups]
        for group_index, index, param in parameters:
            groups[group_index]["params"][index] = param
        self._step(groups, parameters)

    @eager
    def _end(self, this_pass):
        """Steps on all that is left: buckets, and what `accumulate` has left on parameters that this pass left out."""
        with self._lock:
            if self._pass != this_pass or self._optimizer._in_backward is not self:
                return
            self._buckets.clear()
            groups = self._optimizer.param_groups
            left = [
                (group_index, index, param)
                for group_index, group in enumerate(groups)
                for index, param in enumerate(group["params"])
                if param.grad is not None
            ]
            for _, _, param in left:
                if param.is_cuda:  # freed on this stream, and maybe computed on another
                    param.grad.record_stream(torch.cuda.current_stream(param.device))
            if left:
                self._step(groups, left)
            self._optimizer._opt_called = True  # else schedulers warn that step() was never called

    def _step(self, groups, parameters):
        """Steps on `parameters`, all of `groups` that have a gradient, and frees these."""
        if self._clampable:
            self._clamped.append((self._optimizer._stats_of_call().clamped_fraction, self._clampable))
            self._clampable = 0
        self._optimizer._update(groups)
        clips = [clips_value(group) for group in groups]
        self._clampable = sum(param.numel() for group_index, _, param in parameters if clips[group_index])
        for _, _, param in parameters:
            param.grad = None


class _Bucket:
    """Parameters whose gradients wait to be stepped in one call."""

    def __init__(self):
        self.parameters = []  # (group, index, parameter)
        self.bytes = 0


@eager
def _gradient_is_ready(reference, group_index, index, param):
    in_backward = reference()
    if in_backward is not None:
        in_backward._gradient_is_ready(group_index, index, param)
    elif not _is_stepped(param):
        raise RuntimeError(
            "the optimizer of step_in_backward is gone, so that nothing updates this model: keep a reference to it"
        )


def _is_stepped(param):
    return any(param in in_backward._hooks for in_backward in _in_use)


def _check_group(group, group_index):
    for index, param in enumerate(group["params"]):
        check_parameter(param, group, group_index, index)
        if _is_stepped(param):
            where = name_of(group, group_index, index)
            raise ValueError(f"{where} is stepped in the backward pass by another optimizer")
