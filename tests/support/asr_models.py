"""Real speech recognisers in small configurations, each with its own kind of loss and batches to train it on.

The table MODELS holds functions that return a model and loss(model, batch). Those that need a library raise an
ImportError where it is missing.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, ctc_loss, pad

from benchmarks.core.models import DeepSpeech2
from benchmarks.shapes import library
from examples.speech.features import MELS, LogMel

RATE = 8000
SYMBOLS = 11  # 0 is CTC's blank, and what fills up a batch


@dataclass
class Batch:
    """Utterances of several lengths, filled up with zeros, and their transcripts."""

    waves: torch.Tensor  # [batch, samples]
    wave_lengths: torch.Tensor
    features: torch.Tensor  # log-mel [batch, frames, MELS]
    lengths: torch.Tensor
    targets: torch.Tensor  # [batch, symbols]
    target_lengths: torch.Tensor

    def first(self, count):
        return Batch(*(tensor[:count] for tensor in vars(self).values()))


def batch(seed, seconds=(0.59, 0.42, 0.51)):
    """Voices of a rising pitch in some noise; the same seed gives the same batch."""
    generator = torch.Generator().manual_seed(seed)
    extractor = LogMel(RATE)
    waves = [voice(int(length * RATE), generator) for length in seconds]
    features = [extractor(wave) for wave in waves]
    targets = [torch.randint(1, SYMBOLS, (count,), generator=generator) for count in (6, 4, 5)]
    return Batch(*padded(waves), *padded(features), *padded(targets))


def voice(samples, generator):
    """Harmonics of a pitch that rises by a third, loudest in the middle, of mean 0 and variance 1."""
    time = torch.arange(samples) / RATE
    first = 90 + 120 * torch.rand((), generator=generator)
    phase = 2 * torch.pi * first * (time + time.square() / 3)
    wave = sum(torch.sin(k * phase) / k for k in range(1, 9)) * torch.hann_window(samples)
    wave = wave + 0.02 * torch.randn(samples, generator=generator)
    return (wave - wave.mean()) / wave.std()


def padded(rows):
    """One tensor of all, and their lengths."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def ctc(log_probs, batch):
    """CTC loss of log probabilities [outputs, batch, symbols], where the model gives fewer outputs than frames."""
    lengths = batch.lengths * len(log_probs) // batch.lengths.max()
    return ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths)


class WithHead(nn.Module):
    """An encoder of features [batch, frames, MELS], and a linear layer that gives CTC its log probabilities."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(MELS, SYMBOLS)

    def forward(self, features, lengths):
        encoded, _ = self.encoder(features, lengths)
        return self.head(encoded).log_softmax(-1).transpose(0, 1)


def wav2letter():
    """In torchaudio's one size, 24M parameters; so it gets one utterance at a time."""
    model = library("torchaudio").models.Wav2Letter(SYMBOLS, input_type="mfcc", num_features=MELS)

    def loss(model, batch):
        alone = batch.first(1)
        return ctc(model(alone.features.transpose(1, 2)).permute(2, 0, 1), alone)

    return model, loss


def deepspeech():
    model = library("torchaudio").models.DeepSpeech(MELS, n_hidden=64, n_class=SYMBOLS, dropout=0.1)
    return model, lambda model, batch: ctc(model(batch.features[:, None]).transpose(0, 1), batch)


def deepspeech2():
    model = DeepSpeech2(bins=MELS, hidden=32, layers=3, symbols=SYMBOLS, channels=8)
    return model, lambda model, batch: ctc(model(batch.features.transpose(1, 2)[:, None]), batch)


def conformer():
    model = WithHead(library("torchaudio").models.Conformer(MELS, 4, 4 * MELS, 3, 15, dropout=0.1))
    return model, lambda model, batch: ctc(model(batch.features, batch.lengths), batch)


def emformer():
    ahead = 4  # frames of right context that a segment sees
    encoder = library("torchaudio").models.Emformer(
        MELS, 4, 2 * MELS, 3, segment_length=16, dropout=0.1, left_context_length=8, right_context_length=ahead
    )

    def loss(model, batch):
        return ctc(model(pad(batch.features, (0, 0, 0, ahead)), batch.lengths), batch)

    return WithHead(encoder), loss


def wav2vec2():
    """With LayerDrop: in every step some layers have no gradients."""
    model = library("torchaudio").models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(32, 10, 5), (32, 3, 4), (32, 2, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=4,
        encoder_num_heads=4,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.4,
        aux_num_out=SYMBOLS,
    )

    def loss(model, batch):
        logits, lengths = model(batch.waves, batch.wave_lengths)
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        return ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths)

    return model, loss


def hf_wav2vec2():
    """As it is fine-tuned: the convolutions frozen, LayerDrop, parts of the features masked (SpecAugment)."""
    transformers = library("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=SYMBOLS,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 4, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.4,
        mask_time_length=5,
        pad_token_id=0,
        ctc_loss_reduction="mean",
    )
    model = transformers.Wav2Vec2ForCTC(config)
    model.freeze_feature_encoder()

    def loss(model, batch):
        mask = torch.arange(batch.waves.shape[1]) < batch.wave_lengths[:, None]
        return model(batch.waves, mask.long(), labels=batch.targets.masked_fill(batch.targets == 0, -100)).loss

    return model, loss


def hf_whisper():
    """Attention from text to speech, one matrix for the words read and written, positions that are not trained."""
    transformers = library("transformers")
    frames, start, end = 60, SYMBOLS, SYMBOLS + 1
    layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3}
    config = transformers.WhisperConfig(
        vocab_size=SYMBOLS + 2,
        num_mel_bins=MELS,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=frames // 2,
        max_target_positions=16,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=end,
        **layers,
    )

    def loss(model, batch):
        features = pad(batch.features, (0, 0, 0, frames - batch.features.shape[1]))
        read, written = pad(batch.targets, (1, 0), value=start), pad(batch.targets, (0, 1))
        logits = model(features.transpose(1, 2), decoder_input_ids=read).logits
        return cross_entropy(logits.transpose(1, 2), written, ignore_index=0)

    return transformers.WhisperForConditionalGeneration(config), loss


MODELS = {
    "wav2letter": wav2letter,
    "deepspeech": deepspeech,
    "deepspeech2": deepspeech2,
    "conformer": conformer,
    "emformer": emformer,
    "wav2vec2": wav2vec2,
    "hf-wav2vec2": hf_wav2vec2,
    "hf-whisper": hf_whisper,
}
# In these, other parameters are without a gradient in every step.
WITH_LAYER_DROP = ("wav2vec2", "hf-wav2vec2", "hf-whisper")
