"""benchmarks/peers.py: whoever is there is compared before it is timed, and whoever is not is said."""

import json

import pytest
import torch

from benchmarks import peers
from benchmarks.core.peers import PEERS, RULES, Peer, unusable
from benchmarks.report import documents as report


@pytest.fixture
def alone(monkeypatch):
    """torch's are the only peers: others would be compiled, or miss."""
    for name in set(PEERS) - {"torch, fused", "torch, foreach"}:
        monkeypatch.delitem(PEERS, name)


def run(tmp_path):
    assert peers.main(["--model", "dnn", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / "peers.json").read_text())


def test_a_row_for_each_rule_and_clip(alone, tmp_path, capsys):
    found = run(tmp_path)
    expected = [(dtype, r, c) for dtype in peers.LARGEST_DEVIATION for r in RULES for c in ("none", "norm")]
    assert [(row["dtype"], row["rule"], row["clip"]) for row in found["cases"]] == expected
    for row in found["cases"]:
        # torch 2.13's fused SGD changes no parameters of 16 bits.
        names = {"torch, foreach"} if (row["dtype"], row["rule"]) == ("bfloat16", RULES[0]) else set(PEERS)
        assert set(row["speed_up"]) >= (set() if row["rule"] == "Lion" else names)
        assert all(value <= (1e-5 if row["dtype"] == "float32" else 5e-2) for value in row["deviation"].values())
    capsys.readouterr()
    assert report.main([str(tmp_path / "peers.json")]) == 0
    assert "| bfloat16 | dnn | AdamW | norm | 1 |" in capsys.readouterr().out


def test_a_peer_that_disagrees_is_left_out_and_said(alone, monkeypatch, tmp_path, capsys):
    def half_as_far(rule, params, settings):
        return torch.optim.SGD(params, **settings | {"lr": settings["lr"] / 2})

    monkeypatch.setitem(PEERS, "half", Peer(None, half_as_far, ("SGD, momentum 0.9",)))
    found = run(tmp_path)
    assert not any("half" in row["speed_up"] for row in found["cases"])
    assert (
        "Left out: half, float32, SGD, momentum 0.9, clip none, dnn: differs from fastclip by 0.5"
        in capsys.readouterr().err
    )


def test_a_peer_that_is_missing_or_fails_is_left_out_and_said(alone, monkeypatch, tmp_path, capsys):
    def missing(rule, params, settings):
        import no_such_package  # noqa: F401

    def failing(rule, params, settings):
        raise RuntimeError("not on this machine\nmore")

    monkeypatch.setitem(PEERS, "missing", Peer("missing-peer", missing))
    monkeypatch.setitem(PEERS, "failing", Peer("failing-peer", failing))
    assert unusable("failing", "AdamW") == "RuntimeError: not on this machine"
    assert run(tmp_path)["peers"] == dict.fromkeys(("torch, fused", "torch, foreach"), torch.__version__)
    errors = capsys.readouterr().err
    assert "Left out: missing: No module named 'no_such_package'; pip install missing-peer" in errors


def test_a_wrong_deviation_is_measured(monkeypatch):
    problem = peers.Problem("two", [(4,), (3, 2)], contenders=())
    assert peers.deviation(problem, "AdamW", "norm", "torch, fused") < 1e-6
    monkeypatch.setitem(PEERS, "none", Peer(None, lambda rule, params, settings: torch.optim.SGD(params, lr=0.0)))
    assert peers.deviation(problem, "AdamW", "none", "none") == 1.0
