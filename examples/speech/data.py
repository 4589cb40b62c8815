"""Utterances to train and test on: strings of spoken digits, or a folder of wav files with transcripts."""

import dataclasses
import random
import unicodedata
import wave
from pathlib import Path

import torch
import torch.nn.functional as F

from ..support.console import SpeechDataError
from .clips import find_clips
from .features import LogMel
from .models import output_length, outputs_needed

DIGIT_RATE, OWN_RATE = 8000, 16000
TRAIN_STRINGS, TEST_STRINGS, MAX_DIGITS = 1200, 300, 3
# To test on, and not trained on. Of the recordings one of the two Italian speakers: each other language has one alone.
UNHEARD_VOICES = {"recorded": ["it-menardi"], "synthetic": ["en-us+f4", "en+m5"]}
TRANSCRIPTS = "transcripts.txt"
UNKNOWN_SYMBOLS = {"Cc", "Cn", "Co", "Cs"}  # Unicode's control characters, and those that no script has


@dataclasses.dataclass
class Utterance:
    samples: torch.Tensor  # 1-D float32 in [-1, 1]
    text: str


@dataclasses.dataclass
class Speech:
    kind: str  # "recorded" or "synthetic" digits, or "own"
    caption: str
    rate: int
    symbols: list
    train: list
    test: list
    unheard: list = dataclasses.field(default_factory=list)  # strings of voices that neither of the others has

    def words(self, text):
        """Returns the units of the error rate: digits, or the words of a text."""
        return text.split() if self.kind == "own" else list(text)


