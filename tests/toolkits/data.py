"""A few made-up recordings in the forms that speech toolkits read: strings of tones, one pitch per letter."""

import json

import torch

from examples.recipe.corpus import write_split
from tests.support.recordings import tone

LETTERS, RATE = "abcde", 16000


def write_corpus(folder, train=24, valid=6):
    """Kaldi's wav.scp, text and shape for ESPnet, a jsonl for FunASR, the token list of both, and a jsonl for NeMo."""
    random = torch.Generator().manual_seed(0)
    for split, number in (("train", train), ("valid", valid)):
        here, utterances = folder / split, []
        for i in range(number):
            word = "".join(LETTERS[k] for k in torch.randint(len(LETTERS), (3 + i % 3,), generator=random))
            samples = torch.cat([tone(0.22, 300 * 1.5 ** LETTERS.index(letter), RATE) for letter in word])
            utterances.append((samples + 0.01 * torch.randn(len(samples), generator=random), word))
        funasr, nemo = [], []
        for (name, path), (samples, word) in zip(write_split(here, utterances, RATE), utterances, strict=True):
            funasr.append({"key": name, "source": str(path), "source_len": len(samples) // 160, "target": word,
                           "target_len": len(word)})  # fmt: skip
            nemo.append({"audio_filepath": str(path), "duration": len(samples) / RATE, "text": word})
        for toolkit, entries in (("funasr", funasr), ("nemo", nemo)):
            (here / f"{toolkit}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "tokens.txt").write_text("\n".join(["<blank>", "<unk>", *LETTERS, "<sos/eos>"]) + "\n")
