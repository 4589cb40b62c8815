"""Log-mel features of sounds."""

import torch

MELS = 40
FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010


def _mel_filters(rate, fft_size, mels):
    """Triangles of equal width on the mel scale, [mels, fft_size // 2 + 1]."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, mels + 2) * top / 2595) - 1)
    bins = torch.linspace(0, rate / 2, fft_size // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_(min=0)


class LogMel:
    """Turns samples [n] into features [frames, mels], one frame per 10 ms."""

    def __init__(self, rate, mels=MELS):
        self.hop = round(rate * HOP_SECONDS)
        self.window = torch.hann_window(round(rate * FRAME_SECONDS))
        # 512 at 8 kHz: with fewer bins the lowest triangles would fall between two of them.
        self.fft_size = 2 ** (rate // 16 - 1).bit_length()
        self.filters = _mel_filters(rate, self.fft_size, mels)

    def __call__(self, samples):
        spectrum = torch.stft(
            samples,
            self.fft_size,
            self.hop,
            len(self.window),
            self.window,
            pad_mode="constant",  # reflection fails on sounds shorter than the window
            return_complex=True,
        )
        return (self.filters @ spectrum.abs().square()).clamp_(min=1e-7).log_().T.contiguous()

    def frames(self, length):
        """Returns how many frames `length` samples give."""
        return 1 + length // self.hop
