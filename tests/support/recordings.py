"""Recordings for the examples' tests: tones, in wav files with transcripts."""

import math
import wave

import torch


def tone(seconds=0.8, hertz=400, rate=16000):
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def write_wav(path, samples, rate=16000):
    """`samples`: [n], or [n, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1 if samples.dim() == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).to(torch.int16).contiguous().numpy().tobytes())


def write_recordings(data):
    """Good data: 12 recordings of one or two "words", each a tone of its own pitch, with transcripts."""
    data.mkdir()
    lines = []
    for i in range(12):
        words = ["ab", "ba"][: 1 + i % 2]
        write_wav(data / f"u{i}.wav", torch.cat([tone(hertz=300 if word == "ab" else 900) for word in words]))
        lines.append(f"u{i}.wav\t{' '.join(words)}" if i % 2 else f"u{i} {' '.join(words)}")
    (data / "transcripts.txt").write_text("\n".join(lines) + "\n")
    return data
