"""Trains one speech recogniser five times in lockstep, to show what clipping does and what fastclip saves.

    python -m examples.speech

All arms start from the same parameters and see the same batches; only the clip and the update differ:

    no clipping     torch.optim.SGD
    Python loop     for p in parameters: p.grad.clamp_(-d, d), then torch.optim.SGD
    fastclip        fastclip.SGD(clip_value=d), which has to end at the very bits of the Python loop
    no clipping, a tenth of the learning rate: it learns too, on the recordings in about twice the epochs
    change <= 3 %, ten times the learning rate: fastclip.SGD(max_relative_change=0.03), and nothing tuned

The data are strings of spoken digits (recordings in Debian packages; where these can't be had, a synthesiser), or your
own: --data takes a folder with wav files (16 bit PCM) and transcripts.txt, whose lines read file.wav<TAB>text.
"""

import math
import shlex
import sys
import time

import torch

import fastclip

from ..support import lockstep
from ..support.console import exit_code_of, progress
from ..support.options import add_device, add_seed_and_threads, count, make_folder, make_parser, positive
from . import report
from .batches import BATCH, batches_of_like_length, ctc_loss, error_rate, extract
from .data import digit_strings, own_recordings
from .models import SpeechModel

MOMENTUM, CHANGE = 0.9, 0.03


def make_arms(model, lr, clip_value):
    slow = lockstep.Arm(
        f"no clipping, lr {lr / 10:g}", model, lambda params: torch.optim.SGD(params, lr / 10, MOMENTUM)
    )
    limited = lockstep.Arm(
        f"change <= {100 * CHANGE:g} %, lr {lr * 10:g}",
        model,
        lambda params: fastclip.SGD(params, lr * 10, MOMENTUM, max_relative_change=CHANGE),
    )
    return [*lockstep.make_arms(model, lr, MOMENTUM, clip_value), slow, limited]


def train(arms, examples, epochs, seed):
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(examples) / BATCH)
    taken = 0
    with progress(total=steps, desc="training", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            for batch in batches_of_like_length(examples, order):
                lockstep.step_all(arms, ctc_loss([examples[i] for i in batch]), taken)
                taken += 1
                if taken % 10 == 0 or taken == steps:
                    losses = "/".join(f"{arm.losses[-1]:.3g}" for arm in arms)
                    bar.set_postfix_str(f"epoch {epoch}/{epochs}, losses {losses}", refresh=False)
                bar.update()


def run(options):
    """Returns the exit code."""
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    speech = own_recordings(options.data) if options.data else digit_strings(options.cache, options.seed)
    print(f"Data: {speech.caption}.")
    if speech.kind != "own":
        print("So the error rate shows how well each arm optimises, not how well it generalises.")
    print(
        f"{len(speech.train)} to train on, {len(speech.test)} to test; {options.threads} thread(s), {options.device}.",
        flush=True,
    )
    make_folder(options.out)

    train_examples, test_examples, _ = extract(speech, device=options.device)
    torch.manual_seed(options.seed)
    arms = make_arms(SpeechModel(len(speech.symbols)).to(options.device), options.lr, options.clip_value)
    train(arms, train_examples, options.epochs, options.seed)
    for arm in arms:
        arm.wer = error_rate(arm.model, test_examples, speech)

    difference = lockstep.first_difference(arms[1], arms[2])
    rows = report.summarise(arms, baseline=lockstep.LOOP)
    print("\n" + report.table(rows, speech.caption, baseline=lockstep.LOOP) + "\n")
    picture, numbers = options.out / "speech_demo.png", options.out / "speech_demo.json"
    report.draw(arms, speech.caption, picture)
    settings = {
        "epochs": options.epochs,
        "seed": options.seed,
        "threads": options.threads,
        "device": lockstep.name_of(options.device),
        "lr": options.lr,
        "clip_value": options.clip_value,
        "momentum": MOMENTUM,
        "batch": BATCH,
        "identical_bits": difference is None,
    }
    command = shlex.join(["python", "-m", "examples.speech", *options.arguments])
    report.save(numbers, rows, arms, speech, settings, command)
    print(f"{picture}, {numbers} ({time.perf_counter() - began:.0f} s in all)")
    if reason := lockstep.why_not_equal(options.device):
        print(reason)
        return 0
    if difference is not None:
        print(f"error: the Python loop and fastclip differ: {difference}", file=sys.stderr)
        return 1
    steps = len(arms[1].losses)
    print(f"After {steps} steps the Python loop and fastclip agree in every bit of parameters and momentum buffers.")
    return 0


def parse_arguments(arguments=None):
    parser = make_parser("examples.speech", __doc__, out="demo_output")
    add_seed_and_threads(parser)
    add_device(parser)
    add = parser.add_argument
    add("--epochs", type=count, metavar="N", default=10, help="default: %(default)s")
    add("--clip-value", type=positive, default=0.01, metavar="D", help="gradients in [-D, D] (default: %(default)s)")
    add("--lr", type=positive, metavar="X", default=0.03, help="learning rate (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    return exit_code_of(run, options)


if __name__ == "__main__":
    sys.exit(main())
