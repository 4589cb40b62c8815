"""A pytest plugin: memory that was allocated while a test ran and that nothing refers to any more, at the end of all.

LeakSanitizer looks at what the tests themselves allocate (Python, numpy and torch leak a little when they are
imported), and while the interpreter is still there to refer to what it uses.
"""

import ctypes
import gc

import pytest

sanitizer = ctypes.CDLL(None)
sanitizer.__lsan_disable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    sanitizer.__lsan_enable()
    try:
        return (yield)
    finally:
        sanitizer.__lsan_disable()


def pytest_sessionfinish(session):
    gc.collect()
    if sanitizer.__lsan_do_recoverable_leak_check():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
