"""The recogniser of Deep Speech 2: convolutions over spectrograms, then bidirectional LSTMs. No library has it."""

from torch import nn


class DeepSpeech2(nn.Module):
    """Two strided convolutions, then LSTMs whose two directions are added up, with batch normalization after each.

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
