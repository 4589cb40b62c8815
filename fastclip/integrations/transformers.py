"""Hugging Face transformers: a mixin for a Trainer, whose log then says what the clip of the last step did.

class Trainer(fastclip.integrations.transformers.LogsClip, transformers.Trainer):
    pass
"""

from typing import Any

from .stats import measures_norm, stats_to_log


class LogsClip:
    """Mixed in before a Trainer: adds norm, coefficient and the rest of `clip_stats` to its log of the loss.

    `grad_norm` is fastclip's where the optimizer has a limit on the norm, and the Trainer's where it has not. With
    `max_grad_norm=0` a Trainer takes a norm only to log it: two passes over the gradients, which are left out here.

    Example:
        >>> class Trainer(fastclip.integrations.transformers.LogsClip):  # and transformers.Trainer
        ...     pass
    """

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the Trainer's, but none where the step is going to have one; releases before 5 do not ask."""
        if grad_norm is None and measures_norm(self.optimizer):  # type: ignore[attr-defined]
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *positional: Any, **named: Any) -> None:
        """As the Trainer's, with more in it."""
        if "loss" in logs:
            logs |= stats_to_log(self.optimizer)  # type: ignore[attr-defined]
        super().log(logs, *positional, **named)  # type: ignore[misc]
