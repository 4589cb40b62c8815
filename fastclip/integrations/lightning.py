"""PyTorch Lightning: a callback that logs what the clip of each step did.

trainer = pl.Trainer(callbacks=[fastclip.integrations.lightning.LogClip()])
"""

import importlib.util
import sys
from typing import Any

from .stats import stats_to_log

# Two packages hold the same code, and a callback has to be of the one whose Trainer is used. Where both are installed,
# import that one before this module.
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_imported = [name for name in _NAMES if name in sys.modules]
_installed = [name for name in _NAMES[::-1] if importlib.util.find_spec(name.partition(".")[0])]
pl = importlib.import_module([*_imported, *_installed, "pytorch_lightning"][0])


class LogClip(pl.Callback):  # type: ignore[name-defined, misc]
    """Logs norm, coefficient and the rest of `clip_stats`, of each optimizer of fastclip, after each of its steps.

    With several optimizers the names end with their number, as `grad_norm/1`.

    Example:
        >>> callbacks = [fastclip.integrations.lightning.LogClip()]
    """

    def __init__(self) -> None:
        self._logged = 0  # of how many steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Called by Lightning."""
        if trainer.global_step == self._logged:  # a micro-batch without a step
            return
        self._logged = trainer.global_step
        for number, optimizer in enumerate(trainer.optimizers):
            end = f"/{number}" if len(trainer.optimizers) > 1 else ""
            pl_module.log_dict({name + end: value for name, value in stats_to_log(optimizer).items()})
