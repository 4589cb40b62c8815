"""Random optimizers, tensors and steps against the plain loop. `make fuzz` draws many more, and new ones."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402  after the check

import fastclip  # noqa: E402

from . import fuzz, scenarios  # noqa: E402
from .playback import check  # noqa: E402


@pytest.mark.falls_back
@settings(settings.get_profile("test"))
@given(scenarios.scenarios())
def test_random_scenarios_agree_with_the_plain_loop(scenario):
    check(scenario)


@pytest.mark.falls_back
def test_the_command_says_what_it_did_and_how_to_repeat_it(capsys):
    assert fuzz.main(["--examples", "20", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "fuzz: passed, 20 examples" in out and "python -m tests.fuzz --examples 20 --seed 3" in out


@pytest.mark.falls_back
def test_a_planted_error_is_found_and_shrunk(monkeypatch, capsys):
    """Of one unit in the last place, where there is weight decay."""

    class Wrong(fastclip.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if group["weight_decay"] and p.dtype == torch.float32 and p.numel():
                        p.data.copy_(torch.nextafter(p.data, torch.tensor(torch.inf)))

    monkeypatch.setattr(fastclip, "SGD", Wrong)
    assert fuzz.main(["--examples", "200", "--seed", "3"]) == 1
    captured = capsys.readouterr()
    assert "fuzz: FAILED" in captured.out and "--examples 200 --seed 3" in captured.out
    assert "'weight_decay': 0.01" in captured.err and "AssertionError: step 0, parameter 0" in captured.err
