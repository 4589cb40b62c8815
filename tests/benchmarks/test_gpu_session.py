"""`make gpu`, with stand-ins for the tools that are not here."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_session as session
from tests.support.project import ROOT

# Runs the command behind its options, as the tools do, and says what they say.
FAKE = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
{before}
"$@"
code=$?
echo "{after}"
exit {code}
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A function that puts a stand-in on PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(session, "CUDA_TOOLS", str(folder))

    def add(name, after="", before="", code="$code"):
        (folder / name).write_text(FAKE.format(python=sys.executable, before=before, after=after, code=code))
        (folder / name).chmod(0o755)

    return add


def step(*command, **settings):
    values = {"name": "x", "command": [sys.executable, "-c", *command], "limit": 30, "log": "x.log"} | settings
    return session.Step(**values)


def rehearse(out, *only):
    return session.main(["--device", "cpu", "--out", str(out), "--only", *only])


def outcomes(out):
    return {o["step"]: o for o in json.loads((out / "session.json").read_text())["steps"]}


@pytest.fixture
def short(monkeypatch):
    """A benchmark of seconds, and a profile of a small model."""
    benchmark, ncu = session.benchmark, session.ncu
    monkeypatch.setattr(session, "benchmark", lambda *a: [*benchmark(*a), "--model", "dnn", "--rounds", "1"])

    def small(*arguments):
        found = ncu(*arguments)
        found.command += ["--model", "dnn"]
        return found

    monkeypatch.setattr(session, "ncu", small)


def test_it_starts_without_torch():
    """A machine may have no torch, or a fastclip that is not built yet: the session says so, and no import does."""
    code = "import sys, benchmarks.gpu_session; sys.exit(bool({'torch', 'fastclip'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_whole_session(tools, short, tmp_path, capsys):
    tools("compute-sanitizer", after="========= ERROR SUMMARY: 0 errors")
    tools("ncu", before='echo "==ERROR== ERR_NVGPUCTRPERM - no permission"', code=1)
    out = tmp_path / "out"
    assert rehearse(out, "exercise", "benchmark", "memcheck", "ncu value", "ncu norm") == 0
    found = outcomes(out)
    assert {name: o["state"] for name, o in found.items()} == {
        "exercise": "ok",
        "benchmark": "ok",
        "memcheck": "ok",
        "ncu value": "absent",
        "ncu norm": "absent",
    }
    assert "ERR_NVGPUCTRPERM" in found["ncu value"]["reason"]
    printed = capsys.readouterr().out
    assert printed.index("\nstep ") < printed.index("\nplain SGD") < printed.index("A rehearsal on the CPU")
    assert "memcheck   ok" in printed and "cp " not in printed
    assert json.loads((out / "gpu.json").read_text())["rehearsal"]
    assert {path.name for path in out.iterdir()} == {
        "exercise.log",
        "benchmark.log",
        "sanitizer.log",
        "ncu.log",
        "gpu.json",
        "session.json",
    }


def test_an_error_that_the_sanitizer_finds_is_a_failure(tools, tmp_path, capsys):
    tools("compute-sanitizer", after="========= ERROR SUMMARY: 2 errors", code=1)
    assert rehearse(tmp_path / "out", "memcheck", "synccheck") == 1
    found = outcomes(tmp_path / "out")
    assert found["memcheck"]["state"] == found["synccheck"]["state"] == "failed"
    assert found["memcheck"]["reason"] == "exit code 1: ========= ERROR SUMMARY: 2 errors"


def test_a_sanitizer_that_says_nothing_or_can_not_work_here(tools, tmp_path, monkeypatch):
    tools("compute-sanitizer")
    assert rehearse(tmp_path / "out", "memcheck") == 1
    tools("compute-sanitizer", after="========= Error: Device not supported", code=1)
    assert rehearse(tmp_path / "out", "memcheck") == 0
    assert outcomes(tmp_path / "out")["memcheck"]["state"] == "absent"


def test_what_is_absent_is_named_and_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "CUDA_TOOLS", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    find_spec = session.importlib.util.find_spec
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: name != "pytest" and find_spec(name))
    assert rehearse(tmp_path / "out", "tests", "racecheck", "ncu value") == 0
    found = outcomes(tmp_path / "out")
    assert {o["state"] for o in found.values()} == {"absent"}
    assert found["tests"]["reason"].endswith("has no pytest")
    printed = capsys.readouterr().out
    assert "has no pytest: what needs them" in printed and "no compute-sanitizer on PATH" in printed
    assert "Nothing was measured: there is no gpu.json." in printed


def test_the_memcheck_of_each_tensor_is_its_own(tmp_path):
    found = session.sanitizer("memcheck", "cuda")
    assert found.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert " ".join(found.command[:7]) == (
        "compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all"
    )


def test_the_steps_and_their_limits(tmp_path):
    options = session.parse(["--out", str(tmp_path)])
    found = {s.name: s for s in session.steps(tmp_path, options, "9.0")}
    assert list(found) == session.NAMES
    assert found["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "cuda" in found["exercise"].command and "cpu" not in found["benchmark"].command
    assert session.SECONDS < 480 and all(s.limit <= 170 for s in found.values())
    assert [name for name, s in found.items() if s.optional] == ["ncu value", "ncu norm", "demo"]
    assert len({s.log for s in found.values()} | {"gpu.json", "session.json"}) <= 8


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    outcome = session.run(step(code, limit=1), tmp_path, left=100)
    assert time.monotonic() - start < 20
    assert (outcome.state, outcome.reason) == ("failed", "stopped after 1 s")


def test_the_session_s_time_cuts_a_step(tmp_path):
    assert session.run(step("import time; time.sleep(60)"), tmp_path, left=2).reason == "stopped after 2 s"
    assert "not run" in session.run(step("print(1)"), tmp_path, left=0).reason


def test_a_failed_build_stops_the_rest_and_another_failure_does_not(tmp_path, capsys):
    build, good, bad = step("1/0", log="build.log", name="build"), step("print(1)", name="a"), step("1/0", name="b")
    found = session.run_all([build, good], tmp_path)
    assert [o.state for o in found] == ["failed", "failed"]
    assert found[0].reason == "exit code 1: ZeroDivisionError: division by zero"
    assert found[1].reason == "not run, as this failed: build"
    assert [o.state for o in session.run_all([bad, good], tmp_path)] == ["failed", "ok"]


def test_a_log_holds_the_commands_and_a_proof_is_looked_for_in_its_own_part(tmp_path):
    assert session.run(step("print('proof')", proof="^proof"), tmp_path, 100).state == "ok"
    assert session.run(step("print('other')", proof="^proof"), tmp_path, 100).state == "failed"
    assert (tmp_path / "x.log").read_text().count("$ ") == 2


def test_an_optional_failure_is_not_the_session_s(tools, short, tmp_path):
    tools("ncu", after="==WARNING== No kernels were profiled.")
    assert rehearse(tmp_path / "out", "ncu value") == 0
    assert outcomes(tmp_path / "out")["ncu value"]["state"] == "failed"
    tools("ncu", after="==PROF== Profiling step_kernel - 0: 0%....50%....100% - 40 passes")
    assert rehearse(tmp_path / "out", "ncu value") == 0
    assert outcomes(tmp_path / "out")["ncu value"]["state"] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_stops_at_once(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    out = tmp_path / "out"
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={out}"]
    of_make = {"ARGS", "MAKEFLAGS", "MAKEOVERRIDES"}  # of the `make test ARGS=...` that may run this
    env = {name: value for name, value in os.environ.items() if name not in of_make}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs a GPU" in result.stderr and "nothing was done" in result.stderr
    assert not out.exists()
    assert session.main(["--out", str(out)]) == 2
