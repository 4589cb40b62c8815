"""docs/compatibility.md: what it says is backed by tests that are there."""

import ast
import re
from functools import cache

import pytest

from tests.support.project import ROOT

DOCUMENT = (ROOT / "docs/compatibility.md").read_text()
TRAPS = 54
TEST = re.compile(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`")


def rows_of(text):
    """The cells of each row of each table, without heads and rules."""
    lines = text.splitlines()
    heads = {i - 1 for i, line in enumerate(lines) if re.fullmatch(r"\|(-+\|)+", line)}
    tables = [line for i, line in enumerate(lines) if line.startswith("|") and not {i, i - 1} & heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]


def traps_of(text):
    """{number: cells} of the rows that start with one."""
    numbered = [(int(cells[0]), cells[1:]) for cells in rows_of(text) if cells[0].isdigit()]
    assert len(dict(numbered)) == len(numbered), "a number is there twice"
    return dict(numbered)


@cache
def found_in(file):
    """{test: whether it needs a GPU} of what pytest finds in a file; of two tests of one name it finds one."""
    if not (ROOT / file).exists():
        return {}
    body = ast.parse((ROOT / file).read_text()).body
    marks = [ast.unparse(node) for node in body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    of_test = {t.name: [*marks, *map(ast.unparse, t.decorator_list)] for t in tests}
    assert len(of_test) == len(tests), f"{file} holds two tests of one name"
    return {name: any("pytest.mark.cuda" in mark for mark in of_test[name]) for name in of_test}


def problems(text):
    found = []
    for *cells, tests in rows_of(text):
        row = cells[0] if not cells[0].isdigit() else f"trap {cells[0]}"
        if not all(cells):
            found.append(f"{row}: an empty cell")
        named = TEST.findall(tests)
        if not named or TEST.sub("", tests).strip():
            found.append(f"{row}: tests must be named as `tests/folder/test_file.py::test_name`")
        found += [f"{row}: there is no {file}::{name}" for file, name in named if name not in found_in(file)]
        if named and all(found_in(file).get(name) for file, name in named) and "*GPU*" not in " ".join(cells):
            found.append(f"{row}: its tests need a GPU, and it does not say so")
    return found


def test_every_row_names_tests_that_exist():
    assert len(rows_of(DOCUMENT)) > 100
    assert not problems(DOCUMENT)


def test_every_trap_has_a_row():
    assert sorted(traps_of(DOCUMENT)) == list(range(1, TRAPS + 1))


def test_the_text_names_tests_that_exist():
    for file, name in TEST.findall(DOCUMENT):
        assert name in found_in(file)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "::test_same_bits_as_the_loop`",
            "::test_that_was_renamed`",
            "there is no tests/step/test_step.py::test_that",
        ),
        ("`tests/step/test_large.py::", "`tests/step/test_gone.py::", "there is no tests/step/test_gone.py::"),
        (
            "| `tests/concurrency/test_parallel_regions.py::",
            "| see tests/concurrency/test_parallel_regions.py::",
            "trap 36: tests must be named",
        ),
        ("| *GPU*: the wrong stream", "| the wrong stream", "trap 29: its tests need a GPU"),
        ("| noticed at the next step |", "| |", "trap 37: an empty cell"),
    ],
)
def test_what_is_missing_is_found(old, new, problem):
    assert old in DOCUMENT
    assert any(problem in found for found in problems(DOCUMENT.replace(old, new)))


def test_a_trap_that_is_missing_or_there_twice_is_found():
    lines = DOCUMENT.splitlines()
    row = next(line for line in lines if line.startswith("| 17 |"))
    assert 17 not in traps_of(DOCUMENT.replace(row, ""))
    with pytest.raises(AssertionError, match="there twice"):
        traps_of(DOCUMENT + "\n" + row)
