"""One rank of the distributed tests: runs cases together with the other ranks, and writes down what failed.

`tests/distributed/test_distributed.py` starts all ranks with gloo. By hand, also on GPUs:

    torchrun --nproc-per-node 2 -m tests.distributed.worker --folder out --backend nccl
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.project import ROOT

from .compare import CASES, place

PASSED = "passed"
SECONDS = 30  # after which a collective that some rank has not called is given up


def results_folder(folder, world_size):
    """Beside it, the checkpoints that one number of ranks saves and others load."""
    results = Path(folder) / f"{world_size}_ranks"
    results.mkdir(parents=True, exist_ok=True)
    return results


def start_ranks(world_size, folder, cases, seconds=240):
    """Runs the cases of these names on `world_size` ranks; returns {name: {rank: "passed" or what went wrong}}.

    A rank that waits for another one in vain is given up after half a minute, and all after `seconds`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-m", "tests.distributed.worker", "--folder", folder, "--cases", *cases]
    folder = results_folder(folder, world_size)
    ranks = []
    for rank in range(world_size):
        with (folder / f"log.{rank}").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
            )
    deadline = time.monotonic() + seconds
    for process in ranks:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {name: {rank: _outcome(folder, name, rank) for rank in range(world_size)} for name in cases}


def _outcome(folder, name, rank):
    results = folder / f"results.{rank}.json"
    results = json.loads(results.read_text()) if results.exists() else {}
    return results.get(name, "did not run. The end of its log:\n" + (folder / f"log.{rank}").read_text()[-2000:])


def run_cases(cases, store, save):
    """All ranks run each case; after one that failed on any of them, they no longer wait for the same and stop."""
    results = {}
    warnings.filterwarnings("error", message=".*plain torch")  # the kernels take every shard
    for name, run in cases.items():
        torch.manual_seed(0)
        try:
            run()
            results[name] = PASSED
        except Exception:
            results[name] = traceback.format_exc()
        save(results)
        store.set(f"{name}/{dist.get_rank()}", str(results[name] == PASSED))
        if not all(store.get(f"{name}/{rank}") == b"True" for rank in range(dist.get_world_size())):
            break
    return results


def main():
    # These fill CASES.
    from . import (  # noqa: F401
        accumulation,
        checkpoints,
        deferred,
        deltas,
        disagreement,
        histories,
        in_deepspeed,
        models,
        pieces,
        placements,
        quantized,
        scalers,
        scopes,
        stages,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--folder", type=Path, required=True, help="for results, and checkpoints: saved on 2 ranks")
    parser.add_argument("--cases", nargs="*", help="names; all that this number of ranks can run by default")
    arguments = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if arguments.backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    results_in = results_folder(arguments.folder, world_size)
    meeting = "env://" if "MASTER_ADDR" in os.environ else f"file://{(results_in / 'store').absolute()}"
    dist.init_process_group(
        arguments.backend, init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=SECONDS)
    )
    place.device_type = "cpu" if arguments.backend == "gloo" else "cuda"
    place.folder = arguments.folder
    names = arguments.cases or [name for name, (_, sizes) in CASES.items() if world_size in sizes]
    store = dist.distributed_c10d._get_default_store()

    def save(results):
        (results_in / f"results.{rank}.json").write_text(json.dumps(results))

    results = run_cases({name: CASES[name][0] for name in names}, store, save)
    for name, result in results.items():
        if result != PASSED:
            print(f"rank {rank}: {name}\n{result}", file=sys.stderr)
    failed = [name for name in names if results.get(name) != PASSED]
    if rank == 0:
        print(f"{len(names) - len(failed)} of {len(names)} cases passed on {world_size} ranks")
    dist.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
