"""Steps in the backward pass: each gradient is clipped, applied and freed soon after autograd has computed it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .in_backward_checks import check_arguments
from .in_backward_passes import Passes


def step_in_backward(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, bucket_cap_mb: float = 4.0
) -> "StepInBackward":
    """Lets `backward()` update the parameters, and free each gradient as soon as it was used.

    After each backward pass, parameters and state have the bits that `optimizer.step()` and `optimizer.zero_grad()`
    would give them. At most `bucket_cap_mb` of gradients, and one more gradient, are in memory at a time. `step()` and
    `zero_grad()` may stay in the training loop, and find nothing to do. Schedulers, checkpoints and groups work as
    usual, and `clip_stats()` is about the whole pass.

    Limits: `skip_norm`, `skip_nonfinite` and `GradScaler` need all gradients first; `max_norm`, `max_change` and
    `max_relative_change` do, too, except with `norm_scope="parameter"`. A rule implies `skip_nonfinite`, if it is not
    False.
    Changes of gradients between `backward()` and `step()` (a trainer's clip, an all-reduce, hooks of `step`) come too
    late; hooks of a tensor come in time. A second pass through a graph of updated parameters raises: add the losses up
    instead. A pass that raises may have updated some parameters. Passes that run in several threads at once must belong
    to different optimizers. `torch.compile` hands over all gradients of a graph at once: the bits are the same, and no
    memory is saved. Its compiled autograd, an option, raises.

    A pass steps on all parameters of the optimizer that get a gradient. The loss of a GAN's generator goes through the
    discriminator, and steps on it, too. Call `discriminator.requires_grad_(False)` before that loss is computed. Or
    call `backward()` under the discriminator's `accumulate()`, and its optimizer's `zero_grad()` afterwards.

    Args:
        model (torch.nn.Module): holds all parameters of the optimizer. Parameters that the optimizer does not hold keep
            their gradients, as usual.
        optimizer (fastclip.SGD): any of fastclip's. Keep it, or the returned object, for as long as the model is
            trained: once it is gone, the next `backward()` raises. Parameters that it no longer holds are let go. New
            ones come by `add_param_group`; those added by hand are stepped from the end of the next pass over others
            on, or from the next `step()` on.
        bucket_cap_mb (float): MiB of gradients that are collected and stepped in one call, which takes less time than a
            call for each gradient. 0 makes a call for each.

    Returns:
        StepInBackward: to accumulate gradients, and to go back to ordinary steps; also a context manager.

    Raises:
        ValueError: one of these settings is set, now or (raised in `backward()`) later; the optimizer is not the
            model's; a parameter is stepped in the backward pass by another optimizer, or shares memory with another
            parameter; a negative bucket_cap_mb.
        TypeError: parameters of `DistributedDataParallel` or `FullyShardedDataParallel`, DTensors; an optimizer with a
            `step` of its own.
        RuntimeError: in `backward()`: `create_graph=True`, a reentrant `torch.utils.checkpoint`, an optimizer that is
            gone (once: another one may take over then); in `step()`: `GradScaler`, when the first pass has stepped on
            scaled gradients already.

    Sources: torch's tutorial "How to save memory by fusing the optimizer step into the backward pass"; LOMO, Lv et al.
    (2023), https://arxiv.org/abs/2306.09782.

    Example:
        >>> opt = fastclip.SGD(model.parameters(), lr=0.01, momentum=0.9, clip_value=0.01)
        >>> in_backward = fastclip.step_in_backward(model, opt)
        >>> model(x).square().sum().backward()  # and that was the step
    """
    check_arguments(model, optimizer, bucket_cap_mb)
    return StepInBackward(optimizer, Passes(optimizer, bucket_cap_mb))


class StepInBackward:
    """The object that `fastclip.step_in_backward` returns.

    Example:
        >>> with fastclip.step_in_backward(model, opt) as in_backward:
        ...     with in_backward.accumulate():
        ...         model(x1).sum().backward()  # adds to the gradients
        ...     model(x2).sum().backward()  # steps on their sum
    """

    def __init__(self, optimizer: torch.optim.Optimizer, passes: Passes) -> None:
        self._optimizer = optimizer
        self._passes = passes

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Makes backward passes in a `with` block add to the gradients and update nothing. The next pass after it, or
        `optimizer.step()`, takes the step on the sums.

        All gradients stay in memory from one pass to the next: that is the price of adding them up.

        Example:
            >>> in_backward = fastclip.step_in_backward(model, opt)
            >>> with in_backward.accumulate():
            ...     (loss(x1) / 2).backward()
            >>> (loss(x2) / 2).backward()
        """
        before, self._passes.accumulating = self._passes.accumulating, True
        try:
            yield
        finally:
            self._passes.accumulating = before

    def remove(self) -> None:
        """Ends the steps in `backward()`: now only `optimizer.step()` steps. Gradients stay. May be called twice.

        Example:
            >>> fastclip.step_in_backward(model, opt).remove()
        """
        self._passes.remove()

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, _):
        raise TypeError("what step_in_backward returned can't be copied: call it for the copies of model and optimizer")
