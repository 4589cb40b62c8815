"""benchmarks/accumulation.py: the clip and addition of a micro-batch."""

import json

import torch

from benchmarks import accumulation
from benchmarks.report import documents as report


def test_all_are_timed_and_reported(tmp_path, capsys):
    assert accumulation.main(["--model", "dnn", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "accumulation.json").read_text())["cases"]
    assert row["ratio"].keys() == row["us_per_micro_batch"].keys()
    assert set(row["ratio"][accumulation.BASE]["samples"]) == {1.0}
    capsys.readouterr()
    assert report.main([str(tmp_path / "accumulation.json")]) == 0
    assert "torch without a clip |" in capsys.readouterr().out


def test_they_do_the_same():
    grads = [torch.randn(3, 4), torch.randn(5)]
    params, others = ([torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads] for _ in range(2))
    for p in params:
        p.grad = torch.zeros_like(p)
    sums = [torch.zeros_like(grad) for grad in grads]
    ours = accumulation.by_fastclip(params, grads, max_norm=accumulation.MAX_NORM)
    theirs = accumulation.by_torch(others, [grad.clone() for grad in grads], sums)
    for _ in range(3):  # torch scales in place: later ones are clipped already
        ours()
        theirs()
    for p, total in zip(params, sums, strict=True):
        torch.testing.assert_close(p.grad, total, rtol=1e-2, atol=1e-9)
