"""Runs a script in a Python of its own."""

import os
import subprocess
import sys


def run_script(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
