"""The file of a result, and what a result depends on: the machine, the versions, the commit."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastclip

ROOT = Path(__file__).parents[2]
# Results and their tables are written before they are committed: the code that gave them is still the commit's.
NOT_CODE = [":!benchmarks/results", ":!README.md", ":!docs/performance.md"]


def describe(arguments, command):
    """Returns everything that is known before a run starts."""
    return {
        "machine": machine(),
        "versions": versions(),
        **revision(),
        "command": " ".join([command, *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(found, path):
    """Writes JSON with every list of numbers on one line."""
    text = json.dumps({"schema": 1, **found}, indent=1)
    path.write_text(re.sub(r"\[[-+\d.eE,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def machine():
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def gpu():
    """Returns the current CUDA device, for the results of a GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver(),
    }


def driver():
    """Returns the version of NVIDIA's driver; None if nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


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
        "cuda": torch.version.cuda,
        "nvcc": info["cuda"],
        "fastclip": fastclip.__version__,
        "compiler": info["compiler"],
        "capability": info["cpu_capability"],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def revision():
    """Returns the commit, and whether the code differs from it.

    Where the code came without its history, FASTCLIP_COMMIT may tell the commit; whether it differs is unknown then.
    """
    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--", ".", *NOT_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("FASTCLIP_COMMIT"), "dirty": None}


def git(*arguments):
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
