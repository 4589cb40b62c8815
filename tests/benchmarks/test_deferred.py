"""benchmarks/deferred.py: the ways to bring fastclip into a trainer."""

import json

import torch

from benchmarks import deferred
from benchmarks.report import documents as report


def test_all_are_timed_and_reported(tmp_path, capsys):
    assert deferred.main(["--model", "dnn", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "deferred.json").read_text())["cases"]
    assert [row["rule"] for row in rows] == ["SGD", "AdamW"]
    for row in rows:
        assert row["ratio"].keys() == row["us_per_step"].keys() == deferred.WAYS.keys()
        assert set(row["ratio"][deferred.BASE]["samples"]) == {1.0}
    capsys.readouterr()
    assert report.main([str(tmp_path / "deferred.json")]) == 0
    assert "| dnn | AdamW | 1 |" in capsys.readouterr().out


def test_all_do_the_same(monkeypatch):
    for rule in deferred.RULES:
        monkeypatch.setitem(deferred.RULES[rule], "lr", 0.1)
        grads = [torch.randn(3, 4), torch.randn(5)]
        results = {}
        for name, way in deferred.WAYS.items():
            params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            step = deferred.clip_and_step(params, rule, *way)
            for _ in range(2):
                step()
            results[name] = torch.cat([p.detach().flatten() for p in params])
        for name, found in results.items():
            torch.testing.assert_close(found, results["torch"], rtol=2e-3, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
