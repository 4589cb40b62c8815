"""Runs a program that it does not change, and writes down how long each of its clips and updates took.

    python -m examples.recipe.stopwatch TIMES.json MODULE ARGUMENTS

Where `python -m fastclip.run -m` stands before it, the clips and updates are fastclip's.
"""

import atexit
import json
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Stopwatch:
    """Seconds of each call of `clip_grad_norm_`, of each `step` of an optimizer, and from the end of a step to that of
    the next."""

    def __init__(self):
        self.seconds = {"clip": [], "update": [], "step": []}
        self._began, self._ended, self._clip = 0.0, None, torch.nn.utils.clip_grad_norm_
        torch.nn.utils.clip_grad_norm_ = self.clip
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def clip(self, *args, **kwargs):
        began = time.perf_counter()
        norm = self._clip(*args, **kwargs)
        self.seconds["clip"].append(time.perf_counter() - began)
        return norm

    def before_step(self, *_):
        self._began = time.perf_counter()

    def after_step(self, *_):
        now = time.perf_counter()
        self.seconds["update"].append(now - self._began)
        if self._ended is not None:
            self.seconds["step"].append(now - self._ended)
        self._ended = now


if __name__ == "__main__":
    _, out, module, *rest = sys.argv
    stopwatch = Stopwatch()
    atexit.register(lambda: Path(out).write_text(json.dumps(stopwatch.seconds)))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
