"""The workshop: what CI, pre-commit and the issue template name is there, and all name the same versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastclip
from tests.support.project import load_setup

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
PROJECT = (ROOT / "pyproject.toml").read_text()


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


WORKFLOW = load(".github/workflows/ci.yml")


def commands_of(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_commands_that_the_makefile_has():
    jobs = WORKFLOW["jobs"]
    assert set(jobs) == {"lint", "test", "thorough", "sanitize", "arm"}
    for name, job in jobs.items():
        targets = [target for run in commands_of(job) for target in re.findall(r"^make (\w+)", run, re.MULTILINE)]
        assert targets == [name]
    assert set(jobs) <= TARGETS


def test_the_workflow_takes_the_oldest_and_the_newest():
    (requires,) = re.findall(r'requires-python = ">=([\d.]+)"', PROJECT)
    pythons = re.findall(r"Python :: (3\.\d+)", PROJECT)
    oldest_torch = load_setup().torches.OLDEST
    (newest_torch,) = re.findall(r"^TORCH \?= torch==([\d.]+)$", MAKEFILE, re.MULTILINE)
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == [pythons[0], pythons[-1]] and pythons[0] == requires
    assert matrix["torch"] == [f"{oldest_torch}.0", newest_torch]


def test_the_workflow_of_wheels_makes_and_tests_one_for_each_python():
    jobs = load(".github/workflows/wheels.yml")["jobs"]
    commands = {name: [run for run in commands_of(job) if run.startswith("make ")] for name, job in jobs.items()}
    assert {name: [run.split()[1] for run in runs] for name, runs in commands.items()} == {
        name: [name] for name in jobs
    }
    assert set(jobs) == {"wheel", "matrix", "arm"} and set(jobs) <= TARGETS
    pythons = re.findall(r"Python :: (3\.\d+)", PROJECT)
    for name in ("wheel", "matrix"):
        assert jobs[name]["strategy"]["matrix"]["python"] == pythons
    assert "--wheels dist" in commands["matrix"][0] and "--wheel dist" in commands["arm"][0]


def test_the_linters_of_the_workflow_are_those_of_requirements():
    install = commands_of(WORKFLOW["jobs"]["lint"])[0]
    for name in ("ruff", "clang-format"):
        assert name in install and name in PINS


def test_pre_commit_has_the_versions_of_requirements():
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]
    named = dict(pin.split("==") for hook in hooks for pin in hook["additional_dependencies"])
    assert named == {name: PINS[name] for name in ("ruff", "clang-format")}
    ids = {hook["id"] for hook in hooks}
    assert ids == {"ruff", "ruff-format", "clang-format"}
    assert all(re.search(rf"^\t.*{tool}", MAKEFILE, re.MULTILINE) for tool in named)


def test_the_issue_template_asks_for_what_python_m_fastclip_prints():
    template = load(".github/ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= set(template)
    required = {field["id"]: field for field in template["body"] if field["validations"]["required"]}
    assert "`python -m fastclip`" in required["environment"]["attributes"]["description"]
    assert (ROOT / "fastclip/__main__.py").exists()


def test_an_installed_package_holds_the_types_and_the_one_version(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_py",
        "--build-lib",
        tmp_path,
        "egg_info",
        "--egg-base",
        tmp_path,
    ]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    assert {"py.typed", "_C.pyi", "__init__.py"} <= {path.name for path in (tmp_path / "fastclip").iterdir()}
    information = (tmp_path / "fastclip.egg-info/PKG-INFO").read_text()
    assert f"\nVersion: {fastclip.__version__}\n" in information
    assert fastclip.__version__ not in PROJECT
