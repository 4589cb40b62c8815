"""Trains one speech recogniser four times in lockstep, to show what clipping does and what fastclip saves.

    python -m examples.speech_demo

All arms start from the same parameters and see the same batches; only the clip and the update differ:

    no clipping     torch.optim.SGD
    Python loop     for p in parameters: p.grad.clamp_(-d, d), then torch.optim.SGD
    fastclip        fastclip.SGD(clip_value=d), which has to end at the very bits of the Python loop
    no clipping, a tenth of the learning rate: it learns too, on the recordings in about twice the epochs

The data are strings of spoken digits (recordings in Debian packages; where these can't be had, a synthesiser), or your
own: --data takes a folder with wav files (16 bit PCM) and transcripts.txt, whose lines read file.wav<TAB>text.
"""

import argparse
import contextlib
import copy
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import fastclip

from . import speech_report
from .speech_console import SpeechDataError, progress
from .speech_data import digit_strings, own_recordings
from .speech_model import LogMel, SpeechModel, greedy_decode, output_length, word_error_rate

MOMENTUM, BATCH = 0.9, 16
LOOP = "Python loop"


class Arm:
    """One of the runs: a model, its optimizer, and what was measured."""

    def __init__(self, name, model, make_optimizer, clip=None):
        self.name = name
        self.model = copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.optimizer = make_optimizer(self.params)
        self.clip = clip
        self.losses, self.norms, self.norm_steps, self.step_seconds, self.update_seconds = [], [], [], [], []
        self.wer = None

    def step(self, batch, loss_of, measure_norm):
        """One step; its times are kept only where the norm, which warms the caches, was not taken."""
        features, lengths, targets, target_lengths = batch
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.model(features), targets, lengths, target_lengths) / len(lengths)
        loss.backward()
        if measure_norm:
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.params]).item())
            self.norm_steps.append(len(self.losses) + 1)
        before_update = time.perf_counter()
        if self.clip is not None:
            self.clip(self.params)
        self.optimizer.step()
        end = time.perf_counter()
        if not measure_norm:
            self.update_seconds.append(end - before_update)
            self.step_seconds.append(end - start)
        self.losses.append(loss.item())


def make_arms(model, lr, clip_value):
    def clip(params):
        for p in params:
            p.grad.clamp_(-clip_value, clip_value)

    def sgd(params):
        return torch.optim.SGD(params, lr, MOMENTUM)

    return [
        Arm("no clipping", model, sgd),
        Arm(LOOP, model, sgd, clip),
        Arm("fastclip", model, lambda params: fastclip.SGD(params, lr, MOMENTUM, clip_value=clip_value)),
        Arm(f"no clipping, lr {lr / 10:g}", model, lambda params: torch.optim.SGD(params, lr / 10, MOMENTUM)),
    ]


def extract(speech):
    """Normalised features and the targets of both sets: two lists of (features, target, text)."""
    mel = LogMel(speech.rate)
    both = speech.train + speech.test
    features = [mel(utterance.samples) for utterance in progress(both, desc="features", delay=1)]
    train_frames = torch.cat(features[: len(speech.train)])
    mean, std = train_frames.mean(0), train_frames.std(0).clamp_(min=1e-3)
    examples = [
        ((frames - mean) / std, torch.tensor([1 + speech.symbols.index(s) for s in utterance.text]), utterance.text)
        for frames, utterance in zip(features, both, strict=True)
    ]
    return examples[: len(speech.train)], examples[len(speech.train) :]


def collate(examples):
    """A batch: features, output lengths, targets end to end, and their lengths."""
    features, targets, _ = zip(*examples, strict=True)
    lengths = torch.tensor([output_length(len(frames)) for frames in features])
    target_lengths = torch.tensor([len(target) for target in targets])
    return pad_sequence(features, batch_first=True), lengths, torch.cat(targets), target_lengths


