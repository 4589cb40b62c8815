"""python -m benchmarks gpu-session: all that there is to do on a machine with a GPU, in one go; `make gpu` calls it.

Builds, compares the device with the CPU, runs the tests on it, the benchmark, compute-sanitizer, ncu and the demo. A
step that fails, or whose tool is absent, stops no other but the build's. Needs no network. Each step has a log in the
folder.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .report import gpu as report
from .report.formats import columns

ROOT = Path(__file__).parents[1]
SECONDS = 465  # for all steps together
CUDA_TOOLS = "/usr/local/cuda/bin"  # where the tools are that PATH does not know
PACKAGES = ["pytest", "numpy", "tqdm", "matplotlib", "setuptools", "ninja"]

# Words of a log that tell that a tool can't work on this machine, whatever the program does.
NOT_HERE = {
    "ncu": [
        "ERR_NVGPUCTRPERM",
        "LibraryNotLoaded",
        "Profiling is not supported on",
        "Failed to initialize the profiler",
    ],
    "compute-sanitizer": ["Device not supported"],
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NAMES = ["build", "built for CUDA", "exercise", "tests", "benchmark", *SANITIZERS, "ncu value", "ncu norm", "demo"]
# The kernel of a step, by ncu's pattern.
KERNEL = "regex:step_kernel"


@dataclass
class Step:
    """A command with a time limit in seconds; steps with the same log are written into it one after the other."""

    name: str
    command: list
    limit: int
    log: str
    tool: str = ""  # has to be on PATH
    module: str = ""  # Python has to find it
    proof: str = ""  # a pattern that the output holds if the step has done its work
    environment: dict = field(default_factory=dict)
    optional: bool = False  # its failure is not the session's


@dataclass
class Outcome:
    step: str
    state: str  # ok, failed or absent
    seconds: float
    log: str
    reason: str = ""
    optional: bool = False


def main(arguments=None):
    """Returns the exit code: 2 without a GPU, 1 where a step failed, else 0."""
    options = parse(arguments)
    gpu = {"name": "none: a rehearsal", "capability": None} if options.device == "cpu" else find_gpu()
    if gpu is None:
        return 2
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    planned = steps(out, options, gpu["capability"])
    for old in {"gpu.json", "session.json"} | {step.log for step in planned}:
        (out / old).unlink(missing_ok=True)  # nothing of an earlier session is to be taken for this one's
    print(f"{gpu['name']}; logs and results: {out}", flush=True)
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        print(f"{sys.executable} has no {', '.join(missing)}: what needs them is left out or slower", flush=True)
    # Last on PATH: ninja lies beside a Python that was named by its path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), CUDA_TOOLS])
    outcomes = run_all([step for step in planned if not options.only or step.name in options.only], out)
    found = {"gpu": gpu, "python": sys.executable, "missing_packages": missing, "rehearsal": options.device == "cpu"}
    found["steps"] = [asdict(outcome) for outcome in outcomes]
    (out / "session.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{summary(outcomes)}\n\n{main_rows(out / 'gpu.json')}")
    return int(any(outcome.state == "failed" and not outcome.optional for outcome in outcomes))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-session", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="a folder; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STEP", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="the quick benchmark")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a rehearsal without a GPU")
    return parser.parse_args(arguments)


def find_gpu():
    """Returns name and compute capability of the GPU. Prints the reason and returns None if this Python has none."""
    try:
        import torch
    except ImportError:
        print(
            f"make gpu needs torch, and {sys.executable} has none. Name another: make gpu PYTHON=...", file=sys.stderr
        )
        return None
    if not torch.cuda.is_available():
        print(
            f"make gpu needs a GPU, and torch {torch.__version__} of {sys.executable} sees none: nothing was done. "
            "Is this torch built for CUDA? Name another Python: make gpu PYTHON=...",
            file=sys.stderr,
        )
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}


def steps(out, options, capability):
    """Returns all steps, the most important first, as the time may be up before the last."""
    python, device = sys.executable, options.device
    # For this GPU alone: all architectures take minutes.
    narrowed = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability} if capability else {}
    found = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 170, "build.log", environment=narrowed),
        Step("built for CUDA", [python, "-c", HAS_CUDA], 30, "build.log"),
        Step(
            "exercise",
            [python, "-m", "tests.cuda.exercise", "--device", device, *(["--small"] if device == "cpu" else [])],
            60,
            "exercise.log",
            proof=f"cases on {device}, 0 differ",
        ),
        Step(
            "tests",
            [python, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors"],
            120,
            "tests.log",
            module="pytest",
            proof=r"\d+ passed",
        ),
        Step("benchmark", benchmark(out, options), 170, "benchmark.log"),
    ]
    found += [sanitizer(tool, device) for tool in SANITIZERS]
    found += [ncu("value", device), ncu("norm", device), demo(out, device)]
    return found


HAS_CUDA = "import fastclip, sys; sys.exit(0 if fastclip.build_info()['cuda'] else 'built without CUDA: no nvcc found')"


def benchmark(out, options):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(out), "--seconds", "130"]
    return command + (["--quick"] if options.quick else []) + (["--device", "cpu"] if options.device == "cpu" else [])


def demo(out, device):
    """Trains the recogniser of `make demo` on the device. Its recordings are fetched on a machine with a network: carry
    .cache/speech along; without them, and without a synthesiser, this step fails alone."""
    command = [sys.executable, "-m", "examples.speech", "--device", device, "--epochs", "3", "--out", str(out / "demo")]
    return Step("demo", command, 90, "benchmark.log", proof=r"change <= 3 %", optional=True)


def sanitizer(tool, device):
    """Makes the step that runs a tool of compute-sanitizer over the exercise. Every tensor is an allocation of its own,
    so that an access just behind one is found. Errors of API calls that torch makes to find things out do not count."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return Step(
        tool,
        [*command, sys.executable, "-m", "tests.cuda.exercise", "--small", "--device", device],
        60,
        "sanitizer.log",
        tool="compute-sanitizer",
        proof=r"(?s)(?=.*cases on \w+, 0 differ)(?=.*SUMMARY: 0 (errors|hazards))",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def ncu(clip, device):
    """Profiles the kernel of a later step than the first, and leaves the clocks as they are."""
    command = ["ncu", "--set", "full", "--clock-control", "none", "-k", KERNEL]
    command += ["--launch-skip", "2", "--launch-count", "1"]
    return Step(
        f"ncu {clip}",
        [*command, sys.executable, "-m", "benchmarks", "profile", "--clip", clip, "--device", device],
        45,
        "ncu.log",
        tool="ncu",
        proof=r"\d+ pass(es)?\b",
        optional=True,
    )


