"""`python -m benchmarks precision`: what is timed has changed its parameters, beside a limit of the same bytes."""

import json

import pytest
import torch

import fastclip
from benchmarks import precision
from benchmarks.core import memory, timing
from benchmarks.core.problem import Problem
from benchmarks.report import documents

ARGUMENTS = ["--model", "dnn", "--threads", "1", "--rounds", "2"]


def test_all_dtypes_magnitudes_and_ways_are_timed_and_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    assert precision.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "precision.json").read_text())
    assert len(found["cases"]) == (1 + 3) * 3 * 2
    for row in found["cases"]:
        assert row["of_limit"]["median"] > 0 and row["over_torch"]["median"] > 0
        assert (row["of_divider"] is not None) == (row["rule"] == "AdamW")
    assert {row["rounded"] for row in found["cases"]} == set(precision.WAYS)
    capsys.readouterr()
    assert documents.main([str(tmp_path / "precision.json")]) == 0
    assert "| float16 | 1e-07 | master weights | AdamW | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("way", "moved"),
    [("to nearest", 2 + 3 * 2 * 2), ("at random", 2 + 3 * 2 * 2), ("master weights", 2 + 2 * 2 + 3 * 2 * 4)],
)
def test_the_limit_moves_the_bytes_of_a_step_and_changes_none(way, moved, monkeypatch):
    problem = Problem("none", [(64, 64)], contenders=())
    params = precision.copied(problem, torch.bfloat16, 0.01)
    optimizer = fastclip.AdamW(params, **precision.WAYS[way])
    optimizer.step()
    seen = []
    real = precision.limit.Limit

    def watched(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(precision.limit, "Limit", watched)
    step = precision.limit_of(optimizer)
    arrays = {id(a): a for own in seen for read, written in own.arrays for a in (read, *written)}
    before = [a.clone() for a in arrays.values()]
    step()
    assert all(torch.equal(a, b) for a, b in zip(arrays.values(), before, strict=True))
    written = sum(2 * a.nbytes for own in seen for _, all_written in own.arrays for a in all_written)
    assert written + params[0].grad.nbytes == moved * params[0].numel()


def test_a_step_that_changes_nothing_is_not_timed():
    idle = precision.Rule("SGD", fastclip.SGD, torch.optim.SGD, {"lr": 0.0}, "foreach")
    with pytest.raises(precision.Unchanged, match="fastclip's SGD: a step has not changed all its parameters in"):
        precision.require_change(idle, torch.bfloat16)


def test_too_little_memory_is_told_before_anything_is_made(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    assert precision.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("Nothing was measured: ") and not list(tmp_path.iterdir())
