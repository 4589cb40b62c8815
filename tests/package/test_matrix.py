"""make matrix: what README and docs say of versions is what its last run found; and what a cell does with a failure."""

import json
import sys

import pytest

from tests.matrix import __main__ as matrix
from tests.matrix.cell import Cell, CellError
from tests.support.project import ROOT

RESULTS = [
    {"torch": "2.11.0", "python": "3.11.7", "tests": "5 passed", "passed": True},
    {"torch": "2.9.1", "python": "3.10.2", "tests": "failed", "passed": False},
    {"torch": "2.14.1+cpu", "python": "3.9.2", "tests": "4 passed", "passed": True},
]


def test_the_line_names_what_passed():
    assert matrix.line(RESULTS) == "Tested with torch 2.11 to 2.14 and Python 3.9 to 3.11."
    assert "| 2.9.1 | 3.10.2 | failed |" in matrix.table(RESULTS).splitlines()


@pytest.mark.parametrize(("file", "text_of"), [("README.md", matrix.line), ("docs/install.md", matrix.table)])
def test_the_documents_say_what_was_found(file, text_of):
    recorded = json.loads((ROOT / "docs/versions.json").read_text())
    assert not recorded["dirty"] and recorded["command"] == "python -m tests.matrix"
    assert (
        matrix.PLACE.search((ROOT / file).read_text())[0].splitlines()[1:-1]
        == text_of(recorded["results"]).splitlines()
    )


def test_every_supported_version_is_in_it():
    own = "{}.{}".format(*sys.version_info)
    assert [torch for python, torch in matrix.cells() if python == own] == list(matrix.TORCHES)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={matrix.TORCHES[0]}"' in project
    named = {line.split(":: ")[-1].strip('",') for line in project.splitlines() if "Python :: 3." in line}
    assert named <= set(matrix.PYTHONS)


def test_a_cell_that_fails_says_where(tmp_path):
    with pytest.raises(CellError, match="(?s)^a virtual environment: .*no such thing"):
        cell = Cell(sys.executable, "2.13", tmp_path / "cell")
        cell._call("a virtual environment", sys.executable, "-c", "raise SystemExit('no such thing')")
    assert matrix.find_python("2.99") is None
