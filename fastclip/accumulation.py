"""Micro-batch clipping: gradients of small batches are clipped before they are added up."""

from typing import Any

import torch

from .clip_grad import clip_grad_norm_
from .eager import eager
from .norm_rules import is_rule
from .optimizer import ClippedOptimizer
from .settings import NormLimit
from .sgd import SGD


class clipped_accumulation:  # noqa: N801  a context manager, named as torch names its own
    """Clips the gradients of a micro-batch before they are added to those of the micro-batches before it.

    Put it around each backward pass of gradient accumulation::

        micro_batch = fastclip.clipped_accumulation(optimizer, max_norm=1.0)
        for batch in batches:
            with micro_batch:
                loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    Equivalent, for each micro-batch, to `torch.autograd.grad`, then `clip_grad_norm_` on its gradients alone, then an
    addition to each `p.grad`. Clip and addition are one pass: per float32 parameter it reads 4 bytes for the norm, then
    reads 8 and writes 4. One bad micro-batch so moves the sum by at most `max_norm`.

    The optimizer can be torch's, fastclip's, or any other; its own clip still acts on the sum. Nothing is divided: for
    the mean, divide each loss by the number of micro-batches, and `max_norm` with it.

    Between several processes, each has to add up on its own (`model.no_sync()` under DDP), and the sums are averaged
    afterwards, by an all-reduce of each `p.grad`. Gradients that are DTensors (FSDP2) are those of all ranks already.

    If the backward pass raises, the gradients are those from before it.

    Args:
        optimizer (torch.optim.Optimizer): whose parameters' gradients are clipped and added up.
        max_norm (float or rule, optional): the largest norm of a micro-batch's gradients. In the gradients' units;
            unscaled, with `scaler`. A rule, `fastclip.QuantileNorm` or `fastclip.EmaNorm`, derives it from the norms of
            the micro-batches before: `QuantileNorm(0.1, scale=1)` is close to the papers' smallest norm.
        skip_norm (float or rule, optional): a micro-batch with a larger norm is left out.
        clip_value (float or (float, float), optional): clamps each element to [-clip_value, clip_value] or to
            [low, high] first. In the same units.
        norm_type (float): 2 or inf.
        skip_nonfinite (bool): leaves out a micro-batch with an inf or NaN among its gradients. A rule implies it.
        scaler (torch.amp.GradScaler, optional): if the losses are scaled by it. The sums stay scaled, for
            `scaler.step(optimizer)`.

    Attributes:
        total_norm (Tensor or None): with `max_norm` or `skip_norm`, the norm of the last micro-batch before its clip: a
            scalar of float64 on the device.
        threshold (Tensor or None): the value of `max_norm` for it, likewise.
        skipped (Tensor): how many micro-batches were left out, a scalar on the device.

    Raises:
        ValueError, TypeError: bad settings, at once; gradients that cannot be clipped or added, at the end of the
            backward pass. Then the sums are those from before it.
        RuntimeError: entered while it is at work already, or with `step_in_backward`, which keeps no gradients.

    Source: Wang et al., "Revisit Micro-batch Clipping", ICLR 2025, https://arxiv.org/abs/2408.16204. There the limit is
    the smallest norm of the micro-batches of a step, which needs all of them in memory.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> micro_batch = fastclip.clipped_accumulation(optimizer, max_norm=1.0)
        >>> for size in (1.0, 100.0):
        ...     with micro_batch:
        ...         (size * w).sum().backward()
        >>> w.grad
        tensor([1.4142, 1.4142])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: NormLimit = None,
        clip_value: float | tuple[float, float] | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        scaler: Any = None,
        skip_norm: NormLimit = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._optimizer, self._scaler = optimizer, scaler
        # Maximizing by lr 1 adds the gradient. The parameters, here the sums, change with each step.
        self._sum = SGD(
            [torch.zeros(0)],
            lr=1.0,
            maximize=True,
            max_norm=max_norm,
            skip_norm=skip_norm,
            clip_value=clip_value,
            norm_type=norm_type,
            skip_nonfinite=skip_nonfinite or is_rule(max_norm) or is_rule(skip_norm),
        )
        self._histories: dict[str, torch.Tensor] = {}  # what the rules remember
        self._before: dict[torch.Tensor, torch.Tensor | None] | None = None
        self.total_norm: torch.Tensor | None = None
        self.threshold: torch.Tensor | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the norms that rules remember, for a checkpoint; empty without rules.

        Example:
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
            >>> micro_batch = fastclip.clipped_accumulation(optimizer, max_norm="quantile")
            >>> checkpoint = {"micro_batch": micro_batch.state_dict()}
            >>> micro_batch.load_state_dict(checkpoint["micro_batch"])
        """
        return {name: history.clone() for name, history in self._histories.items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Goes on with the norms of a `state_dict()`."""
        self._histories = {name: history.clone() for name, history in state_dict.items()}

    @property
    def skipped(self) -> torch.Tensor:
        return self._sum.skipped_steps

    def __enter__(self) -> "clipped_accumulation":
        if self._before is not None:
            raise RuntimeError("this clipped_accumulation is at work already: leave it before it is entered again")
        if isinstance(self._optimizer, ClippedOptimizer) and self._optimizer._in_backward is not None:
            raise RuntimeError("clipped_accumulation needs gradients, and step_in_backward keeps none")
        self._before = {p: p.grad for group in self._optimizer.param_groups for p in group["params"]}
        for p in self._before:
            p.grad = None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        before, self._before = self._before, None
        assert before is not None
        grads = {p: p.grad for p in before}
        for p, total in before.items():
            p.grad = total
        if kind is None:
            self._add({p: grad for p, grad in grads.items() if grad is not None})

    @eager
    def _add(self, grads):
        """Adds the gradients, clipped, to those that the parameters have."""
        with torch.no_grad():
            self._add_clipped(grads)

    def _add_clipped(self, grads):
        group = self._sum.param_groups[0]
        of_norm_alone = group["clip_value"] is group["skip_norm"] is self._scaler is None
        of_norm_alone = of_norm_alone and not group["skip_nonfinite"]
        if of_norm_alone and group["max_norm"] is not None and all(p.grad is None for p in grads):
            self._clip_the_first(grads, group)
            return
        sums = {p: torch.zeros_like(grad) if p.grad is None else p.grad for p, grad in grads.items()}
        scale = None
        if self._scaler is not None and self._scaler.is_enabled():
            scale = self._scaler._scale
            if scale is None:
                raise RuntimeError("the scaler has scaled no loss yet: scaler.scale(loss).backward()")
        group["params"], group["lr"] = [*sums.values()], 1.0 if scale is None else scale
        try:
            for p, total in sums.items():
                total.grad = grads[p]
            self._update(next(iter(sums.values()), None), scale)
        finally:
            for total in sums.values():
                total.grad = None
            group["params"], group["lr"] = [], 1.0
        for p, total in sums.items():
            p.grad = total

    def _update(self, first, scale):
        """Takes the step. The sums are other tensors each time: what the rules remember stands beside the first."""
        state = self._sum.state
        if first is not None:
            state[first] = dict(self._histories)
        try:
            self._sum._update(self._sum.param_groups, scale)
            self._histories = next((dict(entry) for entry in state.values() if entry), self._histories)
            stats = self._sum.clip_stats()
            self.total_norm, self.threshold = stats.total_norm, stats.threshold
        finally:
            state.clear()

    def _clip_the_first(self, grads, group):
        """Clips gradients that there is nothing to add to."""
        for p, grad in grads.items():
            p.grad = grad
        try:
            self.total_norm = clip_grad_norm_([*grads], group["max_norm"], group["norm_type"]).double()
            self.threshold = torch.full_like(self.total_norm, group["max_norm"])
        except BaseException:
            for p in grads:
                p.grad = None
            raise
