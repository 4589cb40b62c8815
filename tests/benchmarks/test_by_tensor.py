"""benchmarks/by_tensor.py: what norms and limits of each tensor cost."""

import json
import warnings

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import by_tensor
from benchmarks.core.agreement import Disagreement
from benchmarks.core.problem import Problem
from benchmarks.report import documents as report


def test_all_contenders_are_timed_and_reported(tmp_path, capsys):
    arguments = ["by-tensor", "--model", "dnn", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert command_line.main(arguments) == 0
    assert [str(warning.message) for warning in said] == []  # gradients that never change look like clipped ones
    found = json.loads((tmp_path / "by_tensor.json").read_text())
    (row,) = found["cases"]
    assert row["ratio"].keys() == row["ms_per_step"].keys() == {*by_tensor.SETTINGS, *by_tensor.OTHERS}
    assert set(row["ratio"][by_tensor.BASE]["samples"]) == {1.0}
    assert 0 <= row["deviation"] <= by_tensor.LARGEST_DEVIATION
    capsys.readouterr()
    assert report.main([str(tmp_path / "by_tensor.json")]) == 0
    assert "| ScaledAdam, clipping_scale |" in capsys.readouterr().out


def test_each_setting_is_on_in_its_own_steps(monkeypatch):
    seen = []

    def step(self):
        seen.append({name: self.param_groups[0][name] for name in by_tensor.NONE})

    problem = Problem("none", [(3,)], contenders=())
    steps = by_tensor.all_timers(problem)
    monkeypatch.setattr(by_tensor.fastclip.AdamW, "step", step)
    for name in by_tensor.SETTINGS:
        steps[name]()
    assert len(seen) == len(by_tensor.SETTINGS)
    for found, own in zip(seen, by_tensor.SETTINGS.values(), strict=True):
        assert {name: value for name, value in found.items() if value != by_tensor.NONE[name]} == own


def test_nothing_is_timed_where_scaled_adam_disagrees(monkeypatch):
    monkeypatch.setattr(by_tensor, "LARGEST_DEVIATION", -1.0)
    with pytest.raises(Disagreement, match="ScaledAdam and its stacked writing differ"):
        by_tensor.main(["--model", "dnn", "--rounds", "1"])
    assert torch.get_num_threads() >= 1
