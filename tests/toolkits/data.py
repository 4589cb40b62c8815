"""A few made-up recordings in the forms that speech toolkits read: strings of tones, one pitch per letter."""

import json
import math
import wave

import torch

LETTERS, RATE = "abcde", 16000


def write_corpus(folder, train=24, valid=6):
    """Kaldi's wav.scp, text and shape for ESPnet, a jsonl for FunASR, and the token list of both."""
    random = torch.Generator().manual_seed(0)
    for split, number in (("train", train), ("valid", valid)):
        here = folder / split
        here.mkdir(parents=True)
        lines = {"wav.scp": [], "text": [], "shape": [], "funasr.jsonl": []}
        for i in range(number):
            word = "".join(LETTERS[k] for k in torch.randint(len(LETTERS), (3 + i % 3,), generator=random))
            samples = torch.cat([tone(LETTERS.index(letter)) for letter in word])
            name, path = f"{split}{i:03d}", here / f"{i:03d}.wav"
            write_wav(path, samples + 0.01 * torch.randn(len(samples), generator=random))
            lines["wav.scp"].append(f"{name} {path}")
            lines["text"].append(f"{name} {word}")
            lines["shape"].append(f"{name} {len(samples)}")
            lines["funasr.jsonl"].append(
                json.dumps({"key": name, "source": str(path), "source_len": len(samples) // 160, "target": word,
                            "target_len": len(word)})
            )  # fmt: skip
        for name, text in lines.items():
            (here / name).write_text("\n".join(text) + "\n")
    (folder / "tokens.txt").write_text("\n".join(["<blank>", "<unk>", *LETTERS, "<sos/eos>"]) + "\n")


def tone(pitch, seconds=0.22):
    t = torch.arange(int(RATE * seconds)) / RATE
    return 0.4 * torch.sin(2 * math.pi * 300 * 1.5**pitch * t)


def write_wav(path, samples):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((32767 * samples.clamp(-1, 1)).short().numpy().tobytes())
