"""Random optimizers, tensors and steps against the plain loop. `make fuzz` draws many more, and new ones."""

import inspect
import textwrap

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import Phase, given, seed, settings, strategies  # noqa: E402  after the check

import fastclip  # noqa: E402
from fastclip import amp, optimizer  # noqa: E402
from fastclip.plain import step as reference  # noqa: E402
from tests.long import fuzz  # noqa: E402
from tests.support import scenarios  # noqa: E402
from tests.support.playback import check  # noqa: E402


@pytest.mark.falls_back
@settings(settings.get_profile("test"))
@given(scenarios.scenarios())
def test_random_scenarios_agree_with_the_plain_loop(scenario):
    check(scenario)


@pytest.mark.falls_back
def test_the_command_says_what_it_did_and_how_to_repeat_it(capsys):
    assert fuzz.main(["--examples", "20", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "fuzz: passed, 20 examples" in out and "python -m tests.long.fuzz --examples 20 --seed 3" in out


@pytest.mark.thorough
@pytest.mark.falls_back
def test_a_planted_error_is_found_and_shrunk(monkeypatch, capsys):
    """The error is one unit in the last place, where there is weight decay."""

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


OURS = optimizer.ClippedOptimizer
LOADING = "super().load_state_dict(state_dict)"
LOST = "self._optimizer_load_state_dict_{}_hooks.clear(); " + LOADING
ROUNDED = (
    "[{**g, 'lr': g['lr'] if type(g['lr']) is float else torch.tensor(float(g['lr'])).half().item()} for g in groups]"
)
# What goes wrong: (where, the function, a line of it, what is put in its place).
FAULTS = {
    "hooks run twice where a subclass wraps the step": (OURS, "step", "and not _is_in_hooked_step(self)", ""),
    "hooks are lost where a subclass wraps the step": (
        OURS,
        "step",
        "and not",
        "and type(self).__name__ != 'Own' and not",
    ),
    "the step under a profiler is another": (
        OURS,
        "step",
        "if listened else",
        "if listened and not _C.is_recording() else",
    ),
    "load hooks are lost": (OURS, "load_state_dict", LOADING, LOST.format("pre")),
    "what a load hook resets stays": (OURS, "load_state_dict", LOADING, LOST.format("post")),
    "loading rounds states": (optimizer, "restore_dtypes", "!= dtype", "is None"),
    "a scaler's verdict is ignored": (amp, "_is_torchs", "all(", "any("),
    "what a scaler has found is ignored": (OURS, "_update", "asked =", "found_inf = None\n    asked ="),
    "gradients stay scaled": (OURS, "_update", "asked =", "grad_scale = None\n    asked ="),
    "numbers lose digits": (
        OURS,
        "_update",
        "step(groups",
        f"step({ROUNDED}",
    ),
    "a duplicate's gradient counts twice": (
        reference,
        "step",
        "dict(zip(params, flat, strict=True))",
        "{p: g * sum(q is p for q in params) for p, g in zip(params, flat)}",
    ),
    "a generator is read twice": (OURS, "add_param_group", 'param_group["params"] = list(', "list("),
    "the CPU's mode is not that of the caller": (OURS, "_update", "try:", "torch.set_flush_denormal(False)\n    try:"),
    "states of others are lost": (OURS, "_update", "try:", "[s.pop('ema', 0) for s in self.state.values()]\n    try:"),
}


def with_fault(where, name, line, instead):
    function = inspect.unwrap(getattr(where, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert line in source
    made = {}
    exec(
        source.replace(line, instead, 1).replace("super()", "super(ClippedOptimizer, self)"), function.__globals__, made
    )
    vars(made[name]).update(vars(function))  # marks of `step`
    return made[name]


@pytest.mark.thorough
@pytest.mark.falls_back
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    """Where odd things are drawn more often: `make fuzz` needs about 200 examples for each, at times 1,000."""
    found = []
    monkeypatch.setattr(scenarios, "rarely", lambda draw, one_in=None: draw(strategies.integers(0, 2)) == 2)

    @seed(1)
    @settings(settings.get_profile("fuzz"), max_examples=1500, phases=[Phase.generate], report_multiple_bugs=False)
    @given(scenarios.scenarios())
    def run(scenario):
        try:
            check(scenario)
        except Exception:
            found.append(scenario)
            raise

    with monkeypatch.context() as planted:
        planted.setattr(FAULTS[fault][0], FAULTS[fault][1], with_fault(*FAULTS[fault]))
        with pytest.raises(Exception):  # noqa: B017  a difference, or an error
            run()
    check(found[0])  # without the fault
