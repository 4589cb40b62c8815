"""`python -m benchmarks states` and the study of trainings: what they count, and what they say."""

import json

import pytest
import torch

from benchmarks import states
from benchmarks.core import memory
from benchmarks.report import states as table
from benchmarks.report import training
from studies import state_bits


def test_times_and_bytes_of_both(tmp_path, capsys):
    assert states.main(["--model", "gru-ctc", "--rounds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "states.json").read_text())
    assert len(found["cases"]) == 2 * 3 * 2 * len({1, torch.get_num_threads()})
    for row in found["cases"]:
        size = row["bytes_per_parameter"]
        assert size["8"] < 0.3 * size["32"]
        assert row["of_float32"]["median"] > 0
    assert table.markdown(found) in capsys.readouterr().out


def test_too_little_memory_is_told_before_anything_is_made(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    assert states.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("Nothing was measured: ") and not list(tmp_path.iterdir())


def test_the_larger_model_has_the_size_of_whisper_tiny():
    model = state_bits.WhisperTiny(80)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(37_760_640, rel=0.03)
    examples = [(torch.randn(40, 80), torch.tensor([1, 2, 10]), ""), (torch.randn(30, 80), torch.tensor([3]), "")]
    loss = state_bits.loss_of_tokens(examples)(model)
    loss.backward()
    assert 5 < loss < 20 and model.tokens.weight.grad.any()


class Data:
    train = [(torch.randn(12, 4), torch.tensor([1 + i % 3]), "") for i in range(32)]


def test_both_trainings_see_the_same_batches_from_the_same_start():
    torch.manual_seed(0)
    seen = []

    def make(data):
        return torch.nn.Linear(4, 4096)

    def loss_of(examples):
        seen.append([id(example) for example in examples])
        return lambda model: model(torch.stack([frames[0] for frames, *_ in examples])).square().mean()

    optimizers = {"AdamW": state_bits.OPTIMIZERS["AdamW"]}
    (row,) = state_bits.run(
        "a task", make, loss_of, lambda *_: {"wer": 1.0}, optimizers, range(2), 5, 8, lambda seed: Data
    )
    assert seen[:5] == seen[5:10] and seen[:5] != seen[10:15]
    for before, after in zip(row["runs"]["32"], row["runs"]["8"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=0.02) and after["loss"] != before["loss"]
        assert after["state_bytes"] < 0.5 * before["state_bytes"]
    results = {"cases": [row], "machine": {"cpu": "a CPU", "cores": 2}, "date": "2026-01-01", "command": "c"}
    results |= {"commit": None, "dirty": False}
    results["versions"] = {"torch": "2", "python": "3", "fastclip": "0", "compiler": "c++", "capability": "AVX2"}
    assert "| a task | AdamW | 20K | 5 |" in training.markdown(results)
