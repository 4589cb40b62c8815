"""Trains a small Conformer with ESPnet's own program on spoken digits, with and without fastclip.

    python -m examples.recipe

`espnet2.bin.asr_train` is run three times as it is installed, from the same seed: with torch's Adam, with torch's fused
Adam, and with the command line of the first under `python -m fastclip.run`. conformer.yaml is ESPnet's recipe for an4,
smaller. `espnet2.bin.asr_inference` then recognises the strings that no run was trained on. In each run an epoch is
logged by ESPnet itself; a stopwatch around clip and update gives the times, one run after the other.

The three Adams round differently, and a training makes much of that: error rates differ by chance.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.core import record

from ..speech.data import digit_strings
from ..support.console import RunError, exit_code_of, programs_stopped_too, progress
from ..support.options import count, make_folder, number
from . import report
from .corpus import write_corpus

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STOPWATCH = ["-m", "examples.recipe.stopwatch"]
RUNS = {  # by name: what stands before the stopwatch, and more options of ESPnet's
    "torch": (STOPWATCH, []),
    "torch, fused": (STOPWATCH, ["--optim_conf", "fused=true"]),
    "fastclip.run": (["-m", "fastclip.run", *STOPWATCH], []),
}
SOME_BATCHES = re.compile(r"(\d+)epoch:train:\d+-(\d+)batch")


def train(name, corpus, folder, options):
    launcher, more = RUNS[name]
    data = [
        f"--{split}_data_path_and_name_and_type={corpus / part / file},{kind}"
        for split, part in (("train", "train"), ("valid", "test"))
        for file, kind in (("wav.scp", "speech,sound"), ("text", "text,text"))
    ]
    shapes = [
        f"--{split}_shape_file={corpus / part / 'shape'}" for split, part in (("train", "train"), ("valid", "test"))
    ]
    command = [
        *launcher, folder / "times.json", "espnet2.bin.asr_train", "--config", HERE / "conformer.yaml", "--ngpu", "0",
        "--output_dir", folder, "--use_preprocessor", "true", "--token_list", corpus / "tokens.txt", *data, *shapes,
        "--max_epoch", options.epochs, "--seed", options.seed, *more,
    ]  # fmt: skip
    strings = len((corpus / "train" / "shape").read_text().splitlines())
    with progress(total=options.epochs, desc=name, unit="epoch", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        for line in run(command, folder / "train.log", options.threads):
            if found := SOME_BATCHES.search(line):
                epoch, batch = map(int, found.groups())
                bar.n = min(epoch, epoch - 1 + 16 * batch / strings)
                bar.refresh()


def recognise(corpus, folder, options):
    command = [
        "-m", "espnet2.bin.asr_inference", "--asr_train_config", folder / "config.yaml",
        "--asr_model_file", folder / f"{options.epochs}epoch.pth", "--output_dir", folder / "decoded", "--ngpu", "0",
        "--data_path_and_name_and_type", f"{corpus / 'test' / 'wav.scp'},speech,sound",
        "--ctc_weight", "1.0", "--beam_size", "3",
    ]  # fmt: skip
    for _ in run(command, folder / "decode.log", options.threads):
        pass


def run(command, log, threads):
    """Runs a Python program, yields the lines that it says and writes them to `log`; raises RunError."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as file:
        program = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment,
        )  # fmt: skip
        try:
            for line in program.stdout:
                file.write(line)
                yield line
        finally:
            program.terminate()
            code = program.wait()
    if code != 0:
        last = "".join(log.read_text().splitlines(keepends=True)[-3:])
        raise RunError(f"a program of ESPnet's failed; its log is {log}, and ends with\n{last}")


def run_all(options):
    """Returns the exit code."""
    began = time.perf_counter()
    if importlib.util.find_spec("espnet2") is None:
        raise RunError("ESPnet is not installed: pip install --no-deps -r requirements-toolkits.txt")
    speech = digit_strings(options.cache, options.seed)
    print(f"Data: {speech.caption}.")
    print(f"{len(speech.train)} to train on, {len(speech.test)} to test; {options.threads} thread(s).", flush=True)
    make_folder(options.out)
    out = options.out.resolve()
    write_corpus(speech, out / "corpus")
    command = shlex.join(["python", "-m", "examples.recipe", *options.arguments])
    surroundings, results = record.describe([], command), {}
    for name in RUNS:
        folder = out / name.replace(", ", "_")
        make_folder(folder)
        for old in folder.glob("*.pth"):  # ESPnet would go on from them
            old.unlink()
        train(name, out / "corpus", folder, options)
        recognise(out / "corpus", folder, options)
        results[name] = report.result_of(folder, out / "corpus" / "test")
        if len(results[name]["epochs"]) != options.epochs:
            raise RunError(f"{folder / 'train.log'} does not have the results of {options.epochs} epochs")
    print("\n" + report.tables(results) + "\n")
    print("The runs came one after the other: a step without its clip and update is the same work in all of them.")
    through = [line for line in (out / "fastclip.run" / "train.log").read_text().splitlines() if "fastclip: " in line]
    print("\n".join(through))
    numbers = options.out / "recipe.json"
    found = {
        "data": speech.caption,
        "settings": {"epochs": options.epochs, "seed": options.seed, "threads": options.threads},
        **surroundings,
        "through_fastclip": through,
        "results": results,
    }
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{numbers}, and ESPnet's logs beside it ({time.perf_counter() - began:.0f} s in all)")
    return 0


def parse_arguments(arguments=None):
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m examples.recipe",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    cores = record.machine()["cores"]
    add("--epochs", type=count, metavar="N", default=6, help="default: %(default)s")
    add("--seed", type=number(int, 0), metavar="N", default=0, help="of data and model (default: %(default)s)")
    add("--threads", type=count, metavar="N", default=cores, help="of torch (default: all cores, here %(default)s)")
    add("--cache", type=Path, metavar="DIR", default=ROOT / ".cache" / "speech",
        help="where the fetched clips are kept (default: .cache/speech in the repository)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", default=Path("recipe_output"), help="for the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    if "," in str(options.out.resolve()):
        parser.error("--out: ESPnet can't have a comma in the name of a folder")
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    with programs_stopped_too():
        return exit_code_of(run_all, options)


if __name__ == "__main__":
    sys.exit(main())
