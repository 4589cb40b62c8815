"""Small acoustic models: those that learn by CTC (recurrent, convolutional, feed-forward, Conformer), and the article's
DNN.

All take log-mel features [batch, frames, mels], normalised. The DNN gives each frame's class, the others one output per
four frames (`output_length`).
"""

from functools import partial

import torch
from torch import nn

from .features import MELS

HIDDEN, STRIDE = 96, 4


def output_length(frames):
    """Returns how many outputs the model gives for this many frames."""
    return (frames - 1) // STRIDE + 1


def outputs_needed(text):
    """CTC needs one output per symbol, and a blank between equal neighbours."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:], strict=False))


class SpeechModel(nn.Module):
    """Features [batch, frames, mels] to log probabilities [outputs, batch, symbols + 1]; 0 is CTC's blank."""

    def __init__(self, symbols, mels=MELS, cell=nn.GRU, hidden=HIDDEN, layers=2):
        super().__init__()
        self.conv = nn.Conv1d(mels, hidden, 9, stride=STRIDE, padding=4)
        self.rnn = cell(hidden, hidden, num_layers=layers, bidirectional=True)
        self.head = nn.Linear(2 * hidden, symbols + 1)

    def forward(self, features):
        hidden = self.conv(features.transpose(1, 2)).relu().permute(2, 0, 1)
        # Not packed: batches of nearly equal length are faster as they are.
        hidden, _ = self.rnn(hidden)
        return self.head(hidden).log_softmax(-1)


class DNN(nn.Module):
    """Linear 80-256-64: features [..., mels] to logits [..., classes], every frame by itself."""

    def __init__(self, mels=80, hidden=256, classes=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(mels, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, features):
        return self.layers(features)


class CNN(nn.Module):
    """Features [batch, frames, mels] to log probabilities [outputs, batch, symbols + 1]; 0 is CTC's blank.

    A strided convolution, then residual ones over time: outputs hear 0.5 s to each side.
    """

    def __init__(self, symbols, mels=MELS, channels=HIDDEN, blocks=4):
        super().__init__()
        self.conv = nn.Conv1d(mels, channels, 9, stride=STRIDE, padding=4)
        self.blocks = nn.ModuleList(nn.Conv1d(channels, channels, 7, padding=3) for _ in range(blocks))
        self.head = nn.Linear(channels, symbols + 1)

    def forward(self, features):
        hidden = self.conv(features.transpose(1, 2)).relu()
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        return self.head(hidden.permute(2, 0, 1)).log_softmax(-1)


class SplicedDNN(nn.Module):
    """Features [batch, frames, mels] to log probabilities [outputs, batch, symbols + 1]; 0 is CTC's blank.

    The classic acoustic model: each output hears the frames around it, 0.2 s to each side, in fully connected layers.
    """

    def __init__(self, symbols, mels=MELS, hidden=HIDDEN, layers=3, context=41):
        super().__init__()
        # A convolution whose kernel is the context is the first layer of frames end to end.
        self.splice = nn.Conv1d(mels, hidden, context, stride=STRIDE, padding=context // 2)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, symbols + 1)

    def forward(self, features):
        hidden = self.splice(features.transpose(1, 2)).relu().permute(2, 0, 1)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return self.head(hidden).log_softmax(-1)


class Conformer(nn.Module):
    """Features [batch, frames, mels] to log probabilities [outputs, batch, symbols + 1]; 0 is CTC's blank.

    torchaudio's Conformer (Gulati et al., 2020) after a strided convolution. Padding is heard: batches are of like
    length.
    """

    def __init__(self, symbols, mels=MELS, hidden=HIDDEN, layers=2, heads=4):
        super().__init__()
        from torchaudio.models import Conformer as Encoder  # the other models do without torchaudio

        self.conv = nn.Conv1d(mels, hidden, 9, stride=STRIDE, padding=4)
        self.encoder = Encoder(hidden, heads, 4 * hidden, layers, depthwise_conv_kernel_size=15, use_group_norm=True)
        self.head = nn.Linear(hidden, symbols + 1)

    def forward(self, features):
        hidden = self.conv(features.transpose(1, 2)).relu().transpose(1, 2)
        lengths = torch.full([len(hidden)], hidden.shape[1], device=hidden.device)
        return self.head(self.encoder(hidden, lengths)[0]).transpose(0, 1).log_softmax(-1)


CTC_MODELS = {"cnn": CNN, "gru": SpeechModel, "lstm": partial(SpeechModel, cell=nn.LSTM)}