def batches_of_like_length(examples, generator):
    """All examples once, in random batches; sorting within pools of 8 batches keeps the padding small."""
    batches = []
    for pool in torch.randperm(len(examples), generator=generator).split(8 * BATCH):
        pool = sorted(pool.tolist(), key=lambda i: len(examples[i][0]))
        batches += [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield collate([examples[j] for j in batches[i]])


def train(arms, examples, epochs, seed):
    """Takes each step in all arms before the next, in changing order: what slows the machine slows all of them."""
    loss_of = torch.nn.CTCLoss(reduction="sum")
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(examples) / BATCH)
    taken = 0
    with progress(total=steps, desc="training", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            for batch in batches_of_like_length(examples, order):
                first = taken // 2 % len(arms)
                for arm in arms[first:] + arms[:first]:
                    arm.step(batch, loss_of, measure_norm=taken % 2 == 1)
                taken += 1
                if taken % 10 == 0 or taken == steps:
                    losses = "/".join(f"{arm.losses[-1]:.3g}" for arm in arms)
                    bar.set_postfix_str(f"epoch {epoch}/{epochs}, losses {losses}", refresh=False)
                bar.update()


@torch.no_grad()
def test(arms, examples, speech):
    """Sets each arm's word error rate."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    for arm in arms:
        wanted, got = [], []
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            features, lengths, *_ = collate(batch)
            decoded = greedy_decode(arm.model(features), lengths, speech.symbols)
            wanted += [speech.words(text) for _, _, text in batch]
            got += [speech.words(text) for text in decoded]
        arm.wer = word_error_rate(wanted, got)


def first_difference(one, other):
    """The first parameter or momentum buffer whose bits differ, or None; any NaN equals any other."""
    pairs = zip(one.model.named_parameters(), other.model.parameters(), strict=True)
    for (name, p), q in pairs:
        buffers = (arm.optimizer.state[x]["momentum_buffer"] for arm, x in ((one, p), (other, q)))
        for what, (a, b) in (("parameter", (p, q)), ("momentum buffer of", buffers)):
            same = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
            if not same.all():
                return f"{what} {name}, in {(~same).sum()} of {same.numel()} places"
    return None


def run(options):
    """Returns the exit code."""
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    speech = own_recordings(options.data) if options.data else digit_strings(options.cache, options.seed)
    print(f"Data: {speech.caption}.")
    if speech.kind != "own":
        print("So the error rate shows how well each arm optimises, not how well it generalises.")
    print(f"{len(speech.train)} to train on, {len(speech.test)} to test; {options.threads} thread(s).", flush=True)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpeechDataError(f"--out {options.out}: {error.strerror}") from None

    train_examples, test_examples = extract(speech)
    torch.manual_seed(options.seed)
    arms = make_arms(SpeechModel(len(speech.symbols)), options.lr, options.clip_value)
    train(arms, train_examples, options.epochs, options.seed)
    test(arms, test_examples, speech)

    difference = first_difference(arms[1], arms[2])
    rows = speech_report.summarise(arms, baseline=LOOP)
    print("\n" + speech_report.table(rows, speech.caption, baseline=LOOP) + "\n")
    picture, numbers = options.out / "speech_demo.png", options.out / "speech_demo.json"
    speech_report.draw(arms, speech.caption, picture)
    settings = {
        "command": shlex.join(["python", "-m", "examples.speech_demo", *options.arguments]),
        "epochs": options.epochs,
        "seed": options.seed,
        "lr": options.lr,
        "clip_value": options.clip_value,
        "momentum": MOMENTUM,
        "batch": BATCH,
        "identical_bits": difference is None,
    }
    speech_report.save(numbers, rows, arms, speech, settings)
    print(f"{picture}, {numbers} ({time.perf_counter() - began:.0f} s in all)")
    if difference is not None:
        print(f"error: the Python loop and fastclip differ: {difference}", file=sys.stderr)
        return 1
    steps = len(arms[1].losses)
    print(f"After {steps} steps the Python loop and fastclip agree in every bit of parameters and momentum buffers.")
    return 0


def _number(kind, low, above=False):
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low < value < math.inf or (value == low and not above):
                return value
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {'above' if above else 'of at least'} {low}")

    return parse


def parse_arguments(arguments=None):
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m examples.speech_demo",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count, positive = _number(int, 1), _number(float, 0, above=True)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="your own wav files and transcripts.txt")
    add("--cache", type=Path, metavar="DIR", default=Path(__file__).parents[1] / ".cache" / "speech",
        help="where the fetched clips are kept (default: .cache/speech in the repository)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", default=Path("demo_output"), help="for the results (default: %(default)s)")
    add("--epochs", type=count, metavar="N", default=10, help="default: %(default)s")
    add("--seed", type=_number(int, 0), metavar="N", default=0, help="of data, model and order (default: %(default)s)")
    add("--threads", type=count, metavar="N", default=1, help="of torch (default: %(default)s)")
    add("--clip-value", type=positive, default=0.01, metavar="D", help="gradients in [-D, D] (default: %(default)s)")
    add("--lr", type=positive, metavar="X", default=0.03, help="learning rate (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        return run(options)
    except SpeechDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("\nStopped; no results were written.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
