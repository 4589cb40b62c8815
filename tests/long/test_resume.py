"""A training that is killed and goes on from its last checkpoint ends in the bits of one that was not."""

import os
import secrets
import signal
import subprocess
import sys

import pytest
import torch

from tests.support.project import ROOT

from . import training


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    training.train(folder)
    return result_of(folder)


def result_of(folder):
    return torch.load(folder / "result.pt", weights_only=True)


def flattened(value, name="result"):
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in value for k, v in flattened(item, f"{name}[{key!r}]").items()}


def differences(a, b):
    a, b = flattened(a), flattened(b)
    assert a.keys() == b.keys()
    same = {k: torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a}
    return [name for name, equal in same.items() if not equal]


def run_until(line, folder, *options):
    """Starts the training in a process of its own and kills it when it prints `line`; returns its first step."""
    command = [sys.executable, "-m", "tests.long.training", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for printed in process.stdout:
                lines.append(printed.strip())
                if lines[-1] == line:
                    break
        finally:
            process.send_signal(signal.SIGKILL)
    assert lines[-1] == line, f"ended before {line!r}: {lines[-3:]}"
    assert process.returncode == -signal.SIGKILL
    return int(lines[0].removeprefix("from step "))


def test_killed_at_random_steps_and_while_it_writes_a_checkpoint(tmp_path, uninterrupted):
    """Wherever the kill arrives: the process runs on for up to 20 steps after it printed the line."""
    step = 10 + secrets.randbelow(30)
    print(f"killed after step {step}")  # shown where the test fails
    assert run_until(f"step {step}", tmp_path, "--halt-before", str(step + 20)) == 0
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step - training.EVERY < first <= step + 20

    in_save = 12 * training.EVERY
    assert run_until("half a checkpoint", tmp_path, "--halt-in-save", str(in_save)) == first
    with pytest.raises((OSError, RuntimeError)):
        torch.load(tmp_path / "checkpoint.tmp", weights_only=True)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == in_save - training.EVERY

    last = in_save + 1 + secrets.randbelow(training.STEPS - in_save - 1)
    assert run_until("halted", tmp_path, "--halt-before", str(last)) == in_save - training.EVERY
    assert not (tmp_path / "result.pt").exists()
    training.train(tmp_path)
    assert differences(result_of(tmp_path), uninterrupted) == []


@pytest.mark.parametrize("forget", ["optimizer", "adam", "scheduler"])
def test_a_part_that_is_not_restored_is_noticed(forget, tmp_path, uninterrupted):
    training.train(tmp_path, steps=5 * training.EVERY)
    training.train(tmp_path, forget=forget)
    assert "result['model']['0.weight']" in differences(result_of(tmp_path), uninterrupted)
