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
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "distribution" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def callers():
    return load("callers")


@pytest.fixture
def backend(callers, monkeypatch):
    for name, module in {"callers": callers, "torches": load("torches")}.items():
        monkeypatch.setitem(sys.modules, name, module)  # pip puts the folder in the path
    return load("backend")


@pytest.fixture
def make_environment(tmp_path):
    """Makes a folder that looks like a virtual environment of this Python, with a torch of this version."""

    def make(name, torch_version=None):
        prefix = tmp_path / name
        packages = prefix / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        packages.mkdir(parents=True)
        (prefix / "bin").mkdir()
        (prefix / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
        home = os.path.dirname(os.path.realpath(sys.executable))
        (prefix / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
        if torch_version:
            (packages / "torch").mkdir()
            (packages / "torch" / "__init__.py").touch()
            (packages / "torch" / "version.py").write_text(f"__version__ = '{torch_version}'\ncuda = None\n")
        return prefix

    return make


@pytest.fixture
def hidden(monkeypatch):
    """As in a build: no torch in the path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != SITE])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)


def test_no_torch_is_required_of_an_index():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (requires,) = [line for line in lines if line.startswith("requires = ")]
    assert "torch" not in requires.partition("#")[0]


@pytest.fixture
def environments(make_environment, tmp_path):
    names = ("env", "active", "project/.venv", "other/.venv", "conda", "on_path", "own=1")
    found = {name: make_environment(name) for name in names}
    (tmp_path / "project" / "deep").mkdir()
    return found


UV = [
    # arguments, variables (names of environments, or text), the environment that uv uses
    ("pip install --python {env}/bin/python .", {"VIRTUAL_ENV": "{active}"}, "env"),
    ("pip install --python={own=1} .", {"VIRTUAL_ENV": "{active}"}, "own=1"),
    ("pip install -p ../../env/bin/python .", {"VIRTUAL_ENV": "{active}"}, "env"),
    ("pip install --python 3.12 .", {"VIRTUAL_ENV": "{active}"}, "active"),
    ("pip install .", {"UV_PYTHON": "{env}/bin/python", "VIRTUAL_ENV": "{active}"}, "env"),
    ("pip install .", {"VIRTUAL_ENV": "{active}", "CONDA_PREFIX": "{conda}"}, "active"),
    ("pip install .", {"CONDA_PREFIX": "{conda}", "CONDA_DEFAULT_ENV": "asr"}, "conda"),
    ("pip install .", {"CONDA_PREFIX": "{conda}", "CONDA_DEFAULT_ENV": "base"}, "project/.venv"),
    ("pip install --system .", {"VIRTUAL_ENV": "{active}", "PATH": "/nowhere:{on_path}/bin"}, "on_path"),
    ("pip install .", {"UV_SYSTEM_PYTHON": "1", "VIRTUAL_ENV": "{active}", "PATH": "{on_path}/bin"}, "on_path"),
    ("sync", {"VIRTUAL_ENV": "{active}"}, "project/.venv"),
    ("sync --active", {"VIRTUAL_ENV": "{active}"}, "active"),
    ("sync --project ../../other", {"VIRTUAL_ENV": "{active}"}, "other/.venv"),
    ("run train.py", {"UV_PROJECT_ENVIRONMENT": "{env}"}, "env"),
    ("pip install " + 300 * "x", {"VIRTUAL_ENV": "{active}"}, "active"),
]


def filled(text, environments):
    """With the paths of environments in the place of their names."""
    for name, path in environments.items():
        text = text.replace("{" + name + "}", str(path))
    return text


@pytest.mark.parametrize(("arguments", "variables", "name"), UV)
def test_the_environment_is_the_one_that_uv_uses(arguments, variables, name, callers, environments, tmp_path):
    command = ["/usr/bin/uv", *(filled(argument, environments) for argument in arguments.split())]
    variables = {key: filled(value, environments) for key, value in variables.items()}
    found = callers.environment_of(command, variables, tmp_path / "project" / "deep")
    assert os.path.normpath(found) == str(environments[name])


def test_the_environment_of_build_and_of_others(callers, environments, tmp_path):
    env, active = environments["env"], environments["active"]

    def found(*command, **variables):
        return callers.environment_of([str(word) for word in command], variables, tmp_path)

    assert found(env / "bin" / "python", "-m", "build", VIRTUAL_ENV=str(active)) == env
    assert found("env/bin/python", "-m", "build") == env
    assert found(env / "bin/python", env / "bin/pyproject-build", VIRTUAL_ENV=str(active)) == active  # as under pipx
    assert found(env / "bin/python", env / "bin/pyproject-build") == env
    for pip in ([env / "bin/pip", "install", "."], [env / "bin/python", "-m", "pip", "install", "."], ["bash"]):
        assert found(*pip, VIRTUAL_ENV=str(active)) is None
    assert found("uv", "pip", "install", ".") is None


@needs_proc
def test_what_a_process_was_started_with_is_read(callers, environments):
    """Also where a variable is no text."""
    command = ["uv", "-c", "import time; time.sleep(60)", "--python", str(environments["env"])]
    program = subprocess.Popen(command, executable=sys.executable, env={"PATH": "", "ODD": b"\xff"})
    try:
        while b"time.sleep" not in Path(f"/proc/{program.pid}/cmdline").read_bytes():  # still this program's
            time.sleep(0.01)
        assert callers.environment_of_caller(program.pid) == environments["env"]
    finally:
        program.kill()
        program.wait()
    assert callers.environment_of_caller(program.pid) is None  # gone


def test_an_environment_is_asked_for_its_folders(callers, make_environment):
    env = make_environment("env")
    (packages,) = env.glob("lib/python*/site-packages")
    assert callers.folders_of(env) == [packages]


def test_only_the_first_environment_counts(backend, callers, environments, hidden, monkeypatch):
    """One without torch must not be given what was built against the torch of another."""
    monkeypatch.setattr(callers, "environment_of_caller", lambda process: environments["env"])
    with pytest.raises(SystemExit) as stopped:
        backend.find_torch()
    message = str(stopped.value)
    assert "pip install torch" in message and "--no-build-isolation" in message
    assert message.endswith("Looked in:\n  " + str(next(environments["env"].glob("lib/python*/site-packages"))))
    monkeypatch.setattr(backend, "environment", lambda: [])
    with pytest.raises(SystemExit, match="found no environment"):
        backend.find_torch()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cpu", "3.0.0a0+git123"])
def test_its_folders_are_put_last_in_the_path(
    backend, make_environment, hidden, monkeypatch, capsys, version, tmp_path
):
    (packages,) = make_environment("env", version).glob("lib/python*/site-packages")
    (tmp_path / "rest" / "torch" / "lib").mkdir(parents=True)  # left over by an installation: no torch
    monkeypatch.setattr(backend, "environment", lambda: [tmp_path / "rest", packages])
    sys.path.insert(0, str(tmp_path / "rest"))
    backend.find_torch()
    assert sys.path[-2:] == [str(packages), str(tmp_path / "rest")]
    assert capsys.readouterr().out == f"fastclip is built against torch {version} in {packages}\n"


def test_an_old_torch_is_told(backend, make_environment, hidden, monkeypatch):
    (packages,) = make_environment("env", "2.10.1+cu128").glob("lib/python*/site-packages")
    monkeypatch.setattr(backend, "environment", lambda: [packages])
    with pytest.raises(SystemExit, match=r"needs torch 2\.11 or newer, and this is torch 2\.10\.1\+cu128 in .*env"):
        backend.find_torch()
    (packages / "torch" / "version.py").write_text("")
    with pytest.raises(SystemExit, match="version.py does not say which torch this is. Install torch again"):
        backend.find_torch()


def test_without_isolation_it_is_the_torch_that_imports(backend, capsys):
    before = list(sys.path)
    backend.find_torch()
    assert sys.path == before and f"torch {torch.__version__} in {SITE}" in capsys.readouterr().out
