"""The parameter shapes of the models that are timed, by name."""

import math

import torch

from . import models
from .deepspeech2 import DeepSpeech2


def dnn():
    """The acoustic model of the article the project started from: 80-256-64."""
    return module_shapes(torch.nn.Linear(80, 256, device="meta"), torch.nn.Linear(256, 64, device="meta"))


def gru_ctc(mels=40, hidden=96, symbols=11):
    """A small CTC recogniser of spoken digits: a strided convolution and two bidirectional GRU layers."""
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


MODELS = {
    "dnn": dnn(),
    "gru-ctc": gru_ctc(),
    "tiny-600": 600 * [(144,)],
    "dense-100m": 6 * [(4096, 4096)],
    "deepspeech2": deepspeech2(),
    **models.read(),
}


def count(shapes):
    """Number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
