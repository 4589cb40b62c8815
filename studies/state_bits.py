"""Training with states in 8 bits beside states in float32: on spoken digits, and on a model of Whisper-tiny's shape.

    python -m studies.state_bits

Each optimizer trains the same model twice from the same start, on the same batches, and only `state_bits` differs. The
digits are those of the clipping study; the larger model, an encoder and a decoder of 384 units with 51,865 tokens,
writes the digits as tokens. Both are too small a task to rank optimizers by: what counts is the difference.
"""

import statistics
import sys
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.nn.utils.rnn import pad_sequence

import fastclip
from benchmarks.core import record
from benchmarks.report import training as report
from examples.speech.batches import batches_of_like_length, ctc_loss, error_rate
from examples.speech.models import SpeechModel
from examples.support.console import SpeechDataError, progress
from examples.support.options import make_parser

from .clipping.cell import load_data

OPTIMIZERS = {
    "SGD, momentum 0.9": (fastclip.SGD, {"lr": 0.1, "momentum": 0.9, "max_norm": 1.0}),
    "AdamW": (fastclip.AdamW, {"lr": 3e-3, "max_norm": 1.0}),
    "Lion": (fastclip.Lion, {"lr": 1e-3, "max_norm": 1.0}),
}
OF_WHISPER = {"AdamW": (fastclip.AdamW, {"lr": 3e-4, "max_norm": 1.0})}
LAST = 20  # steps whose mean loss is looked at
TOKENS, BEGIN, END, FIRST_DIGIT = 51_865, 50_258, 50_257, 15


class WhisperTiny(nn.Module):
    """Features [batch, frames, mels] and tokens [batch, length] to logits [batch, length, 51865]: the shapes of
    openai/whisper-tiny, with torch's layers and embeddings of places that are learned.
    """

    def __init__(self, mels, units=384, heads=6, layers=4, places=1500):
        super().__init__()
        self.stem = nn.Conv1d(mels, units, 3, padding=1)
        self.halve = nn.Conv1d(units, units, 3, stride=2, padding=1)
        self.heard, self.written = nn.Parameter(torch.zeros(places, units)), nn.Parameter(torch.zeros(448, units))
        self.tokens = nn.Embedding(TOKENS, units)
        nn.init.normal_(self.tokens.weight, std=0.02)
        settings = {"dim_feedforward": 4 * units, "dropout": 0.0, "activation": gelu, "batch_first": True}
        self.layers = nn.Transformer(units, heads, layers, layers, norm_first=True, **settings)

    def forward(self, features, tokens):
        heard = gelu(self.halve(gelu(self.stem(features.transpose(1, 2))))).transpose(1, 2)
        written = self.tokens(tokens) + self.written[: tokens.shape[1]]
        ahead = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        decoded = self.layers(heard + self.heard[: heard.shape[1]], written, tgt_mask=ahead, tgt_is_causal=True)
        return decoded @ self.tokens.weight.T


def loss_of_tokens(examples):
    """Returns the cross entropy per token, as a function of the model."""
    features = pad_sequence([frames for frames, *_ in examples], batch_first=True)
    texts = [torch.cat([torch.tensor([BEGIN]), target + FIRST_DIGIT, torch.tensor([END])]) for _, target, _ in examples]
    tokens = pad_sequence(texts, batch_first=True, padding_value=-100)
    given, wanted = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    return lambda model: cross_entropy(model(features, given).transpose(1, 2), wanted, ignore_index=-100)


def train(model, optimizer, loss_of, data, steps, batch, seed, on_step):
    """Returns the losses."""
    order, losses = torch.Generator().manual_seed(seed), []
    while len(losses) < steps:
        for places in batches_of_like_length(data.train, order):
            optimizer.zero_grad()
            loss = loss_of([data.train[i] for i in places[:batch]])(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            on_step()
            if len(losses) == steps:
                break
    return losses


def run(name, make, loss_of, measure, optimizers, seeds, steps, batch, load):
    """Returns a row for each optimizer: for each seed and number of bits the last loss, and what `measure` says."""
    rows = []
    with progress(total=len(optimizers) * len(seeds) * 2 * steps, desc=name, unit="step") as bar:
        for title, (cls, settings) in optimizers.items():
            runs = {"32": [], "8": []}
            for seed in seeds:
                data = load(seed)
                for bits, found in runs.items():
                    torch.manual_seed(seed)
                    model = make(data)
                    optimizer = cls(model.parameters(), **settings, state_bits=int(bits))
                    losses = train(model, optimizer, loss_of, data, steps, batch, seed, bar.update)
                    size = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
                    found.append(
                        {
                            "seed": seed,
                            "loss": statistics.mean(losses[-LAST:]),
                            "state_bytes": size,
                            **measure(model, data),
                        }
                    )
            parameters = sum(p.numel() for p in model.parameters())
            rows.append({"task": name, "optimizer": title, "parameters": parameters, "steps": steps, "runs": runs})
    return rows


def main(arguments=None):
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser("studies.state_bits", __doc__, out="benchmarks/out")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps")
    options = parser.parse_args(arguments)
    found = record.describe(arguments, "python -m studies.state_bits") | {"kind": "training"}
    began = time.monotonic()
    kept = {}

    def load(seed):
        if seed not in kept:
            kept[seed] = load_data(options.data, options.cache, seed, 320)
        return kept[seed]

    few = options.quick
    try:
        found["cases"] = run(
            "digits, GRU",
            lambda data: SpeechModel(len(data.speech.symbols), hidden=64, layers=1),
            ctc_loss,
            lambda model, data: {"wer": error_rate(model, data.test, data.speech)},
            OPTIMIZERS,
            range(1 if few else 5),
            10 if few else 400,
            16,
            load,
        )
        found["cases"] += run(
            "digits, Whisper-tiny's shape",
            lambda data: WhisperTiny(data.train[0][0].shape[1]),
            loss_of_tokens,
            lambda model, data: {},
            OF_WHISPER,
            range(1 if few else 3),
            2 if few else 120,
            8,
            load,
        )
    except SpeechDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found["seconds"] = round(time.monotonic() - began)
    print(report.markdown(found))
    options.out.mkdir(parents=True, exist_ok=True)
    record.write(found, options.out / "states-training.json")
    print(f"\nWritten: {options.out / 'states-training.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
