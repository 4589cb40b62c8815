"""From utterances to batches for CTC, and from outputs to an error rate."""

import torch
from torch.nn.utils.rnn import pad_sequence

from ..support.console import progress
from .features import MELS, LogMel
from .models import output_length

BATCH = 16


def extract(speech, mels=MELS, per_utterance=False, device="cpu"):
    """Features and targets: lists of (features, target, text) to train on, to test on, and of unheard voices. The
    tensors are on `device`.

    Features are normalised by mean and deviation of those to train on; `per_utterance` takes each utterance's own mean
    instead, which hides much of voice and microphone.
    """
    mel = LogMel(speech.rate, mels)
    sets = [speech.train, speech.test, speech.unheard]
    features = [mel(utterance.samples) for utterance in progress(sum(sets, []), desc="features", delay=1)]
    if per_utterance:
        features = [each - each.mean(0) for each in features]
    train_frames = torch.cat(features[: len(speech.train)])
    mean, std = train_frames.mean(0), train_frames.std(0).clamp_(min=1e-3)
    frames = iter(features)
    return [
        [
            (
                ((next(frames) - mean) / std).to(device),
                torch.tensor([1 + speech.symbols.index(s) for s in text], device=device),
                text,
            )
            for text in (utterance.text for utterance in utterances)
        ]
        for utterances in sets
    ]


def collate(examples):
    """Returns a batch: features, output lengths, targets end to end, and their lengths. Lengths are on the CPU, where
    torch's CTC loss needs them.
    """
    features, targets, _ = zip(*examples, strict=True)
    lengths = torch.tensor([output_length(len(frames)) for frames in features])
    target_lengths = torch.tensor([len(target) for target in targets])
    return pad_sequence(features, batch_first=True), lengths, torch.cat(targets), target_lengths


def batches_of_like_length(examples, generator):
    """The indices of all examples once, in random batches; sorting within pools of 8 keeps the padding small."""
    batches = []
    for pool in torch.randperm(len(examples), generator=generator).split(8 * BATCH):
        pool = sorted(pool.tolist(), key=lambda i: len(examples[i][0]))
        batches += [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def ctc_loss(examples):
    """CTC's loss per utterance of these examples, as a function of the model."""
    features, lengths, targets, target_lengths = collate(examples)
    loss_of = torch.nn.CTCLoss(reduction="sum")
    return lambda model: loss_of(model(features), targets, lengths, target_lengths) / len(lengths)


@torch.no_grad()
def error_rate(model, examples, speech):
    """Returns the model's word error rate in percent."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    wanted, got = [], []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        features, lengths, *_ = collate(batch)
        decoded = greedy_decode(model(features), lengths, speech.symbols)
        wanted += [speech.words(text) for _, _, text in batch]
        got += [speech.words(text) for text in decoded]
    return word_error_rate(wanted, got)


def greedy_decode(log_probs, lengths, symbols):
    """Returns the best symbol of each output, repetitions and blanks taken out; a text per utterance."""
    texts = []
    for best, length in zip(log_probs.argmax(-1).T.tolist(), lengths.tolist(), strict=True):
        best = best[:length]
        texts.append("".join(symbols[b - 1] for a, b in zip([0, *best], best, strict=False) if b != 0 and b != a))
    return texts


def edit_distance(reference, hypothesis):
    """Returns the fewest insertions, deletions and substitutions between two sequences (Levenshtein, 1966)."""
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
