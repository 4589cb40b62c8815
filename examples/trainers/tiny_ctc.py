"""The part that the recipes share, without fastclip: a CTC recogniser, made-up speech, options, the last line."""

import argparse
import contextlib
import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

BANDS, SYMBOLS, STRIDE = 40, 10, 2
MOMENTUM = 0.9
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # the choices of --amp


def utterances(count, seed):
    """Returns a list of {"features": [frames, BANDS], "targets": [3 to 6]}: a spectrum for each symbol, plus noise."""
    random = torch.Generator().manual_seed(seed)
    spectra = torch.randn(SYMBOLS, BANDS, generator=random)
    made = []
    for _ in range(count):
        symbols = torch.randint(SYMBOLS, (int(torch.randint(3, 7, (), generator=random)),), generator=random)
        durations = torch.randint(6, 11, symbols.shape, generator=random)
        features = spectra[symbols].repeat_interleave(durations, dim=0)
        noise = torch.randn(features.shape, generator=random)
        made.append({"features": features + noise, "targets": 1 + symbols})  # 0 is CTC's blank
    return made


def collate(batch):
    """Pads; the keys are the arguments of `TinyCTC.forward`."""
    return {
        "features": pad_sequence([u["features"] for u in batch], batch_first=True),
        "feature_lengths": torch.tensor([len(u["features"]) for u in batch]),
        "targets": pad_sequence([u["targets"] for u in batch], batch_first=True),
        "target_lengths": torch.tensor([len(u["targets"]) for u in batch]),
    }


def loader(options):
    """Batches of the same utterances in the same order, whichever recipe asks."""
    return torch.utils.data.DataLoader(utterances(options.utterances, options.seed), options.batch, collate_fn=collate)


class TinyCTC(nn.Module):
    """Convolution, GRU, CTC: 38 thousand parameters, and gradients that need clipping."""

    def __init__(self, hidden=64):
        super().__init__()
        self.conv = nn.Conv1d(BANDS, hidden, 5, stride=STRIDE, padding=2)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS + 1)

    def forward(self, features, feature_lengths, targets, target_lengths):
        """Returns {"loss": summed over each utterance, averaged over the batch}, as Hugging Face's Trainer wants it."""
        hidden = self.conv(features.transpose(1, 2)).relu().transpose(1, 2)
        hidden, _ = self.gru(hidden)
        log_probs = self.head(hidden).float().log_softmax(-1).transpose(0, 1)
        lengths = (feature_lengths - 1) // STRIDE + 1
        total = nn.functional.ctc_loss(log_probs, targets, lengths, target_lengths, reduction="sum")
        return {"loss": total / len(features)}


class Log:
    """Loss and `clip_stats` of each step, left on the device and read once, at the end."""

    def __init__(self):
        self.losses, self.stats = [], []

    def add(self, loss, stats):
        self.losses.append(loss.detach())
        self.stats.append(stats)

    def __str__(self):
        losses = [loss.item() for loss in self.losses]
        last = self.stats[-1]
        parts = [f"{len(losses)} steps", f"loss {losses[0]:.1f} -> {losses[-1]:.1f}"]
        if last.total_norm is not None:
            clipped = sum(bool(stats.clip_coefficient < 1) for stats in self.stats)
            parts += [f"last norm {last.total_norm.item():.2f}", f"{clipped / len(losses):.0%} of the steps clipped"]
        if last.clamped_fraction is not None:
            clamped = sum(stats.clamped_fraction.item() for stats in self.stats) / len(losses)
            parts.append(f"{clamped:.1%} of the elements clamped")
        return ", ".join([*parts, f"{last.skipped_steps.item()} skipped"])


def _number(kind, at_least):
    def parse(text):
        with contextlib.suppress(ValueError):
            if kind(text) >= at_least:
                return kind(text)
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} of at least {at_least}")

    return parse


def parse(about, arguments=None):
    """Returns the options that all recipes have; `about` is the recipe's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, size = parser.add_argument, _number(int, 1), _number(float, 0)
    add("--epochs", type=count, metavar="N", default=5, help="default: %(default)s")
    add("--utterances", type=count, metavar="N", default=320, help="made up for an epoch (default: %(default)s)")
    add("--batch", type=count, metavar="N", default=8, help="utterances per batch (default: %(default)s)")
    add("--accumulate", type=count, metavar="N", default=2, help="batches per step (default: %(default)s)")
    add("--lr", type=size, metavar="X", default=0.02, help="learning rate (default: %(default)s)")
    add("--max-norm", type=size, metavar="X", default=5.0, help="norm clip; inf only measures (default: %(default)s)")
    add("--clip-value", type=size, metavar="X", help="value clip: gradients in [-X, X] (default: none)")
    add(
        "--amp",
        choices=["no", "bf16", "fp16"],
        default="no",
        help="mixed precision; few trainers have fp16 on the CPU (default: %(default)s)",
    )
    add("--cpu", action="store_true", help="stay on the CPU even with a GPU")
    add("--seed", type=_number(int, 0), metavar="N", default=0, help="of data and model (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.utterances % (options.batch * options.accumulate) != 0:
        parser.error("--utterances must be a multiple of --batch times --accumulate: whole steps only")
    options.device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    options.steps = options.epochs * options.utterances // (options.batch * options.accumulate)
    return options


def run(about, train, arguments=None):
    """The command line of a recipe, whose `train(options)` returns the model and a Log."""
    options = parse(about, arguments)
    torch.manual_seed(options.seed)
    try:
        _, log = train(options)
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    print(log)
