"""What the recipes of examples/trainers warn of, shown to happen in the trainers that are installed."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits
from tests.support.trainers import (
    CLIP_VALUE,
    MAX_NORM,
    Watch,
    norm_clip,
    options,
    plain_loop,
    recipe,
    tiny_ctc,
    value_clip,
)


def train_with_lightning(given, monkeypatch, **settings):
    """Runs the recipe with other settings of its Trainer."""
    module = recipe("with_lightning")
    trainer = module.pytorch_lightning.Trainer
    monkeypatch.setattr(module.pytorch_lightning, "Trainer", lambda **own: trainer(**{**own, **settings}))
    return module.train(given)


def lightning_clips_too(given, monkeypatch):
    train_with_lightning(given, monkeypatch, gradient_clip_val=MAX_NORM)


def transformers_clips_too(given, monkeypatch):
    recipe("with_transformers").train(given, max_grad_norm=MAX_NORM)


def speechbrain_clips_too(given, monkeypatch):
    module = recipe("with_speechbrain")
    monkeypatch.delattr(module.Brain, "optimizers_step")
    module.train(given)


@pytest.mark.parametrize("train", [lightning_clips_too, transformers_clips_too, speechbrain_clips_too])
def test_a_clip_left_on_in_the_trainer_is_noticed(train, monkeypatch):
    given = options("--max-norm", str(MAX_NORM))
    with Watch() as watch:
        train(given, monkeypatch)
    _, norms = plain_loop(given, watch.settings, norm_clip)
    assert [name for name, _ in watch.clip_calls] == ["clip_grad_norm_"] * given.steps
    watch.clip_calls.clear()  # the norms alone tell, too
    with pytest.raises(AssertionError, match="are not"):
        watch.assert_clipped_once(norms)


def test_lightning_clips_as_well_where_nothing_is_scaled(monkeypatch):
    """Under bfloat16. With a scaler it refuses, see tests/toolkits/test_lightning.py."""
    given = options("--amp", "bf16")
    with Watch() as watch:
        train_with_lightning(given, monkeypatch, gradient_clip_val=MAX_NORM)
    assert max(watch.norms) <= MAX_NORM * 1.001


def test_lightning_with_a_scaler_gives_the_bits_of_the_loop(monkeypatch):
    module, raw = recipe("with_lightning"), []
    precision = module.pytorch_lightning.plugins.MixedPrecision("16-mixed", "cpu")

    class Recogniser(module.Recogniser):
        def on_before_optimizer_step(self, optimizer):
            raw.append(self.model.head.bias.grad.norm().item())

    monkeypatch.setattr(module, "Recogniser", Recogniser)
    given = options("--clip-value", str(CLIP_VALUE), "--max-norm", "inf", "--amp", "fp16")
    with Watch() as watch:
        model, log = train_with_lightning(given, monkeypatch, plugins=precision, precision=None)
    expected, norms = plain_loop(given, watch.settings, value_clip, cache=False)
    assert watch.clip_calls == []
    assert_same_bits(expected, list(model.parameters()))
    assert 0 < log.stats[-1].skipped_steps < given.steps
    assert raw[-1] > 100 * norms[-1]  # a part of the gradient, in that hook: still scaled


class OwnScaler(torch.amp.GradScaler):
    """A scaler of the kind that asks other ranks whether to step."""

    def _maybe_opt_step(self, *args, **kwargs):
        return super()._maybe_opt_step(*args, **kwargs)


def test_lightning_and_accelerate_with_a_scaler_that_decides_itself():
    """As with torch's SGD: no step is called where it has found an infinity, and Accelerate hears of it."""
    plugins = pytest.importorskip("lightning_fabric.plugins")
    AcceleratedOptimizer = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    recipe("with_accelerate").Accelerator(cpu=True)
    ends = []
    with Watch():
        for make in (partial(torch.optim.SGD, foreach=False), partial(fastclip.SGD, max_norm=math.inf)):
            params = [torch.ones(3, requires_grad=True) for _ in range(2)]
            optimizers = [make([p], lr=0.1, momentum=0.9) for p in params]
            of_lightning = plugins.MixedPrecision(
                "16-mixed", "cpu", OwnScaler("cpu", init_scale=8.0, growth_interval=2)
            )
            prepared = AcceleratedOptimizer(optimizers[1], scaler=OwnScaler("cpu", init_scale=8.0, growth_interval=2))
            scales, skipped = [], []
            for factor in (math.inf, 1.0, 1.0, math.inf, 1.0):
                for p, scaler in zip(params, (of_lightning.scaler, prepared.scaler), strict=True):
                    p.grad = None
                    scaler.scale((p * p).sum() * factor).backward()
                of_lightning.optimizer_step(optimizers[0])
                prepared.step()
                scales.append((of_lightning.scaler.get_scale(), prepared.scaler.get_scale()))
                skipped.append(prepared.step_was_skipped)
            ends.append((scales, skipped, params))
    assert ends[0][:2] == ends[1][:2] and skipped == [True, False, False, True, False]
    assert_same_bits(ends[0][2], ends[1][2])


