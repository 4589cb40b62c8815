"""A small speech recogniser: log-mel features, a GRU (or LSTM) that learns by CTC, and the word error rate."""

import torch
from torch import nn

MELS, HIDDEN, STRIDE = 40, 96, 4
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
        """How many frames `length` samples give."""
        return 1 + length // self.hop


def output_length(frames):
    """How many outputs the model gives for so many frames."""
    return (frames - 1) // STRIDE + 1


def outputs_needed(text):
    """CTC needs one output per symbol, and a blank between equal neighbours."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:], strict=False))


class SpeechModel(nn.Module):
    """Features [batch, frames, mels] to log probabilities [outputs, batch, symbols + 1]; 0 is CTC's blank."""

    def __init__(self, symbols, mels=MELS, cell=nn.GRU):
        super().__init__()
        self.conv = nn.Conv1d(mels, HIDDEN, 9, stride=STRIDE, padding=4)
        self.rnn = cell(HIDDEN, HIDDEN, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, symbols + 1)

    def forward(self, features):
        hidden = self.conv(features.transpose(1, 2)).relu().permute(2, 0, 1)
        # Not packed: batches of nearly equal length are faster as they are.
        hidden, _ = self.rnn(hidden)
        return self.head(hidden).log_softmax(-1)


def greedy_decode(log_probs, lengths, symbols):
    """The best symbol of each output, repetitions and blanks taken out; a text per utterance."""
    texts = []
    for best, length in zip(log_probs.argmax(-1).T.tolist(), lengths.tolist(), strict=True):
        best = best[:length]
        texts.append("".join(symbols[b - 1] for a, b in zip([0, *best], best, strict=False) if b != 0 and b != a))
    return texts


def edit_distance(reference, hypothesis):
    """Fewest insertions, deletions and substitutions between two sequences (Levenshtein, 1966)."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def word_error_rate(references, hypotheses):
    """Errors in percent of the words of the references; both are lists of lists of words."""
    errors = sum(edit_distance(r, h) for r, h in zip(references, hypotheses, strict=True))
    return 100 * errors / sum(map(len, references))
