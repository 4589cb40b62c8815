"""What an optimizer tells of its last step: norm, statistics, past norms, the gradient that was not finite."""

from typing import Any

import torch

from . import clip_stats
from .plain import history


class Results:
    """Mixed into `ClippedOptimizer`, which keeps what is read here."""

    param_groups: list[dict[str, Any]]
    state: Any
    _engine: Any
    _rule: Any
    _in_backward: Any
    _reference_stats: clip_stats.ClipStats | None  # of the last step, if it was in plain torch
    _reference_measures: Any
    _reference_skips: Any

    @property
    def total_norm(self) -> torch.Tensor | None:
        """Norm of the gradients in the last step, after a value clip and before the norm clip, to log:
        `torch.nn.utils.clip_grad_norm_` returns the same.

        A float64 scalar tensor on the parameters' device, computed without waiting for the device. None if no limit on
        a norm is set or no step was taken; inf if AMP skipped the step. `max_norm=inf` measures and does not clip.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, max_norm=5.0)
            >>> model(x).sum().backward(); opt.step()
            >>> log({"grad_norm": opt.total_norm})
        """
        of_pass = self._in_backward and self._in_backward.clip_stats()
        stats = of_pass or self._reference_stats
        return stats.total_norm if stats else self._engine.total_norm()

    @property
    def skipped_steps(self) -> torch.Tensor:
        """Number of steps that were skipped, and changed nothing: by `skip_nonfinite`, `skip_norm` or AMP.

        An int64 scalar tensor on the parameters' device, counted there and read without waiting for it. Counts from 0
        in an optimizer that was made, copied or unpickled; it is not part of the state_dict.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, max_norm=5.0, skip_nonfinite=True)
            >>> opt.step()
            >>> log({"skipped": opt.skipped_steps})
        """
        device = next((param.device for group in self.param_groups for param in group["params"]), "cpu")
        return (self._engine.skipped_steps().to(device) + self._reference_skips).to(device)

    def clip_stats(self) -> clip_stats.ClipStats:
        """Returns statistics of the last step, to log: norm, coefficient, fraction of elements clamped, steps skipped.

        Costs no pass over memory, and waits for no device: the step counts while it goes over the gradients.

        Returns:
            ClipStats: scalar tensors on the parameters' device, see there; None for a clip that is not set.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, clip_value=0.01)
            >>> model(x).sum().backward(); opt.step()
            >>> log({"clamped": opt.clip_stats().clamped_fraction})
        """
        stats = (self._in_backward and self._in_backward.clip_stats()) or self._stats_of_call()
        return stats._replace(skipped_steps=self.skipped_steps)

    def _stats_of_call(self):
        if self._reference_stats:
            return self._reference_stats
        norm, coefficient, clamped, skipped, *limits = self._engine.clip_stats()
        return clip_stats.ClipStats(norm, coefficient, clamped, skipped, None, *limits)

    def norm_history(self) -> torch.Tensor:
        """Returns the norms that a `fastclip.QuantileNorm` looks at, the oldest first, to log their quartiles.

        Waits for the device.

        Returns:
            Tensor: float64, of up to `window` norms, on the parameters' device; of `max_norm`, or else of `skip_norm`.
                Empty before the first step.

        Raises:
            RuntimeError: neither limit is a `QuantileNorm`.

        Example:
            >>> opt = fastclip.SGD(model.parameters(), lr=0.1, max_norm=fastclip.QuantileNorm())
            >>> model(x).sum().backward(); opt.step()
            >>> quartiles = opt.norm_history().quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
        """
        return history.norm_history(self.param_groups, self.state)

    def norms_by_parameter(self) -> tuple[list[str], torch.Tensor]:
        """Returns the norm of each parameter's gradient in the last step, after a value clip and before the norm clip.

        The sums are there already: the step has added them up for the norm of all. Waits for the device; over a sharded
        model all ranks must call it.

        Returns:
            (list of str, Tensor): the names of all parameters, as the optimizer was given them (`named_parameters()`)
                or by their places; and their norms, float64 on the CPU, each of `norm_type`. 0 without a gradient; NaN
                where AMP skipped the step.

        Raises:
            RuntimeError: the last step took no norm, or there was none. `max_norm=inf` measures and does not clip.

        Example:
            >>> opt = fastclip.SGD(model.named_parameters(), lr=0.1, max_norm=5.0)
            >>> model(x).sum().backward(); opt.step()
            >>> names, norms = opt.norms_by_parameter()
            >>> dominating = names[norms.argmax()], norms.max() ** 2 / norms.square().sum()
        """
        if self._in_backward is not None and self._in_backward.took_several_steps:
            raise RuntimeError(
                "the backward pass took several steps, and the norms of the last one alone are there: "
                "step_in_backward(..., bucket_cap_mb=math.inf) takes one"
            )
        if self._reference_measures is None:
            measures, norm_type = self._engine.measures_by_parameter()
        else:
            found, groups = self._reference_measures
            measures, norm_type = clip_stats.table_of(found, groups, self._rule.needs_norm)
        return clip_stats.norms_by_parameter(self.param_groups, measures, norm_type)

    def first_nonfinite(self) -> str | None:
        """Names the first parameter whose gradient holds an inf or NaN, as 'parameter 3 of group 0', with its name if
        the optimizer was built from named parameters; None if there is none.

        Reads the gradients as they are now, and waits for the device. Call it before `zero_grad`, to find out why a
        step was skipped.

        Example:
            >>> opt = fastclip.SGD(model.named_parameters(), lr=0.1, skip_nonfinite=True)
            >>> if opt.clip_stats().skipped:
            ...     print(f"not finite: the gradient of {opt.first_nonfinite()}")
        """
        return clip_stats.first_nonfinite(self.param_groups)
