"""Types: mypy takes the package, finds a user's mistakes, and _C.pyi names what the extension has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip import _C

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("typed_program.py")


@pytest.fixture(scope="module")
def found():
    """[(file, line, error code)] of what mypy says of the package and of the program."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "fastclip", str(PROGRAM)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert not result.stderr, result.stderr
    errors = re.findall(r"^(.+?):(\d+): error: .+  \[([\w-]+)\]$", result.stdout, re.MULTILINE)
    return [(Path(file).name, int(line), code) for file, line, code in errors]


def test_the_package_has_no_error(found):
    assert not [error for error in found if error[0] != PROGRAM.name]


def test_errors_in_a_users_program_are_found_and_nothing_else(found):
    expected = [
        (PROGRAM.name, number, code)
        for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
        for code in line.partition("# error: ")[2].split()
    ]
    assert len(expected) > 10
    assert sorted(error for error in found if error[0] == PROGRAM.name) == expected


def test_the_stub_names_what_the_extension_has():
    stub = ast.parse((ROOT / "fastclip/_C.pyi").read_text())
    defined = {node.name: node for node in stub.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert sorted(defined) == sorted(name for name in vars(_C) if not name.startswith("_"))
    for name, node in defined.items():
        if isinstance(node, ast.ClassDef):
            methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)} - {"__init__"}
            assert methods == {name for name in vars(getattr(_C, name)) if not name.startswith("_")}, name
