"""How a recipe of examples/trainers is run, watched, and compared with a plain loop of torch."""

import importlib
import math
import sys

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

pytest.importorskip("tqdm", reason="the recipes need tqdm")

import fastclip  # noqa: E402
from examples.trainers import tiny_ctc  # noqa: E402

LOOPS = ["plain_amp", "icefall_style"]
TRAINERS = ["with_lightning", "with_transformers", "with_accelerate", "with_speechbrain"]
ELSEWHERE = ["with_deepspeed"]  # in processes of its own, by test_deepspeed.py
CLIP_VALUE, MAX_NORM = 0.05, 1.0


def recipe(name):
    try:
        return importlib.import_module(f"examples.trainers.{name}")
    except (ImportError, OSError) as error:  # OSError: a torchaudio whose libraries don't fit this torch
        pytest.skip(f"{name} can't be imported here: {error}")
    finally:
        forget_lazy_modules()


def forget_lazy_modules():
    """SpeechBrain's, for packages that are not there, raise when anyone looks at them: inspect and hypothesis do."""
    for name, module in list(sys.modules.items()):
        if any(
            kind.__name__ == "LazyModule" and kind.__module__.startswith("speechbrain") for kind in type(module).__mro__
        ):
            del sys.modules[name]


def options(*arguments, epochs=2, utterances=32):
    torch.manual_seed(0)
    sizes = f"--epochs {epochs} --utterances {utterances} --batch 4 --accumulate 2"
    return tiny_ctc.parse("", ["--cpu", *sizes.split(), *arguments])


class Watch:
    """In a `with`: records what goes on around fastclip's step inside a trainer, where one can't look."""

    def __init__(self):
        self.patches = pytest.MonkeyPatch()
        self.settings, self.largest, self.norms, self.clip_calls = [], [], [], []

    def __enter__(self):
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            self.patches.setattr(torch.nn.utils, name, self.counted(name, getattr(torch.nn.utils, name)))
        self.hook = register_optimizer_step_post_hook(self.after_step)
        return self

    def __exit__(self, *error):
        self.hook.remove()
        self.patches.undo()
        if "accelerate" in sys.modules:  # Accelerator and Trainer share the precision, for the whole process
            sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)

    def counted(self, name, function):
        def wrapper(parameters, bound, *args, **kwargs):
            self.clip_calls.append((name, bound))
            return function(parameters, bound, *args, **kwargs)

        return wrapper

    def after_step(self, optimizer, args, kwargs):
        if isinstance(optimizer, fastclip.SGD):  # whose step leaves the gradients as they came
            group = optimizer.param_groups[0]
            self.settings.append({name: group[name] for name in ("lr", "momentum")})
            self.largest.append(max(p.grad.abs().max().item() for p in group["params"]))
            self.norms.append(optimizer.total_norm.item())

    @property
    def lrs(self):
        return [settings["lr"] for settings in self.settings]

    def assert_clipped_once(self, norms):
        """Nobody called a clip of torch's, and the optimizer saw the `norms` of the loop, before its clip."""
        assert self.clip_calls == []
        assert len(self.norms) == len(norms)
        for seen, expected in zip(self.norms, norms, strict=True):  # inf or NaN where AMP skips
            same = math.isclose(seen, expected, rel_tol=1e-4) or not math.isfinite(expected)
            assert same, f"{self.norms} are not {norms}"


def plain_loop(options, settings, clip, cache=True):
    """The same training in plain torch, with `settings` of the optimizer at each step. Returns parameters and norms.

    `cache`: whether autocast keeps the weights that it has cast, which decides in what type their gradients add up.
    """
    torch.manual_seed(0)
    model = tiny_ctc.TinyCTC()
    optimizer = torch.optim.SGD(model.parameters(), options.lr, tiny_ctc.MOMENTUM, foreach=False)
    scaler = torch.amp.GradScaler("cpu", enabled=options.amp == "fp16")
    norms, settings = [], iter(settings)
    for _ in range(options.epochs):
        for index, batch in enumerate(tiny_ctc.loader(options), 1):
            with torch.autocast("cpu", tiny_ctc.DTYPES[options.amp], options.amp != "no", cache):
                loss = model(**batch)["loss"]
            scaler.scale(loss / options.accumulate).backward()
            if index % options.accumulate == 0:
                optimizer.param_groups[0].update(next(settings))
                scaler.unscale_(optimizer)
                norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
                clip(model.parameters())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return list(model.parameters()), norms


def no_clip(params):
    pass


def value_clip(params):
    for p in params:
        p.grad.clamp_(-CLIP_VALUE, CLIP_VALUE)


def norm_clip(params):
    torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
