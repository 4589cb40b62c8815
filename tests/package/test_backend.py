"""The build backend finds the torch of the environment that fastclip is installed into; or says what to do."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.project import ROOT

SITE = Path(torch.__file__).parents[1]


@pytest.fixture
def backend():
    spec = importlib.util.spec_from_file_location("fastclip_backend", ROOT / "distribution" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_environment(tmp_path, backend):
    def make(name, torch_version=None):
        packages = tmp_path / name / backend.LIBRARY
        packages.mkdir(parents=True)
        if torch_version:
            (packages / "torch").mkdir()
            (packages / "torch" / "__init__.py").touch()
            (packages / "torch" / "version.py").write_text(f"__version__ = '{torch_version}'\ncuda = None\n")
        return tmp_path / name

    return make


@pytest.fixture
def hidden(monkeypatch):
    """As in a build: no torch in the path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != SITE])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def called_by(monkeypatch):
    """Makes a program with such arguments, variables and working folder the one that has started the build."""
    programs = []

    def call(*arguments, cwd=None, program=sys.executable, **variables):
        command = [program, "-c", "import time; time.sleep(60)", *map(str, arguments)]
        variables = {"PATH": "", **{name: str(value) for name, value in variables.items()}}
        programs.append(subprocess.Popen(command, executable=sys.executable, cwd=cwd, env=variables))
        monkeypatch.setattr(os, "getppid", lambda: programs[-1].pid)
        while b"time.sleep" not in Path(f"/proc/{programs[-1].pid}/cmdline").read_bytes():  # still this program's
            time.sleep(0.01)

    yield call
    for program in programs:
        program.kill()
        program.wait()


def test_no_torch_is_required_of_an_index():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (requires,) = [line for line in lines if line.startswith("requires = ")]
    assert "torch" not in requires.partition("#")[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_environment_is_that_of_the_caller(backend, make_environment, called_by, tmp_path):
    """uv's --python, then the activated one, then .venv in the folder or above, then the PATH."""
    env, active, own = make_environment("env"), make_environment("active"), make_environment("project/.venv")
    deep, on_path = tmp_path / "project" / "deep", make_environment("on_path")
    deep.mkdir()
    (env / "bin").mkdir()
    (env / "bin" / "python").symlink_to(sys.executable)
    variables = {"VIRTUAL_ENV": active, "PATH": f"/nowhere:{on_path}/bin"}
    expected = [env, active, own, on_path]
    for python in (["--python", env / "bin/python"], [f"--python={env}"], ["-p", "../../env/bin/python"]):
        called_by("pip", "install", *python, ".", cwd=deep, program="uv", **variables)
        found = [Path(os.path.normpath(prefix)) for prefix in backend.called_for()]
        assert list(dict.fromkeys(found)) == expected
    called_by("-m", "build", program=str(env / "bin" / "python"), cwd=deep, VIRTUAL_ENV=active)
    assert list(dict.fromkeys(backend.called_for())) == expected[:3]
    called_by(program="uv", cwd="/", CONDA_PREFIX=active)
    assert list(backend.called_for()) == [active]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_only_the_first_environment_counts(backend, make_environment, called_by, hidden, monkeypatch):
    """One without torch must not be given what was built against the torch of another."""
    env, other = make_environment("env"), make_environment("other", "2.13.0")
    monkeypatch.setattr(sys, "prefix", str(Path(backend.setuptools.__file__).parents[1]))
    called_by("--python", env, program="uv", VIRTUAL_ENV=other)
    with pytest.raises(SystemExit) as stopped:
        backend.find_torch()
    message = str(stopped.value)
    assert "pip install torch" in message and "--no-build-isolation" in message
    assert message.endswith(f"Looked in:\n  {env / backend.LIBRARY}")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cpu", "3.0.0a0+git123"])
def test_that_torch_is_put_last_in_the_path(backend, make_environment, hidden, monkeypatch, capsys, version):
    packages = make_environment("env", version) / backend.LIBRARY
    monkeypatch.setattr(backend, "environment", lambda: [packages])
    backend.find_torch()
    assert sys.path[-1] == str(packages)
    assert capsys.readouterr().out == f"fastclip is built against torch {version} in {packages}\n"


def test_an_old_torch_is_told(backend, make_environment, hidden, monkeypatch):
    monkeypatch.setattr(backend, "environment", lambda: [make_environment("env", "2.10.1+cu128") / backend.LIBRARY])
    with pytest.raises(SystemExit, match=r"needs torch 2\.11 or newer, and this is torch 2\.10\.1\+cu128 in .*env"):
        backend.find_torch()


def test_without_isolation_it_is_the_torch_that_imports(backend, capsys):
    before = list(sys.path)
    backend.find_torch()
    assert sys.path == before and f"torch {torch.__version__} in {SITE}" in capsys.readouterr().out
