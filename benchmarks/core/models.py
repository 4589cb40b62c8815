"""The models that are timed: the parameter shapes of each, by name.

Those of published models lie in shapes.json, as a benchmark also has to run without the libraries that define them.
"""

import json
import math
from pathlib import Path

import torch
from torch import nn

PATH = Path(__file__).with_name("shapes.json")


def dnn():
    """Returns the acoustic model of the article the project started from: 80-256-64."""
    return module_shapes(torch.nn.Linear(80, 256, device="meta"), torch.nn.Linear(256, 64, device="meta"))


def gru_ctc(mels=40, hidden=96, symbols=11):
    """Returns a small CTC recogniser of spoken digits: a strided convolution and two bidirectional GRU layers."""
    return module_shapes(
        torch.nn.Conv1d(mels, hidden, 5, stride=4, device="meta"),
        torch.nn.GRU(hidden, hidden, num_layers=2, bidirectional=True, device="meta"),
        torch.nn.Linear(2 * hidden, symbols, device="meta"),
    )


def deepspeech2():
    """5 bidirectional LSTMs of 1,024 units."""
    with torch.device("meta"):
        return module_shapes(DeepSpeech2())


def module_shapes(*modules):
    """Shapes of all parameters of the modules, in their order."""
    return [tuple(p.shape) for module in modules for p in module.parameters()]


def recorded():
    """Returns the shapes in shapes.json, by model: those of libraries, and those of models that are not on PyPI."""
    file = json.loads(PATH.read_text())
    models = file["models"] | {model: of_it["shapes"] for model, of_it in file.get("published", {}).items()}
    return {model: [tuple(shape) for shape in shapes] for model, shapes in models.items()}


class DeepSpeech2(nn.Module):
    """The recogniser of Deep Speech 2, which no library has: two strided convolutions over spectrograms, then LSTMs
    whose two directions are added up, with batch normalization after each.

    Args:
        bins (int): frequencies of a spectrogram.
        hidden (int): units of an LSTM in each direction.
        layers (int): number of LSTMs.
        symbols (int): outputs, CTC's blank among them.
        channels (int): of the convolutions.

    Source: https://arxiv.org/abs/1512.02595, in the sizes of https://github.com/SeanNaren/deepspeech.pytorch.

    Example:
        >>> DeepSpeech2(hidden=64)(torch.randn(2, 1, 161, 100)).shape
        torch.Size([50, 2, 29])
    """

    def __init__(self, bins=161, hidden=1024, layers=5, symbols=29, channels=32):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, channels, (41, 11), stride=(2, 2), padding=(20, 5), bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardtanh(0, 20),
            nn.Conv2d(channels, channels, (21, 11), stride=(2, 1), padding=(10, 5), bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardtanh(0, 20),
        )
        sizes = [channels * ((bins + 3) // 4), *(layers - 1) * [hidden]]
        self.lstms = nn.ModuleList(nn.LSTM(size, hidden, bidirectional=True) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in sizes)
        self.head = nn.Linear(hidden, symbols, bias=False)

    def forward(self, spectrograms):
        """Spectrograms [batch, 1, bins, frames] to log probabilities [frames / 2, batch, symbols]."""
        x = self.convolutions(spectrograms).flatten(1, 2).permute(2, 0, 1)
        for lstm, norm in zip(self.lstms, self.norms, strict=True):
            forward, backward = lstm(x)[0].chunk(2, dim=-1)
            x = norm((forward + backward).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(x).log_softmax(-1)


MODELS = {
    "dnn": dnn(),
    "gru-ctc": gru_ctc(),
    "tiny-600": 600 * [(144,)],
    "dense-100m": 6 * [(4096, 4096)],
    "deepspeech2": deepspeech2(),
    **recorded(),
}


def count(shapes):
    """Returns the number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