def run_all(chosen, out):
    """Outcomes. After a failed build nothing else runs, as it would run an older build."""
    outcomes, end = [], time.monotonic() + SECONDS
    for number, step in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {step.name} ... ", end="", flush=True)
        broken = next((o.step for o in outcomes if o.log == "build.log" and o.state == "failed"), None)
        if broken:
            outcome = Outcome(step.name, "failed", 0.0, step.log, f"not run, as this failed: {broken}", step.optional)
        else:
            outcome = run(step, out, end - time.monotonic())
        outcomes.append(outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.state}, {outcome.seconds:.0f} s{reason}", flush=True)
    return outcomes


def run(step, out, left):
    """Runs a step for as long as its limit and the rest of the session's time allow."""

    def outcome(state, reason="", seconds=0.0):
        return Outcome(step.name, state, round(seconds, 1), step.log, reason, step.optional)

    if step.tool and not shutil.which(step.tool):
        return outcome("absent", f"no {step.tool} on PATH or in {CUDA_TOOLS}")
    if step.module and not importlib.util.find_spec(step.module):
        return outcome("absent", f"{sys.executable} has no {step.module}")
    if left <= 1:
        return outcome("failed", f"not run: the {SECONDS} s for all steps were over")
    start = time.monotonic()
    with open(out / step.log, "ab") as log:
        log.write(f"$ {' '.join(step.command)}\n".encode())
        log.flush()
        begin = log.tell()
        code = execute(step, log, min(step.limit, left))
    seconds = time.monotonic() - start
    text = (out / step.log).read_bytes()[begin:].decode(errors="replace")
    for sign in NOT_HERE.get(step.tool, []):
        if sign in text:
            return outcome("absent", f"{step.tool} can't work here: {sign}", seconds)
    if code is None:
        return outcome("failed", f"stopped after {seconds:.0f} s", seconds)
    if code != 0:
        return outcome("failed", f"exit code {code}: {last_line(text)}", seconds)
    if not re.search(step.proof, text):
        return outcome("failed", f"the log does not say {step.proof!r}", seconds)
    return outcome("ok", seconds=seconds)


def execute(step, log, limit):
    """Returns the exit code; None if the time was up. Ends all processes that the step has started."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def summary(outcomes):
    lines = [["step", "state", "seconds", "log", ""]]
    return columns(lines + [[o.step, o.state, f"{o.seconds:.0f}", o.log, o.reason] for o in outcomes])


def main_rows(path):
    """Returns the main results, and what to do with their file."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return "Nothing was measured: there is no gpu.json."
    if results["rehearsal"]:
        keep = "A rehearsal on the CPU: these are no GPU's times, and are not kept."
    else:
        keep = (
            f"To keep these: cp {path} benchmarks/results/gpu.json && "
            "python -m benchmarks report benchmarks/results/gpu.json --update docs/performance.md"
        )
    return f"{columns(report.summary(results))}\n\n{keep}"
