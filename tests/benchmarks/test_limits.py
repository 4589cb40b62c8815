"""benchmarks/limits.py: what a limit costs more than a norm clip."""

import json

from benchmarks import limits
from benchmarks.report import documents as report


def test_all_settings_are_timed_and_reported(tmp_path, capsys):
    assert limits.main(["--model", "dnn", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "limits.json").read_text())
    assert [row["momentum"] for row in found["cases"]] == [*limits.MOMENTUMS]
    for row in found["cases"]:
        assert row["ratio"].keys() == row["us_per_step"].keys() == limits.SETTINGS.keys()
        assert set(row["ratio"][limits.BASE]["samples"]) == {1.0}
    capsys.readouterr()
    assert report.main([str(tmp_path / "limits.json")]) == 0
    assert "QuantileNorm and skip_norm |" in capsys.readouterr().out


def test_a_block_steps_with_the_settings_it_is_about():
    seen = []

    class Optimizer:
        param_groups = [{"max_norm": 7.0, "skip_norm": 7.0, "max_change": 7.0, "max_relative_change": 7.0}]

        def step(self):
            seen.append(dict(self.param_groups[0]))

    limits.timer(Optimizer(), {"max_change": 1.0}, 3)()
    others = {"max_norm": None, "skip_norm": None, "max_relative_change": None, "skip_nonfinite": True}
    assert seen == 4 * [{"max_change": 1.0, **others}]
