"""What a result depends on: the machine, the versions, the commit."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastclip

ROOT = Path(__file__).parents[1]
# Results are written before they are committed, which makes the code that gave them no other.
NOT_CODE = [":!benchmarks/results", ":!README.md"]


def describe(arguments):
    """Everything that is known before a run starts."""
    return {
        "machine": machine(),
        "versions": versions(),
        **revision(),
        "command": " ".join(["python -m benchmarks.cpu", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine():
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions():
    info = fastclip.build_info()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastclip": fastclip.__version__,
        "compiler": info["compiler"],
        "capability": info["cpu_capability"],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def revision():
    """The commit, and whether the code differs from it."""
    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--", ".", *NOT_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def git(*arguments):
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
