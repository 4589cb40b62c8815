"""docs/compatibility.md and tests/compatibility.csv: each row has tests that exist, and each test has a row."""

import ast
import csv
import re
from functools import cache

import pytest

from tests.support.project import ROOT

DOCUMENT = (ROOT / "docs/compatibility.md").read_text()
TESTS = (ROOT / "tests/compatibility.csv").read_text()
TRAPS = 54  # the rows of "What goes wrong elsewhere"; all others have larger numbers


def rows_of(text):
    """{number: cells} of the rows of all tables that have numbers."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| *\d+ *\|", line)]
    rows = [(int(number), [cell.strip() for cell in cells]) for number, *cells in lines]
    assert len(dict(rows)) == len(rows), "a number is there twice"
    return dict(rows)


def listed_in(text):
    """{number: tests} of the csv."""
    found = {}
    for line in csv.DictReader(text.splitlines()):
        found.setdefault(int(line["row"]), []).append(line["test"])
    return found


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


def needs_gpu(test):
    """None where there is no such test."""
    file, _, name = test.partition("::")
    return found_in(file).get(name)


def problems(document, tests):
    rows, tests = rows_of(document), listed_in(tests)
    found = [f"row {number}: no tests" for number in rows.keys() - tests.keys()]
    found += [f"row {number} is not in the document" for number in tests.keys() - rows.keys()]
    for number, cells in rows.items():
        named = tests.get(number, [])
        if not all(cells):
            found.append(f"row {number}: an empty cell")
        if len(set(named)) < len(named):
            found.append(f"row {number}: a test is there twice")
        found += [f"row {number}: there is no {test}" for test in named if needs_gpu(test) is None]
        if named and all(map(needs_gpu, named)) and "*GPU*" not in " ".join(cells):
            found.append(f"row {number}: its tests need a GPU, and it does not say so")
    return found


def test_every_row_has_tests_that_exist():
    assert len(rows_of(DOCUMENT)) > 100
    assert not problems(DOCUMENT, TESTS)


def test_every_trap_has_a_row():
    assert sorted(number for number in rows_of(DOCUMENT) if number < 100) == list(range(1, TRAPS + 1))


def test_every_table_has_numbers():
    """A row without one would escape these tests. The first table explains words."""
    lines = [line for line in DOCUMENT.split("\n## ", 1)[1].splitlines() if line.startswith("|")]
    unnumbered = {line for line in lines if not re.match(r"\| *\d+ *\|", line)}
    assert unnumbered == {"| # | what | here |", "| # | goes wrong elsewhere | here |", "|---|---|---|"}


def test_the_csv_is_in_order():
    numbers = list(listed_in(TESTS))
    assert numbers == list(rows_of(DOCUMENT))


def test_the_text_links_to_files_that_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", DOCUMENT)
    assert links and all((ROOT / "docs" / link).exists() for link in links)


@pytest.mark.parametrize(
    ("in_document", "old", "new", "problem"),
    [
        (
            False,
            "::test_same_bits_as_the_loop\n",
            "::test_renamed\n",
            "there is no tests/step/test_step.py::test_renamed",
        ),
        (False, "tests/step/test_large.py::", "tests/step/test_gone.py::", "there is no tests/step/test_gone.py::"),
        (False, "\n36,", "\n37,", "row 36: no tests"),
        (False, "\n36,", "\n99,", "row 99 is not in the document"),
        (True, "| *GPU*: the wrong stream", "| the wrong stream", "row 29: its tests need a GPU"),
        (True, "| noticed at the next step |", "| |", "row 37: an empty cell"),
    ],
)
def test_what_is_missing_is_found(in_document, old, new, problem):
    document = DOCUMENT.replace(old, new) if in_document else DOCUMENT
    tests = TESTS if in_document else TESTS.replace(old, new)
    assert (document, tests) != (DOCUMENT, TESTS)
    assert any(problem in found for found in problems(document, tests))


def test_a_test_that_is_there_twice_is_found():
    line = TESTS.splitlines()[-1]
    assert f"row {line.split(',')[0]}: a test is there twice" in problems(DOCUMENT, f"{TESTS}{line}\n")


def test_a_trap_that_is_missing_or_there_twice_is_found():
    lines = DOCUMENT.splitlines()
    row = next(line for line in lines if line.startswith("| 17 |"))
    assert 17 not in rows_of(DOCUMENT.replace(row, ""))
    with pytest.raises(AssertionError, match="there twice"):
        rows_of(DOCUMENT + "\n" + row)
