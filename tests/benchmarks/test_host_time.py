"""The benchmark of the host's time measures what it says. Nothing here is timed."""

import json
import os

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install -r requirements-demo.txt")

from benchmarks import host as host_time  # noqa: E402
from benchmarks.core import timing  # noqa: E402
from benchmarks.core.contenders import CLIPS, RULES, Contender  # noqa: E402
from benchmarks.report import documents as report  # noqa: E402
from benchmarks.report import tensors as tensors_report  # noqa: E402

ADAMW = RULES["adamw"][0]


def test_a_walk_reads_and_checks_but_writes_nothing():
    made = host_time.params(5)
    step = host_time.walk(made, CLIPS["norm"], ADAMW)
    before = [p.clone() for p in made]
    step()
    assert all(torch.equal(p, was) for p, was in zip(made, before, strict=True))
    step.__self__.state[made[3]]["exp_avg_sq"] = torch.zeros(2)
    with pytest.raises(ValueError, match="exp_avg_sq of parameter 3 of group 0 has another shape"):
        step()


def test_the_command_writes_what_the_report_reads(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    monkeypatch.setattr(host_time, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(host_time, "MOST_FOR_TORCH", 3)
    monkeypatch.setattr(host_time, "MOST_FOR_DTENSORS", 3)
    monkeypatch.setattr(host_time, "DISPLACING_BYTES", 2**20)
    assert host_time.main(["--count", "3", "4", "--rounds", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "host_time.json").read_text())
    assert len(found["cases"]) == 2 * len(host_time.MEASURED) * len(CLIPS)
    for row in found["cases"]:
        others = {"fused", "foreach", "fastclip dtensors", "foreach dtensors"} if row["tensors"] == 3 else set()
        others |= {"fastclip displaced", "fused displaced"} if row["tensors"] == 3 else set()
        assert row["ns_per_tensor"].keys() == {"fastclip", "walk"} | others
    capsys.readouterr()
    assert report.main([str(tmp_path / "host_time.json")]) == 0
    assert "| rule | clip | ns per tensor | 3 tensors | 4 tensors |" in capsys.readouterr().out


def test_caches_are_displaced_before_each_step_and_that_is_not_timed(monkeypatch):
    monkeypatch.setattr(host_time, "DISPLACING_BYTES", 2**12)
    calls = []
    monkeypatch.setattr(timing, "block", lambda step, steps: calls.append(step()) or 0.5)
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, one: calls.append(self.nbytes))
    assert host_time.displacing()(lambda: "step", 2) == 1.0
    assert calls == [2**12, "step", 2**12, "step"]


@pytest.mark.parametrize("contender", ["fastclip", "foreach"])
def test_dtensors_are_clipped_and_stepped(contender):
    with host_time.process_group(8):
        made = host_time.sharded(3)
        before = [p.detach().to_local().clone() for p in made]
        Contender(contender, made, CLIPS["norm"], ADAMW).step()
        assert all(p.numel() == 8 for p in made)
        assert not any(torch.equal(p.detach().to_local(), was) for p, was in zip(made, before, strict=True))
    assert not torch.distributed.is_initialized()


def test_each_row_has_a_process_of_its_own():
    assert {host_time.alone(os.getpid) for _ in range(2)}.isdisjoint({os.getpid()})


def test_growth_by_hand():
    def row(tensors, ns):
        return {"tensors": tensors, "momentum": 0.0, "clip": "value", "ns_per_tensor": {"fastclip": {"median": ns}}}

    rows = [row(100, 9.0), row(1_000, 10.0), row(1_000, 20.0), row(100_000, 25.0), row(100_000, 30.0)]
    assert tensors_report.growth({"cases": rows}) == "Each of 100,000 tensors costs 1.5 to 2.5 times each of 1,000."
    assert tensors_report.growth({"cases": rows[:1]}).startswith("No 1,000 tensors")
