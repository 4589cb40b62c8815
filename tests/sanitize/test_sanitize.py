"""`make sanitize` in short: what it plants fits the code, what is reported counts, and OpenMP is understood."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import CSRC, ROOT

from . import __main__ as sanitize
from . import build
from .planted import BUGS

needs_tsan = pytest.mark.skipif(not os.path.isabs(build.library("libtsan.so")), reason="needs GCC's libtsan")
REPORT = "WARNING: ThreadSanitizer: data race (pid=1)\n"
UNDEFINED = "...\nplan.cpp:3:5: runtime error: signed integer overflow\n    #0 here\n"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_what_is_to_be_planted_fits_the_code(bug):
    assert (CSRC / bug.file).read_text().count(bug.right) == 1
    assert (ROOT / bug.test.split("::")[0]).exists() and bug.sanitizer in sanitize.TESTS
    assert bug.test.split("::")[0].removeprefix("tests/") in sanitize.TESTS[bug.sanitizer]


def test_the_tests_that_have_to_find_them_are_there():
    tests = sorted({bug.test for bug in BUGS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_compiler_without_sanitizers_is_told(monkeypatch, capsys):
    monkeypatch.setattr(build, "library", lambda name: name)  # what gcc prints where it has none
    assert sanitize.main([]) == 2
    said = capsys.readouterr().out
    assert "needs GCC with libasan.so and libubsan.so" in said and "needs GCC with libtsan.so" in said


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """The first one, with nothing to build, no bug to plant, and no tests yet."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    monkeypatch.setattr(sanitize, "BUGS", [])
    monkeypatch.setattr(build.Sanitizer, "build", lambda self, log: None)
    monkeypatch.setattr(build.Sanitizer, "why_not", lambda self: "")
    return build.SANITIZERS[0]


@pytest.mark.parametrize(
    ("printed", "reported", "result", "code"),
    [
        ("7 passed, 2 skipped in 1 s", None, "no report in 7 tests", 0),
        ("7 passed, 2 skipped in 1 s", REPORT, "1 REPORTS", 1),
        ("1 failed, 7 passed in 1 s", None, "FAILED", 1),
        ("1 passed, 1 error in 1 s", None, "FAILED", 1),
        ("no tests ran", None, "FAILED", 1),
        ("....", None, "FAILED", 1),
        (UNDEFINED, None, "1 REPORTS", 1),
    ],
    ids=["clean", "report", "failed", "error", "no tests", "died", "undefined"],
)
def test_what_counts_as_found(printed, reported, result, code, sanitizer, monkeypatch, capsys):
    def run(command, log, *arguments, **options):
        Path(log).write_text(printed + "\n")
        if reported:
            (Path(log).parent / "report.1").write_text(reported)

    monkeypatch.setattr(sanitize, "run", run)
    assert sanitize.main(["--only", sanitizer.name]) == code
    said = capsys.readouterr().out
    assert result in said and (f"sanitize: {'FAILED' if code else 'passed'}") in said
    if reported:
        assert REPORT in said


def test_without_the_planted_bugs_found_no_test_is_run(sanitizer, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "BUGS", BUGS[:1])
    monkeypatch.setattr(sanitize, "plant", lambda bug, sanitizer, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(sanitize, "run", lambda command, log, *a, **o: Path(log).write_text("3 passed in 1 s\n"))
    assert sanitize.main(["--only", sanitizer.name]) == 1
    said = capsys.readouterr().out
    assert "NOT FOUND" in said and "no report" not in said


OPENMP = """
#include <omp.h>
#include <cstdio>
int main() {
  long shares[2] = {}, sum = 0;
  for (int pass = 0; pass < 100; ++pass) {
    #pragma omp parallel num_threads(2)
    shares[omp_get_thread_num()] += PLACE(sum, pass);
    sum += shares[0] + shares[1];
  }
  std::printf("%ld\\n", sum);
}
"""
SOUND, RACE = "[](long&, int pass) { return pass; }", "[](long& sum, int pass) { return pass + sum++; }"


@needs_tsan
@pytest.mark.parametrize(
    ("place", "with_openmp", "races"), [(SOUND, False, True), (SOUND, True, False), (RACE, True, True)]
)
def test_openmps_promises_are_known_and_nothing_more(place, with_openmp, races, tmp_path):
    """Without them each region looks like a race; with them, a race between its threads is still seen."""
    source, program = tmp_path / "openmp.cpp", tmp_path / "program"
    source.write_text(OPENMP.replace("PLACE", place))
    subprocess.run([build.COMPILER, "-c", "-O1", build.HERE / "openmp.cpp", "-o", tmp_path / "promises.o"], check=True)
    objects = [tmp_path / "promises.o"] if with_openmp else []
    subprocess.run(
        [build.COMPILER, "-O1", "-g1", "-fopenmp", "-fsanitize=thread", source, *objects, "-o", program], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this ThreadSanitizer does not know this kernel's addresses")
    assert ("data race" in result.stderr) == races, result.stderr
