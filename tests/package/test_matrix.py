"""make matrix: what README and docs say of versions is what its last run found; and what a cell does with a failure."""

import json
import sys

import pytest

from tests.matrix import __main__ as matrix
from tests.matrix.cell import Cell, CellError
from tests.support.project import ROOT, load_setup

RESULTS = [
    {"torch": "2.11.0", "python": "3.11.7", "tests": "5 passed"},
    {"torch": "2.9.1", "python": "3.10.2", "tests": "6 passed, 1 skipped"},
    {"torch": "2.14.1+cpu", "python": "3.9.2", "tests": "4 passed"},
]


def test_the_line_names_the_span():
    assert matrix.line(RESULTS) == "Tested with torch 2.9 to 2.14 and Python 3.9 to 3.11."
    assert "| 2.9.1 | 3.10.2 | 6 passed, 1 skipped |" in matrix.table(RESULTS).splitlines()


class OneFails:
    def __init__(self, python, torch, folder, wheels=None):
        self.torch = torch

    def run(self):
        if self.torch == "2.13":
            raise CellError("the tests: 300 skipped")
        return RESULTS[0]


def test_what_did_not_all_pass_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "Cell", OneFails)
    monkeypatch.setattr(matrix, "find_python", lambda minor: sys.executable)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(matrix, "write_into", lambda *_: pytest.fail("was written"))
    monkeypatch.setattr(sys, "argv", ["tests.matrix", "--folder", str(tmp_path / "cells")])
    assert matrix.main() == 1
    said = capsys.readouterr().out
    assert "torch 2.13: FAILED: the tests: 300 skipped" in said and "torch 2.14: 5 passed" in said
    assert not (tmp_path / "versions.json").exists()
    monkeypatch.setattr(matrix, "find_python", lambda minor: sys.executable if minor == "3.11" else None)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "Python 3.10"])
    assert matrix.main() == 1


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
    assert [torch for python, torch in matrix.cells(own) if python == own] == list(matrix.TORCHES)
    project, torches = (ROOT / "pyproject.toml").read_text(), load_setup().torches
    assert [release for layout in torches.LAYOUTS.values() for release in layout] == list(matrix.TORCHES)
    assert [matrix.TORCHES[0], matrix.TORCHES[-1]] == [torches.OLDEST, torches.NEWEST]
    named = {line.split(":: ")[-1].strip('",') for line in project.splitlines() if "Python :: 3." in line}
    assert named == set(matrix.PYTHONS)


def test_a_cell_that_fails_says_where(tmp_path):
    with pytest.raises(CellError, match="(?s)^a virtual environment: .*no such thing"):
        cell = Cell(sys.executable, "2.13", tmp_path / "cell")
        cell._call("a virtual environment", sys.executable, "-c", "raise SystemExit('no such thing')")
    assert matrix.find_python("2.99") is None
