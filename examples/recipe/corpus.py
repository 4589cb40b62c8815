"""Utterances in the files that Kaldi's and ESPnet's recipes read."""

import wave

SYMBOLS = ["<blank>", "<unk>", *"0123456789", "<sos/eos>"]


def write_corpus(speech, folder):
    """Writes the spoken digits: `train` and `test`, and tokens.txt. A digit is a word."""
    for split, utterances in (("train", speech.train), ("test", speech.test)):
        texts = [(utterance.samples, " ".join(speech.words(utterance.text))) for utterance in utterances]
        write_split(folder / split, texts, speech.rate)
    (folder / "tokens.txt").write_text("\n".join(SYMBOLS) + "\n")


def write_split(folder, utterances, rate):
    """Writes wav files, wav.scp, text and shape of [(samples in [-1, 1], text)]; returns [(name, path of its wav)]."""
    folder.mkdir(parents=True, exist_ok=True)
    written, lines = [], {"wav.scp": [], "text": [], "shape": []}
    for number, (samples, text) in enumerate(utterances):
        name = f"{folder.name}{number:05d}"
        path = folder / f"{name}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((32767 * samples.clamp(-1, 1)).short().numpy().tobytes())
        written.append((name, path))
        lines["wav.scp"].append(f"{name} {path}")
        lines["text"].append(f"{name} {text}")
        lines["shape"].append(f"{name} {len(samples)}")
    for file, content in lines.items():
        (folder / file).write_text("\n".join(content) + "\n")
    return written


def read_text(path):
    """Returns {utterance: its words} of one of Kaldi's files of texts."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: words for name, *words in lines}
