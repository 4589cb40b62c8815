"""One cell of the clipping study: the data of its seed, and one training."""

import dataclasses
import math
import random
import re
import time
from collections import Counter
from statistics import mean, median, quantiles

import torch

from examples.speech.batches import BATCH, batches_of_like_length, ctc_loss, error_rate, extract
from examples.speech.data import DIGIT_RATE, Speech, digit_clips, digit_string, own_recordings
from examples.speech.models import CNN, Conformer, SpeechModel, SplicedDNN

from .clips import Clip
from .situation import BadBatches, Situation, spoilt_corpus

# Small, so that a cell takes seconds: the effect of a clip is in the comparison, not in the best of error rates.
# Functions of the number of symbols and the width.
MODELS = {
    "gru": lambda symbols, width: SpeechModel(symbols, hidden=width, layers=1),
    "cnn": lambda symbols, width: CNN(symbols, channels=width),
    "lstm": lambda symbols, width: SpeechModel(symbols, hidden=width, layers=1, cell=torch.nn.LSTM),
    "dnn": lambda symbols, width: SplicedDNN(symbols, hidden=width),
    "conformer": lambda symbols, width: Conformer(symbols, hidden=width),
}
MAX_DIGITS, TEST_STRINGS, MOMENTUM = 2, 200, Situation().momentum
WINDOW, PATIENCE = 20, 100  # steps whose mean loss is looked at; steps in which a bad start may still come right
LOST = 1.5  # times the untrained model's loss: a training that crawls stays below it
CURVE_POINTS = 20


@dataclasses.dataclass(frozen=True)
class Cell:
    model: str
    kind: str  # a key of clips.CLIPS
    threshold: float | None
    lr: float
    seed: int


@dataclasses.dataclass
class Data:
    """Examples as `extract` makes them."""

    speech: Speech
    train: list
    test: list
    unheard: list  # strings of a voice that is not in `train`; may be empty

    @property
    def device(self):
        return self.train[0][0].device


def load_data(folder, cache, seed, strings, device="cpu"):
    """The recordings in `folder`, or else `strings` strings of digits of all voices but one, which is for a test.

    The other test has new strings of the trained voices: made of clips that are in the training strings, too.
    """
    if folder:
        speech = own_recordings(folder)
        return Data(speech, *extract(speech, device=device))
    kind, voices = digit_clips(cache)
    held_out = held_out_voice(voices, seed)
    known = [clips for voice, clips in voices.items() if voice != held_out]
    make = random.Random(seed)
    made = [digit_string(known, make, MAX_DIGITS) for _ in range(strings + TEST_STRINGS)]
    unheard = [digit_string([voices[held_out]], make, MAX_DIGITS) for _ in range(TEST_STRINGS)] if held_out else []
    caption = f"{kind} digits, strings of 1 to {MAX_DIGITS}, {len(known)} voices"
    train, test = made[TEST_STRINGS:], made[:TEST_STRINGS]
    speech = Speech(kind, caption, DIGIT_RATE, list("0123456789"), train, test, unheard)
    return Data(speech, *extract(speech, device=device))


def held_out_voice(voices, seed):
    """Returns a voice whose language another one speaks, too: no other could be recognised. None if there is none."""
    languages = {voice: re.match("[a-z]+", voice)[0] for voice in voices}
    speakers = Counter(languages.values())
    candidates = [voice for voice in voices if speakers[languages[voice]] > 1]
    return candidates[seed % len(candidates)] if candidates else None


def diverges(losses, norm, untrained):
    """Returns whether a loss or norm is not finite, or, after PATIENCE steps, losses are far above the untrained."""
    return not math.isfinite(losses[-1] + norm) or (
        len(losses) > PATIENCE and mean(losses[-WINDOW:]) > LOST * untrained
    )


@torch.no_grad()
def mean_loss(model, examples):
    """Returns the mean over all batches, not the first: a batch holds strings of like length, and so of like loss."""
    every = range(0, len(examples), BATCH)
    return mean(ctc_loss(examples[start : start + BATCH])(model).item() for start in every)


def train_cell(cell, data, epochs, situation=Situation()):  # noqa: B008  which is frozen
    """Trains a cell, and returns the rest of its row: a dict.

    A training that diverges is stopped; its error rates are recorded as 100.
    """
    began = time.process_time()
    torch.manual_seed(cell.seed)
    model = MODELS[cell.model](len(data.speech.symbols), situation.width).to(data.device)
    params = list(model.parameters())
    clip = Clip(cell, params, situation)
    train = spoilt_corpus(data.train, situation, cell.seed)
    bad = BadBatches(situation, cell.seed)
    order = torch.Generator().manual_seed(cell.seed)
    untrained = mean_loss(model, train)
    losses, norms, clipped, diverged = [], [], [], False
    batches = (batch for _ in range(epochs) for batch in batches_of_like_length(train, order))
    for step, batch in enumerate(batches):
        clip.optimizer.zero_grad()
        examples = [train[i] for i in batch]
        loss = backward(model, bad.spoil(examples) if step in bad else examples, situation.scale, clip)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in params]).item())
        losses += [] if step in bad else [loss]  # the loss of a bad batch says nothing
        if diverged := diverges(losses, norms[-1], untrained):
            break
        clip.optimizer.step()
        clipped.append(clip.share())
    seconds = time.process_time() - began
    return {
        "diverged": int(diverged),
        "wer": 100.0 if diverged else error_rate(model, data.test, data.speech),
        "wer_new_voice": unheard_error_rate(model, data, diverged),
        "final_loss": mean(losses[-WINDOW:]),
        "steps": len(clipped),
        "clipped": mean(clipped) if clipped else math.nan,
        "norm_median": median(norms),
        "norm_p90": quantiles(norms, n=10)[-1] if len(norms) > 1 else norms[0],
        "parameters": sum(p.numel() for p in params),
        "cpu_seconds": seconds,
        "losses": curve(losses),
    }


def backward(model, examples, scale, clip):
    """Adds up the gradients of a batch, a part at a time; returns its loss."""
    total = 0.0
    for part in clip.parts(examples):
        with clip.clipped():
            loss = len(part) / len(examples) * ctc_loss(part)(model)
            (scale * loss).backward()
        total += loss.item()
    return total


def unheard_error_rate(model, data, diverged):
    """Returns the error rate on the unheard voice; NaN without one."""
    if not data.unheard:
        return math.nan
    return 100.0 if diverged else error_rate(model, data.unheard, data.speech)


def curve(losses):
    """Returns mean losses of up to CURVE_POINTS equal stretches of the training."""
    points = min(CURVE_POINTS, len(losses))
    edges = [round(i * len(losses) / points) for i in range(points + 1)]
    return [mean(losses[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
