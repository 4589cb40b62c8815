"""The check of steps on large models finds what is wrong, and the cost model's numbers are those it says."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install fastclip[demo]")

from benchmarks import cost_model, large, memory, report, rules, scaling, timing  # noqa: E402
from benchmarks.shapes import MODELS, count  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    monkeypatch.setattr(large, "PROBE", 1000)
    cases = [replace(case, model="dnn") for case in large.RUNS]
    monkeypatch.setattr(large, "RUNS", cases)


def test_the_command_writes_what_the_report_reads(tmp_path, capsys):
    assert large.main(["--rounds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "large.json").read_text())
    assert [row["tensors"] for row in found["cases"]] == [4] * len(large.RUNS)
    assert all(
        row["deviation"] <= 1 and row["samples"] == 64 * (1 + len(rules.of_row(row).states)) for row in found["cases"]
    )
    capsys.readouterr()
    assert report.main([str(tmp_path / "large.json")]) == 0
    assert "| dnn | 1 of 1,024 | float32 | AdamW |" in capsys.readouterr().out


@pytest.mark.parametrize("index", range(len(large.RUNS)))
@pytest.mark.parametrize("skipped", ["step", "clip"])
def test_a_step_that_is_not_taken_or_not_clipped_is_wrong(skipped, index, monkeypatch, tmp_path, capsys):
    case = large.RUNS[index]

    class Broken(case.rule.of_fastclip):
        def __init__(self, params, max_norm, **settings):
            super().__init__(params, max_norm=math.inf, **settings)

        def step(self):
            if skipped == "step":
                self.param_groups[0]["lr"] = 0.0
            super().step()

    monkeypatch.setattr(large, "RUNS", [replace(case, rule=replace(case.rule, of_fastclip=Broken))])
    assert large.main(["--out", str(tmp_path)]) == 1
    assert "WRONG: dnn, torch." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(large, "run", lambda *_: pytest.fail("run"))
    assert large.main(["--out", str(tmp_path)]) == 2
    assert "of memory needed" in capsys.readouterr().err


def test_float32_bytes_are_the_floor_of_the_benchmark():
    for case_rules in rules.CASES.values():
        for rule in case_rules:
            for clip in ("value", "norm"):
                assert cost_model.FLOAT32.moved(len(rule.states), clip) == 4 * rule.elements(clip)


def test_bytes_by_hand():
    mixed = cost_model.MIXED
    # Gradient 2; master and two averages read and written, 24; parameter written, 2; the norm reads gradients again.
    assert (mixed.moved(2, "value"), mixed.moved(2, "norm")) == (28, 30)
    assert mixed.held(2) == 2 + 2 + 4 + 8
    # Two clamps read and write gradients, or a norm reads them and a product reads and writes them.
    assert cost_model.FLOAT32.moved_by_torch(0, "value") == 12 + 16
    assert cost_model.FLOAT32.moved_by_torch(0, "norm") == 12 + 12


@pytest.mark.parametrize("devices", [1, 3, 8, 64, 1024])
def test_shards_are_those_of_torch(devices):
    shapes = MODELS["gru-ctc"]
    chunks = [torch.empty(shape, device="meta").chunk(devices) for shape in shapes]
    total = 0
    for rank in range(devices):
        here = [pieces[rank].numel() for pieces in chunks if rank < len(pieces)]
        assert cost_model.shard(shapes, devices, rank) == (sum(here), len(here))
        total += sum(here)
    assert total == count(shapes)
    case = large.Case("gru-ctc", torch.float32, large.SGD, devices)
    assert count(case.shapes()) == cost_model.shard(shapes, devices)[0]


def test_latency_by_hand():
    assert cost_model.all_reduce_seconds(1) == 0
    ring_of_8, tree_of_64 = 3.6 + 14 * 0.47, 4.4 + 2 * (7 * 0.52 * 1.8 + 3 * 5.0)
    assert cost_model.all_reduce_seconds(8) == pytest.approx(ring_of_8 * 1e-6)
    assert cost_model.all_reduce_seconds(64) == pytest.approx(tree_of_64 * 1e-6)


def test_time_by_hand():
    of_host = {"s_per_call": 2e-6, "s_per_tensor": 1e-7, "s_per_dtensor": 4e-7, "s_per_message": 3e-6}
    machine = cost_model.Machine(1e12, s_per_launch=1e-6, **of_host)
    assert cost_model.host_seconds(machine, 10) == pytest.approx(3e-6)
    assert cost_model.host_seconds(machine, 10, "norm", 8) == pytest.approx(9e-6)
    alone = (1_000_000, cost_model.FLOAT32, 0, "norm")
    assert cost_model.device_seconds(machine, *alone) == pytest.approx(17e-6)
    assert cost_model.device_seconds(machine, *alone, 8) == pytest.approx(18e-6 + cost_model.all_reduce_seconds(8))
    assert cost_model.step_seconds(machine, 1_000_000, 10_000, *alone[1:]) == pytest.approx(1.002e-3)


def test_the_page_has_the_model_s_tables():
    text = scaling.DOCUMENT.read_text()
    assert report.replaced(text, scaling.tables()) == text, "python -m benchmarks.scaling --update"
    assert all(report.markers(name)[0] in text for name in scaling.tables())
