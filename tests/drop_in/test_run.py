"""`python -m fastclip.run`: a program that knows nothing of fastclip, with torch's bits."""

import os
import subprocess
import sys
import textwrap

import pytest

from fastclip import patching
from fastclip import run as runner
from tests.support.project import ROOT

PROGRAM = textwrap.dedent(
    """
    import sys
    import torch
    from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # bound at import, as in toolkits
    from torch.optim import SGD

    def train(rank=0):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = torch.nn.Linear(50, 7)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(12):
            model(torch.randn(4, 50)).square().sum().backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        digest = model.weight.detach().view(torch.int32).sum().item()
        print(f"{__name__} {sys.argv[1:]} {type(optimizer).__module__} {digest}", flush=True)

    if __name__ == "__main__":
        if "spawn" in sys.argv:
            torch.multiprocessing.spawn(train, nprocs=2)
        else:
            train()
    """
)


def run(tmp_path, *command):
    (tmp_path / "their_program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_runs_a_program_with_its_bits(tmp_path):
    """As a script, as a module and as text; `own` and `defer` have torch's bits."""
    code, plain, said = run(tmp_path, "their_program.py", "a", "--clip")
    assert code == 0 and "torch.optim" in plain, said
    expected = plain.replace("torch.optim.sgd", "fastclip.sgd")
    deferred = "12 clips deferred to the step"
    for options, program, clips in (
        ([], ["their_program.py"], deferred),
        (["--clip=defer"], ["-m", "their_program"], deferred),
        (["--clip", "own"], ["-c", PROGRAM], "no clips"),
    ):
        code, out, said = run(tmp_path, "-m", "fastclip.run", *options, *program, "a", "--clip")
        assert (code, out) == (0, expected), said
        assert said.endswith(f"fastclip: 12 steps, {clips}\n")


SHOWS = textwrap.dedent(
    """
    import os, pickle, sys
    class C: pass
    pickle.dumps(C())
    os.chdir("/")
    main = sys.modules["__main__"]
    print(main.C is C, __name__, globals().get("__file__"), sys.path[0], sys.argv, "helper" in dir())
    """
)


@pytest.mark.parametrize("way", ["script", "symlink", "module", "text"])
def test_a_main_module_is_what_python_makes_of_it(tmp_path, way):
    """Its file is absolute, its folder that of the file itself, and its classes can be pickled."""
    (tmp_path / "src").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "src/helper.py").touch()
    (tmp_path / "src/shows.py").write_text("import helper\n" + SHOWS)
    (tmp_path / "bin/shows.py").symlink_to("../src/shows.py")
    (tmp_path / "shows.py").write_text(SHOWS)
    program = {"script": ["src/shows.py"], "symlink": ["bin/shows.py"], "module": ["-m", "shows"],
               "text": ["-c", SHOWS]}[way]  # fmt: skip
    _, expected, _ = run(tmp_path, *program, "x")
    code, out, said = run(tmp_path, "-m", "fastclip.run", "--", *program, "x")
    assert (code, out) == (0, expected), said


def test_processes_that_it_spawns_are_patched_and_count_too(tmp_path):
    """As in ESPnet and icefall."""
    code, plain, said = run(tmp_path, "their_program.py")
    assert code == 0, said
    plain = 2 * plain.replace("__main__", "__mp_main__").replace("[]", "['spawn']")
    for program in (["their_program.py"], ["-m", "their_program"]):
        code, out, said = run(tmp_path, "-m", "fastclip.run", *program, "spawn")
        assert code == 0 and out == plain.replace("torch.optim.sgd", "fastclip.sgd"), said
        assert said.count("fastclip: 12 steps, 12 clips deferred to the step\n") == 2


def test_a_program_that_exits_or_fails(tmp_path):
    for text, code, words in (("import sys; sys.exit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError")):
        (tmp_path / "program.py").write_text(text)
        found, out, said = run(tmp_path, "-m", "fastclip.run", "program.py")
        assert found == code and words in said and "fastclip: " not in said and not out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--clip", "all", "x.py"], "--clip must be one of own, fused, defer, got 'all'"),
        (["--clip"], "got ''"),
        (["--what", "x.py"], "no such option: --what"),
        (["-m"], "expected -m MODULE, -c CODE or a script, got -m"),
        (["-x", "y"], "got -x"),
        (["nowhere.py"], "no such file: nowhere.py"),
    ],
)
def test_bad_usage(capsys, arguments, words):
    assert runner.main(arguments) == 2 and not patching._patches
    out, said = capsys.readouterr()
    assert words in said and said.count("\n") == 1 and not out


def test_help(capsys):
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert runner.main(arguments) == code
        assert "python -m fastclip.run [--clip own|fused|defer] -m MODULE" in capsys.readouterr().out
