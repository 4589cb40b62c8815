"""pytest, where steps are taken by the CUDA kernels on the emulated device: which schedule, which device."""

import os
import zlib

import pytest

import fastclip

from . import emulator


def pytest_report_header():
    return f"fastclip: {emulator.LIBRARY}, {fastclip.build_info()['cpu_capability']}"


@pytest.fixture(autouse=True)
def emulated_device(request):
    """FASTCLIP_SCHEDULE chooses one of emulator.SCHEDULES; FASTCLIP_COOPERATIVE=0 a device that can't run all blocks of
    a launch at once."""
    two_blocks = 512  # threads: what the registers of the kernels leave room for on an H100
    cooperative = int(os.environ.get("FASTCLIP_COOPERATIVE", "1"))
    emulator.set_device(threads_per_multiprocessor=two_blocks, cooperative=cooperative)
    seed = zlib.crc32(request.node.name.encode())
    emulator.set_schedule(os.environ.get("FASTCLIP_SCHEDULE", "in order"), seed)