def test_transformers_takes_a_norm_only_to_log(monkeypatch):
    module, given = recipe("with_transformers"), options("--max-norm", str(MAX_NORM))
    kept = []

    class Logged(module.Trainer):
        def log(self, logs, *args):
            super().log(logs, *args)
            kept.extend(logs[name] for name in ("grad_norm",) if "loss" in logs)

    with Watch() as own:
        model, _ = module.train(given, trainer_class=module.transformers.Trainer)
    with Watch() as watch:
        same, _ = module.train(options("--max-norm", str(MAX_NORM)), trainer_class=Logged)
    assert own.clip_calls == [("clip_grad_norm_", math.inf)] * given.steps
    assert watch.clip_calls == []
    assert_same_bits(list(model.parameters()), list(same.parameters()))
    assert kept == watch.norms


def test_that_norm_turns_an_infinite_gradient_into_nan():
    module = recipe("with_transformers")
    ends = []
    for trainer_class in (module.transformers.Trainer, module.Trainer):
        given = options("--clip-value", str(CLIP_VALUE), "--max-norm", "inf", epochs=1, utterances=8)

        class Infinite(trainer_class):
            def training_step(self, model, *args):
                loss = super().training_step(model, *args)
                model.head.bias.grad[0] = math.inf
                return loss

        with Watch():
            model, _ = module.train(given, trainer_class=Infinite)
        ends.append(model.head.bias.detach())
    assert ends[0].isnan().any()
    assert ends[1].isfinite().all()


def test_transformers_makes_groups_for_fastclip(tmp_path):
    module = recipe("with_transformers")
    model = tiny_ctc.TinyCTC()
    arguments = module.transformers.TrainingArguments(
        tmp_path, max_grad_norm=0, weight_decay=0.1, max_steps=1, logging_steps=1, use_cpu=True, report_to="none"
    )
    chosen = (fastclip.SGD, {"lr": 0.01, "max_norm": MAX_NORM})
    trainer = module.Trainer(
        model,
        arguments,
        train_dataset=tiny_ctc.utterances(8, 0),
        data_collator=tiny_ctc.collate,
        optimizer_cls_and_kwargs=chosen,
    )
    trainer.log_of_steps = tiny_ctc.Log()
    with Watch() as watch:
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["max_norm"] for group in optimizer.param_groups] == [MAX_NORM, MAX_NORM]
    assert watch.norms == [trainer.log_of_steps.stats[0].total_norm] and watch.norms[0] > MAX_NORM


def test_accelerate_wraps_the_optimizer_and_does_not_hear_of_skips():
    module = recipe("with_accelerate")
    with Watch():
        module.Accelerator(cpu=True)
        from accelerate.optimizer import AcceleratedOptimizer

        param = torch.ones(3, requires_grad=True)
        optimizer = fastclip.SGD([param], lr=0.1, max_norm=MAX_NORM)
        scaler = torch.amp.GradScaler("cpu")
        prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
        assert prepared.optimizer is optimizer and not hasattr(prepared, "clip_stats")
        scaler.scale(param.sum() * math.inf).backward()
        prepared.step()
    assert optimizer.skipped_steps == 1 and torch.equal(param, torch.ones(3))
    assert not prepared.step_was_skipped


def test_speechbrain_clips_the_first_group_only():
    module = recipe("with_speechbrain")
    clipped, params = [], [torch.ones(4, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.0)
    optimizer.register_step_post_hook(lambda *_: clipped.extend(p.grad.norm().item() for p in params))
    brain = module.speechbrain.Brain({"model": tiny_ctc.TinyCTC()}, lambda _: optimizer, run_opts={"device": "cpu"})
    brain.init_optimizers()
    for p in params:
        p.grad = torch.full_like(p, 50.0)
    brain.optimizers_step()
    assert clipped == pytest.approx([brain.max_grad_norm, 100.0])


def test_icefall_style_clips_by_its_median_in_a_training(monkeypatch, capsys):
    module = recipe("icefall_style")
    monkeypatch.setattr(module, "PERIOD", 3)
    given = options("--max-norm", "inf", epochs=10)
    with Watch() as watch:
        model, log = module.train(given)
    norms = watch.norms
    thresholds = [2 * np.median(norms[max(0, t - 100) : t]) if t >= 10 else math.inf for t in range(len(norms))]
    assert [stats.threshold.item() for stats in log.stats] == pytest.approx(thresholds, rel=1e-12)
    expected = [min(1, limit / (norm + 1e-6)) for limit, norm in zip(thresholds, norms, strict=True)]
    assert [stats.clip_coefficient.item() for stats in log.stats] == pytest.approx(expected, rel=1e-9)
    assert len(norms) > 12
    last = capsys.readouterr().out.splitlines()[-1]
    percent, names = r"percent-clipped=\d+\.\d", "|".join(name for name, _ in model.named_parameters())
    assert re.search(
        rf"quartiles( \d\.\de[+-]\d+){{5}}, threshold=\S+, {percent}, dominating parameter ({names}),", last
    )
