"""The command line: python -m benchmarks COMMAND. Each command is a module, and only that one is loaded."""

import argparse
import importlib
import sys
import warnings

# Name: module, help.
COMMANDS = {
    "cpu": (".cpu", "time a step against the Python loop and the best of torch"),
    "gpu": (".gpu", "the same on a GPU, by events and CUDA graphs"),
    "hot": (".hot", "time what a norm would save that is taken in the backward pass"),
    "states": (".states", "time steps with states in 8 bits beside those in float32, and count their bytes"),
    "precision": (".precision", "time steps of 16-bit parameters beside the limit of the memory, and beside torch's"),
    "peers": (".peers", "time a step with and without a clip beside DeepSpeed, torch-optimi and others"),
    "host": (".host", "time what a step costs per tensor, for 100 to 100,000 tensors"),
    "limits": (".limits", "time limits on the change, and by past norms, against a norm clip"),
    "by-tensor": (".by_tensor", "time norms and limits of each tensor, ScaledAdam and LAMB, against AdamW with a clip"),
    "accumulation": (".accumulation", "time the clip and addition of a micro-batch against torch"),
    "deferred": (".deferred", "time a trainer's clip and step in each way to bring fastclip in"),
    "imports": (".imports", "time what importing fastclip adds to importing torch"),
    "large": (".large", "take real steps on the largest models: check samples, then time"),
    "report": (".report.documents", "write the tables of README and docs from result files"),
    "shapes": (".shapes", "compare the recorded shapes of models with the libraries that define them"),
    "profile": (".profile", "take a few steps of one contender, for a profiler to look at"),
    "gpu-session": (".gpu_session", "all that there is to do on a machine with a GPU; `make gpu` calls it"),
}


def main(arguments=None):
    """Returns the exit code of the command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks", epilog="COMMAND --help says what each one takes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    warnings.filterwarnings("ignore", "something clips these gradients")  # they never change here
    module, _ = COMMANDS[parser.parse_args(arguments[:1]).command]
    return importlib.import_module(module, __package__).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
