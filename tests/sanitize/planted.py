"""Bugs that are planted into the C++, one by one: the test that meets one has to end in the report it deserves."""

import shutil
from dataclasses import dataclass

from tests.support.project import CSRC


@dataclass(frozen=True)
class Bug:
    name: str
    sanitizer: str
    file: str  # in csrc
    right: str
    wrong: str
    test: str
    report: str  # a regular expression
    unit: str = ""  # the source that is compiled, where the file is a header


STEP_BY_THREADS = "tests/concurrency/test_threads.py::test_two_optimizers_in_two_threads"
BUGS = [
    Bug(
        "a write past the end",
        "address",
        "host/part.cpp",
        "measures = at::empty({needs.measures * kDoubles}",
        "measures = at::empty({needs.measures * kDoubles - 1}",
        "tests/step/test_norm.py",
        r"AddressSanitizer: (heap-buffer-overflow|unknown-crash)[\s\S]*WRITE of size 24",
    ),
    Bug(
        "memory that another thread may free",
        "address",
        "host/engine.cpp",
        "if (gil_is_released) walk_.borrowed().hold_all();",
        "",
        "tests/concurrency/test_threads.py::test_gradients_replaced_meanwhile[large-plain]",
        "heap-use-after-free",
    ),
    Bug(
        "a misaligned address",
        "address",
        "host/part.cpp",
        "static_cast<Outcome*>(outcome_.mutable_data_ptr())",
        "reinterpret_cast<Outcome*>(static_cast<char*>(outcome_.mutable_data_ptr()) + 4)",
        "tests/step/test_norm.py",
        "runtime error: member access within misaligned address",
    ),
    Bug(
        "a signed overflow",
        "address",
        "host/part.cpp",
        "step.elements >= kElementsToReleaseGil",
        "step.elements * (int64_t{1} << 62) >= kElementsToReleaseGil",
        "tests/step/test_norm.py",
        "runtime error: signed integer overflow",
    ),
    Bug(
        "a leak where an error is raised",
        "address",
        "host/reasons.cpp",  # a text: what holds others is on a list of Python's, and so in reach
        "return checked(PyUnicode_FromString(text.c_str()));",
        "return Held(PyUnicode_FromString(text.c_str()));",
        "tests/step/test_errors.py",
        "LeakSanitizer: detected memory leaks",
    ),
    Bug(
        "a counter that is not atomic",
        "thread",
        "cpu/chunks.h",
        "std::atomic<int64_t> fetched{0};",
        "struct { int64_t i; int64_t fetch_add(int64_t n, std::memory_order) { return (i += n) - n; } } fetched{0};",
        STEP_BY_THREADS,
        "data race",
        unit="cpu/step.cpp",
    ),
    Bug(
        "a chunk that two threads take",
        "thread",
        "cpu/chunks.h",
        "std::min(begin + at_once, chunks)",
        "std::min(begin + at_once + 1, chunks)",
        STEP_BY_THREADS,
        "data race",
        unit="cpu/step.cpp",
    ),
    Bug(
        "memory that all optimizers share",
        "thread",
        "cpu/measures.h",
        "  Sums sums{};\n  for (int64_t chunk",
        "  static Sums sums;\n  sums = {};\n  for (int64_t chunk",
        STEP_BY_THREADS,
        "data race",
        unit="cpu/step.cpp",
    ),
]


def plant(bug, sanitizer, folder):
    """Builds fastclip with `bug` in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    csrc = shutil.copytree(CSRC, folder / "csrc")
    text = (csrc / bug.file).read_text()
    assert text.count(bug.right) == 1, f"{bug.name}: what is to be replaced is there {text.count(bug.right)} times"
    (csrc / bug.file).write_text(text.replace(bug.right, bug.wrong))
    sanitizer.build_variant(folder, bug.unit or bug.file, csrc, folder / "build.log")
