"""The recipes of examples/trainers: each real trainer ends where the plain loop ends, so it clips, and only once."""

import re

import pytest
import torch

from tests.support.cases import assert_close, assert_same_bits
from tests.support.project import ROOT
from tests.support.trainers import (
    CLIP_VALUE,
    ELSEWHERE,
    LOOPS,
    MAX_NORM,
    TRAINERS,
    Watch,
    no_clip,
    norm_clip,
    options,
    plain_loop,
    recipe,
    tiny_ctc,
    value_clip,
)

CASES = [(name, amp) for name in LOOPS for amp in ("no", "bf16", "fp16")] + [
    (name, amp) for name in TRAINERS for amp in ("no", "bf16")
]


@pytest.mark.parametrize("name, amp", CASES)
def test_value_clip_gives_the_bits_of_the_loop(name, amp):
    given = options("--clip-value", str(CLIP_VALUE), "--max-norm", "inf", "--amp", amp)
    with Watch() as watch:
        model, log = recipe(name).train(given)
    assert len(watch.settings) == given.steps == len(log.stats) == 8
    assert min(watch.largest) > CLIP_VALUE
    expected, _ = plain_loop(given, watch.settings, value_clip, cache=name != "with_lightning")
    assert watch.clip_calls == []
    assert_same_bits(expected, list(model.parameters()))
    unclipped, _ = plain_loop(given, watch.settings, no_clip)
    assert not any(torch.equal(a, b) for a, b in zip(unclipped, model.parameters(), strict=True))
    assert "8 steps, loss" in str(log) and ", 0% of the steps clipped" in str(log)
    assert all(stats.clamped_fraction > 0 for stats in log.stats if not stats.skipped)


@pytest.mark.parametrize("name", LOOPS + TRAINERS)
def test_norm_clip_ends_where_the_loop_ends(name):
    given = options("--max-norm", str(MAX_NORM))
    with Watch() as watch:
        model, log = recipe(name).train(given)
    expected, norms = plain_loop(given, watch.settings, norm_clip)
    assert min(norms) > MAX_NORM
    watch.assert_clipped_once(norms)
    assert_close(expected, list(model.parameters()), rtol=1e-5)
    unclipped, _ = plain_loop(given, watch.settings, no_clip)
    with pytest.raises(AssertionError, match="parameter 0"):
        assert_close(unclipped, list(model.parameters()), rtol=1e-3)
    assert [stats.total_norm.item() for stats in log.stats] == watch.norms
    assert ", 100% of the steps clipped" in str(log)


def expected_lrs(name, given):
    """The learning rates that the recipe's schedule has to give for three epochs of two steps that learn nothing."""
    lr, steps = given.lr, range(given.steps)
    if name == "icefall_style":  # which sets the rate before the step
        return [lr * recipe(name).eden(step + 1) for step in steps]
    if name == "with_lightning":
        return [lr, lr, lr, lr, lr / 10, lr / 10]
    if name == "with_speechbrain":
        return [lr, lr, lr, lr, lr / 2, lr / 2]
    if name == "with_transformers":
        return [lr * (1 - step / given.steps) for step in steps]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr, tiny_ctc.MOMENTUM)
    if name == "plain_amp":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, given.steps)
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    lrs = []
    for _ in steps:
        lrs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return lrs


@pytest.mark.parametrize("name", LOOPS + TRAINERS)
def test_schedulers_set_the_learning_rate_of_each_step(name):
    given = options("--lr", "1e-6", epochs=3, utterances=16)
    with Watch() as watch:
        recipe(name).train(given)
    assert watch.lrs == pytest.approx(expected_lrs(name, given), rel=1e-6)
    assert len(set(watch.lrs)) > 1


def test_the_command_line_ends_with_a_line_of_results(capsys):
    tiny_ctc.run(
        "about", recipe("plain_amp").train, ["--cpu", "--epochs", "1", "--utterances", "32", "--clip-value", "1"]
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 steps, loss ")
    assert all(
        part in last for part in ("last norm ", "% of the steps clipped", "% of the elements clamped", "0 skipped")
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        ("--max-norm -1", "argument --max-norm: '-1' is not a number of at least 0"),
        ("--lr nan", "argument --lr: 'nan' is not a number of at least 0"),
        ("--epochs 2.5", "argument --epochs: '2.5' is not a whole number of at least 1"),
        ("--utterances 30", "--utterances must be a multiple of --batch times --accumulate"),
    ],
)
def test_bad_options_are_named(bad, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny_ctc.parse("about", bad.split())
    assert message in capsys.readouterr().err


def test_the_page_has_a_row_for_each_recipe_that_says_what_the_recipe_does():
    rows = re.findall(
        r"^\| \[.+\]\(\.\./examples/trainers/(\w+)\.py\) (.+)$", (ROOT / "docs/trainers.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(LOOPS + TRAINERS + ELSEWHERE)
    for name, row in rows:
        text = " ".join((ROOT / "examples" / "trainers" / f"{name}.py").read_text().split())
        for code in re.findall(r"`(.+?)`", row):
            assert code in text, f"the row for {name} has {code!r}, the recipe has not"
        assert text.count("# <copy>") == text.count("# </copy>") > 0
