"""Classes of frames without an aligner: clusters of cepstra, the first targets of HuBERT.

HuBERT (Hsu et al., 2021, https://arxiv.org/abs/2106.07447) starts from k-means over 13 cepstral coefficients with their
first and second differences over time. What a frame's class depends on reaches four frames to each side of it.
"""

import math

import torch
import torch.nn.functional as F

from ..support.console import SpeechDataError, progress

CEPSTRA, FIT_FRAMES, ITERATIONS = 13, 20_000, 20


def _differences(features):
    """Returns the slope of each column over five frames, [frames, columns]."""
    padded = F.pad(features.T.unsqueeze(0), (2, 2), mode="replicate").squeeze(0).T
    frames = len(features)
    return (padded[3 : 3 + frames] - padded[1 : 1 + frames] + 2 * (padded[4:] - padded[:frames])) / 10


def cepstra(log_mel):
    """Turns log-mel features [frames, mels] into cepstral coefficients and both differences, [frames, 3 * CEPSTRA]."""
    mels = log_mel.shape[1]
    cosines = torch.cos(math.pi / mels * (torch.arange(mels) + 0.5)[:, None] * torch.arange(CEPSTRA))
    coefficients = log_mel @ cosines
    slope = _differences(coefficients)
    return torch.cat([coefficients, slope, _differences(slope)], 1)


class FrameLabels:
    """Maps features [frames, mels] to classes [frames]; fitted to utterances to train on, and to nothing else."""

    def __init__(self, utterances, classes, seed):
        frames = torch.cat([cepstra(features) for features in utterances])
        if len(frames) < classes:
            raise SpeechDataError(f"{len(frames)} frames of 10 ms to train on, where {classes} classes need {classes}")
        self.mean, self.std = frames.mean(0), frames.std(0).clamp_(min=1e-3)
        generator = torch.Generator().manual_seed(seed)
        frames = (frames[torch.randperm(len(frames), generator=generator)[:FIT_FRAMES]] - self.mean) / self.std
        self.centres = frames[:classes].clone()
        for _ in progress(range(ITERATIONS), desc="classes", delay=1):
            nearest = torch.cdist(frames, self.centres).argmin(1)
            count = torch.bincount(nearest, minlength=classes)[:, None]
            total = torch.zeros_like(self.centres).index_add_(0, nearest, frames)
            self.centres = torch.where(count > 0, total / count.clamp(min=1), self.centres)

    def __call__(self, features):
        return torch.cdist((cepstra(features) - self.mean) / self.std, self.centres).argmin(1)
