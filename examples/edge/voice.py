"""A voice that the model has not heard, split so that no recording is both adapted to and tested on."""

import dataclasses
import random

from ..speech.batches import extract
from ..speech.data import DIGIT_RATE, UNHEARD_VOICES, Speech, digit_clips, digit_string
from ..support.console import SpeechDataError

FOLDS = 5  # each leaves out the recordings of two digits, and adapts to the other eight


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many strings there are."""

    train: int = 1200
    test: int = 120  # of the voices that are trained on
    adapt: int = 30  # of the new voice, in each fold
    new: int = 60  # of the new voice to test on, in each fold, of each kind


@dataclasses.dataclass
class Fold:
    """Strings of the new voice. `adapt` and `same` share eight recordings; no other string has those of `new`."""

    left_out: tuple  # the digits of `new`
    adapt: list
    same: list
    new: list


@dataclasses.dataclass
class Task:
    speech: Speech
    voice: str
    train: list  # examples of `extract`, as in all lists here
    test: list
    folds: list


def left_out(fold):
    """Returns the digits that a fold does not adapt to. Over all folds each digit comes once."""
    return tuple(range(fold, 10, FOLDS))


def make_task(cache, seed, voice=None, sizes=None):
    """Returns strings of all voices but one to train on, and the folds of that one; raises SpeechDataError."""
    sizes = sizes or Sizes()
    kind, clips = digit_clips(cache)
    voice = voice or UNHEARD_VOICES[kind][0]
    if voice not in clips:
        raise SpeechDataError(f"there is no voice {voice!r} in the {kind} digits, but {', '.join(clips)}")
    heard, make = [clips[name] for name in clips if name != voice], random.Random(seed)
    train, test = ([digit_string(heard, make) for _ in range(n)] for n in (sizes.train, sizes.test))
    of_folds = []
    for fold in range(FOLDS):
        kept = [digit for digit in range(10) if digit not in left_out(fold)]
        for count, digits in ((sizes.adapt, kept), (sizes.new, kept), (sizes.new, left_out(fold))):
            of_folds.append([digit_string([clips[voice]], make, digits=digits) for _ in range(count)])
    caption = f"{kind} digits, {len(heard)} voices to train on; new voice: {voice}, {FOLDS} folds of its 10 recordings"
    speech = Speech(kind, caption, DIGIT_RATE, list("0123456789"), train, test, sum(of_folds, []))
    train, test, unheard = extract(speech, per_utterance=True)
    unheard = iter(unheard)
    of_folds = [[next(unheard) for _ in strings] for strings in of_folds]
    folds = [Fold(left_out(fold), *of_folds[3 * fold : 3 * fold + 3]) for fold in range(FOLDS)]
    return Task(speech, voice, train, test, folds)
