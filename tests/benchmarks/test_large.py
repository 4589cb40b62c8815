"""The check of steps on large models finds what is wrong, and shares and bytes are what they should be."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install -r requirements-demo.txt")

from benchmarks import large  # noqa: E402
from benchmarks.core import contenders, memory, timing  # noqa: E402
from benchmarks.core.models import MODELS, count  # noqa: E402
from benchmarks.report import documents as report  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    cases = [replace(case, model="dnn") for case in large.RUNS]
    monkeypatch.setattr(large, "RUNS", cases)


def test_the_command_writes_what_the_report_reads(tmp_path, capsys):
    assert large.main(["--rounds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "large.json").read_text())
    assert [row["tensors"] for row in found["cases"]] == [4] * len(large.RUNS)
    assert all(
        row["deviation"] <= 1 and row["samples"] == 64 * (1 + len(contenders.rule_of(row).states))
        for row in found["cases"]
    )
    capsys.readouterr()
    assert report.main([str(tmp_path / "large.json")]) == 0
    assert "| dnn | 1 of 1,024 | float32 | AdamW |" in capsys.readouterr().out


@pytest.mark.parametrize("index", range(len(large.RUNS)))
@pytest.mark.parametrize("skipped", ["step", "clip"])
def test_a_step_that_is_not_taken_or_not_clipped_is_wrong(skipped, index, monkeypatch, tmp_path, capsys):
    case = large.RUNS[index]

    class Broken(case.rule.fastclip_class):
        def __init__(self, params, max_norm, **settings):
            super().__init__(params, max_norm=math.inf, **settings)

        def step(self):
            if skipped == "step":
                self.param_groups[0]["lr"] = 0.0
            super().step()

    monkeypatch.setattr(large, "RUNS", [replace(case, rule=replace(case.rule, fastclip_class=Broken))])
    assert large.main(["--out", str(tmp_path)]) == 1
    assert "WRONG: dnn, torch." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(large, "run", lambda *_: pytest.fail("run"))
    assert large.main(["--out", str(tmp_path)]) == 2
    assert "of memory needed" in capsys.readouterr().err


def test_bytes_by_hand():
    case = large.Case("dnn", torch.bfloat16, large.ADAMW)
    # A parameter, a gradient and two averages are held.
    assert case.bytes() == 2 * 4 * count(MODELS["dnn"])


@pytest.mark.parametrize("devices", [1, 3, 8, 64, 1024])
def test_shares_are_those_of_torch(devices):
    shapes = MODELS["gru-ctc"]
    chunks = [torch.empty(shape, device="meta").chunk(devices) for shape in shapes]
    case = large.Case("gru-ctc", torch.float32, large.SGD, devices)
    assert count(case.shapes()) == sum(pieces[0].numel() for pieces in chunks)
    assert [tuple(pieces[0].shape) for pieces in chunks] == case.shapes()
