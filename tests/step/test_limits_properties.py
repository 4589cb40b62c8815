"""Limits on norms and changes, in every scope: random optimizers take the steps of plain torch."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402  after the check

from tests.long import fuzz  # noqa: E402
from tests.support import limit_scenarios  # noqa: E402


@settings(settings.get_profile("test"))
@given(limit_scenarios.scenarios())
def test_random_limits_take_the_steps_of_plain_torch(scenario):
    limit_scenarios.check(scenario)


def test_the_command_draws_them(capsys):
    assert fuzz.main(["--examples", "20", "--seed", "3", "--limits"]) == 0
    out = capsys.readouterr().out
    assert "fuzz: passed, 20 examples" in out and "--examples 20 --seed 3 --limits" in out