def resample(samples, rate, new_rate):
    """Band-limited: cuts or pads the spectrum of a 1-D tensor."""
    if rate == new_rate:
        return samples
    length = max(1, round(len(samples) * new_rate / rate))
    spectrum = torch.fft.rfft(samples)[: length // 2 + 1]
    return torch.fft.irfft(spectrum, n=length) * (length / len(samples))


def read_wav(path, rate):
    """Reads a wav file of 16 bit PCM as one channel at `rate`; raises SpeechDataError."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, file_rate, frames = file.getparams()[:4]
            content = file.readframes(frames)
    except FileNotFoundError:
        raise SpeechDataError(f"{path}: no such file") from None
    except EOFError:
        raise SpeechDataError(f"{path}: not a wav file, or cut off within its header") from None
    except (wave.Error, RuntimeError) as error:
        raise SpeechDataError(f"{path}: not a wav file of 16 bit PCM ({error})") from None
    except OSError as error:
        raise SpeechDataError(f"{path}: {error.strerror}") from None
    if width != 2:
        raise SpeechDataError(f"{path}: {8 * width} bit samples, where 16 bit PCM is needed")
    if frames == 0:
        raise SpeechDataError(f"{path}: holds no samples")
    if not 1000 <= file_rate <= 1_000_000:
        raise SpeechDataError(f"{path}: its header says {file_rate} samples per second")
    if len(content) < frames * channels * width:
        has = len(content) // (channels * width)
        raise SpeechDataError(f"{path}: truncated, has {has} of the {frames} samples that its header announces")
    samples = torch.frombuffer(bytearray(content), dtype=torch.int16).float().div_(32768)
    return resample(samples.view(-1, channels).mean(1), file_rate, rate)


def digit_clips(cache):
    """Returns "recorded" or "synthetic", and per voice the samples of 0 to 9, without the silence around them."""
    kind, voices = find_clips(cache)
    return kind, {
        voice: [_without_silence(read_wav(path, DIGIT_RATE)) for path in paths] for voice, paths in voices.items()
    }


def digit_strings(cache, seed, train_strings=TRAIN_STRINGS, test_strings=TEST_STRINGS, unheard_strings=0):
    """Strings of 1 to 3 digits, each of one voice; train and test share the clips and nothing else.

    With `unheard_strings`, UNHEARD_VOICES leave both and speak this many strings of their own.
    """
    kind, clips = digit_clips(cache)
    unheard = [voice for voice in UNHEARD_VOICES[kind] if voice in clips] if unheard_strings else []
    heard = [voice for voice in clips if voice not in unheard]
    source = {
        "recorded": "recorded digits (Debian's Asterisk prompts)",
        "synthetic": "SYNTHETIC digits (espeak-ng): no measure of speech recognition",
    }[kind]
    caption = f"{source}, {len(heard)} voices; train and test share the {10 * len(heard)} clips"
    if unheard:
        caption += f"; unheard: {', '.join(unheard)}"
    make = random.Random(seed)
    strings = [digit_string([clips[voice] for voice in heard], make) for _ in range(train_strings + test_strings)]
    new = [digit_string([clips[voice] for voice in unheard], make) for _ in range(unheard_strings if unheard else 0)]
    return Speech(kind, caption, DIGIT_RATE, list("0123456789"), strings[test_strings:], strings[:test_strings], new)


def _without_silence(samples):
    """Cut where the sound is 35 dB below its peak, less 20 ms: shorter strings, faster steps."""
    loud = (samples.abs() > 0.018 * samples.abs().max()).nonzero()
    margin = DIGIT_RATE // 50
    return samples[max(0, int(loud[0]) - margin) : int(loud[-1]) + margin]


def digit_string(clips, make, max_digits=MAX_DIGITS, digits=range(10)):
    """Returns 1 to `max_digits` of `digits`, of one of the voices, with the speed, noise and gain that `make` draws."""
    voice = make.choice(clips)
    digits = [digits[make.randrange(len(digits))] for _ in range(make.randint(1, max_digits))]
    pieces = []
    for digit in digits:
        length = int(len(voice[digit]) / make.uniform(0.9, 1.15))
        pieces.append(F.interpolate(voice[digit].view(1, 1, -1), length, mode="linear").view(-1))
        pieces.append(torch.zeros(int(DIGIT_RATE * make.uniform(0, 0.1))))
    samples = torch.cat(pieces)
    noise = torch.randn(len(samples), generator=torch.Generator().manual_seed(make.getrandbits(40)))
    samples += noise * samples.std() * 10 ** (-make.uniform(10, 30) / 20)
    return Utterance(samples * 10 ** (make.uniform(-6, 6) / 20), "".join(map(str, digits)))


def own_recordings(folder):
    """Reads `folder`/transcripts.txt and the wav files that it names; a tenth, always the same, is for the test.

    Where the wav files are in several folders (`anna/01.wav<TAB>text`), these are speakers, and some of them the test.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpeechDataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not any(folder.iterdir()):
        raise SpeechDataError(f"{folder}: the folder is empty")
    utterances, speakers, mel = [], [], LogMel(OWN_RATE)
    for path, text in _transcripts(folder):
        utterances.append(Utterance(read_wav(path, OWN_RATE), text))
        speakers.append(path.parent)
        outputs, needed = output_length(mel.frames(len(utterances[-1].samples))), outputs_needed(text)
        if outputs < needed:
            raise SpeechDataError(
                f"{path}: too short for its transcript: CTC needs {needed} outputs of 40 ms, and it gives {outputs}"
            )
    if len(utterances) < 2:
        raise SpeechDataError(f"{folder / TRANSCRIPTS}: {len(utterances)} utterance, where training needs 2 or more")
    train, test, what = _split(utterances, speakers)
    symbols = sorted({symbol for utterance in utterances for symbol in utterance.text})
    caption = f"{len(utterances)} utterances of {folder}, {what} held out for the test"
    return Speech("own", caption, OWN_RATE, symbols, train, test)


def _split(utterances, speakers):
    """Returns a tenth of the speakers, if each has a folder of recordings; if not, a tenth of the utterances."""
    draw = random.Random(0)
    everyone = sorted(set(speakers))
    if len(everyone) > 1:
        draw.shuffle(everyone)
        held_out = everyone[: max(1, len(everyone) // 10)]
        train = [utterance for utterance, who in zip(utterances, speakers, strict=True) if who not in held_out]
        test = [utterance for utterance, who in zip(utterances, speakers, strict=True) if who in held_out]
        return train, test, f"{len(held_out)} of {len(everyone)} speakers"
    utterances = list(utterances)
    draw.shuffle(utterances)
    held_out = max(1, len(utterances) // 10)
    return utterances[held_out:], utterances[:held_out], str(held_out)


def _transcripts(folder):
    """Yields (path of the wav, text) per line: `file.wav<TAB>text`, or as in Kaldi and LibriSpeech `name text`."""
    file = folder / TRANSCRIPTS
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise SpeechDataError(f"{file}: no such file; it has a line file.wav<TAB>text per recording") from None
    except UnicodeDecodeError as error:
        raise SpeechDataError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SpeechDataError(f"{file}: {error.strerror}") from None
    seen = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name, separator, text = line.partition("\t") if "\t" in line else line.partition(" ")
        if not name.strip():
            raise SpeechDataError(f"{where}: starts with a blank, where the name of a wav file is expected")
        if not separator:
            raise SpeechDataError(f"{where}: {name!r} is one word, where file.wav<TAB>text is expected")
        text = " ".join(text.split())
        if not text:
            raise SpeechDataError(f"{where}: the transcript of {name} is empty")
        for symbol in text:
            if symbol == "\ufffd" or unicodedata.category(symbol) in UNKNOWN_SYMBOLS:
                raise SpeechDataError(
                    f"{where}: the transcript of {name} has a symbol that is no text, U+{ord(symbol):04X}"
                )
        path = folder / name
        if not path.is_file() and not name.endswith(".wav"):
            path = folder / f"{name}.wav"
        if not path.is_file():
            raise SpeechDataError(f"{where}: there is no {path.name} in {folder}")
        if path in seen:
            raise SpeechDataError(f"{where}: {path.name} has a transcript already")
        seen.add(path)
        yield path, text
