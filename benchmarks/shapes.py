"""The parameter shapes of the models that are timed, by name."""

import math

import torch


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


def conformer(dim, layers=16, kernel=31):
    """The encoder torchaudio.models.Conformer(dim, 4, 4 * dim, 16, 31): 30 tensors per layer.

    Written down, as torchaudio is not needed for anything else here. Source: https://arxiv.org/abs/2005.08100.
    """
    norm = [(dim,), (dim,)]
    feed_forward = [*norm, (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    attention = [*norm, (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    pointwise_in = [(2 * dim, dim, 1), (2 * dim,)]
    depthwise = [(dim, 1, kernel), (dim,)]
    pointwise_out = [(dim, dim, 1), (dim,)]
    convolution = [*norm, *pointwise_in, *depthwise, *norm, *pointwise_out]
    return layers * [*feed_forward, *attention, *convolution, *feed_forward, *norm]


def module_shapes(*modules):
    """Shapes of all parameters of the modules, in their order."""
    return [tuple(p.shape) for module in modules for p in module.parameters()]


MODELS = {
    "dnn": dnn(),
    "gru-ctc": gru_ctc(),
    "tiny-600": 600 * [(144,)],
    "conformer-s": conformer(144),
    "conformer-m": conformer(256),
    "conformer-l": conformer(512, layers=17),
    "dense-100m": 6 * [(4096, 4096)],
}


def count(shapes):
    """Number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
