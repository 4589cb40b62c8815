"""Small acoustic models: the article's DNN, and a convolutional and two recurrent ones that learn by CTC.

All take log-mel features [batch, frames, mels], normalised. The DNN gives each frame's class, the others one output per
four frames (`speech_model.output_length`).
"""

from functools import partial

from torch import nn

from .speech_model import HIDDEN, MELS, STRIDE, SpeechModel


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


# The recurrent one is the demo's.
CTC_MODELS = {"cnn": CNN, "gru": SpeechModel, "lstm": partial(SpeechModel, cell=nn.LSTM)}
