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


STEP_BY_THREADS = "tests/concurrency/test_threads.py::test_two_optimizers_in_two_threads"
BUGS = [
    Bug(
        "a write past the end",
        "address",
        "device_part.cpp",
        "measures = at::empty({measures_needed * kDoubles}",
        "measures = at::empty({measures_needed * kDoubles - 1}",
        "tests/step/test_norm.py",
        r"AddressSanitizer: (heap-buffer-overflow|unknown-crash)[\s\S]*WRITE of size 24",
    ),
    Bug(
        "memory that another thread may free",
        "address",
        "plan.cpp",
        "if (gil_is_released) walk_.borrowed().hold_all();",
        "",
        "tests/concurrency/test_threads.py::test_gradients_replaced_meanwhile[large-plain]",
        "heap-use-after-free",
    ),
    Bug(
        "a misaligned address",
        "address",
        "device_part.cpp",
        "static_cast<Outcome*>(outcome_.mutable_data_ptr())",
        "reinterpret_cast<Outcome*>(static_cast<char*>(outcome_.mutable_data_ptr()) + 4)",
        "tests/step/test_norm.py",
        "runtime error: member access within misaligned address",
    ),
    Bug(
        "a signed overflow",
        "address",
        "device_part.cpp",
        "step.elements >= kElementsToReleaseGil",
        "step.elements * (int64_t{1} << 62) >= kElementsToReleaseGil",
        "tests/step/test_norm.py",
        "runtime error: signed integer overflow",
    ),
    Bug(
        "a leak where an error is raised",
        "address",
        "groups.cpp",
        "  Py_DECREF(text);\n  return result;",
        "  return result;",
        "tests/step/test_errors.py",
        "LeakSanitizer: detected memory leaks",
    ),
    Bug(
        "a counter that is not atomic",
        "thread",
        "step_cpu.cpp",
        "std::atomic<int64_t> fetched{0};",
        "struct { int64_t i; int64_t fetch_add(int64_t n, std::memory_order) { return (i += n) - n; } } fetched{0};",
        STEP_BY_THREADS,
        "data race",
    ),
    Bug(
        "a chunk that two threads take",
        "thread",
        "step_cpu.cpp",
        "std::min(begin + kChunksPerFetch, chunks)",
        "std::min(begin + kChunksPerFetch + 1, chunks)",
        STEP_BY_THREADS,
        "data race",
    ),
    Bug(
        "memory that all optimizers share",
        "thread",
        "step_cpu.cpp",
        "  Measure sum = {};\n  for (int64_t chunk",
        "  static Measure sum;\n  sum = {};\n  for (int64_t chunk",
        STEP_BY_THREADS,
        "data race",
    ),
]


def plant(bug, sanitizer, folder):
    """Builds fastclip with `bug` in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = (CSRC / bug.file).read_text()
    assert text.count(bug.right) == 1, f"{bug.name}: what is to be replaced is there {text.count(bug.right)} times"
    source = folder / bug.file
    source.write_text(text.replace(bug.right, bug.wrong))
    sanitizer.build_variant(folder, source, folder / "build.log")
