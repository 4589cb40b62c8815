"""python -m benchmarks shapes: compares shapes.json with the libraries that define the models; --write writes it."""

import argparse
import importlib
import importlib.metadata
import json
import sys

import torch

from .core import models


def conformer(dim, layers):
    """Returns an encoder of the sizes of https://arxiv.org/abs/2005.08100."""
    return library("torchaudio").models.Conformer(dim, 4, 4 * dim, layers, depthwise_conv_kernel_size=31)


def whisper(dim, layers, heads):
    """Returns the configuration of openai/whisper-small or -large; settings that are not named are the same in all."""
    transformers = library("transformers")
    encoder = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * dim}
    decoder = {"decoder_layers": layers, "decoder_attention_heads": heads, "decoder_ffn_dim": 4 * dim}
    config = transformers.WhisperConfig(vocab_size=51865, num_mel_bins=80, d_model=dim, **encoder, **decoder)
    return transformers.WhisperForConditionalGeneration(config)


# wav2vec2 and HuBERT with the head of torchaudio's fine-tuned bundles, 29 symbols.
MODELS = {
    "wav2letter": lambda: library("torchaudio").models.Wav2Letter(29, input_type="mfcc", num_features=80),
    "deepspeech": lambda: library("torchaudio").models.DeepSpeech(n_feature=80),
    "conformer-s": lambda: conformer(144, 16),
    "conformer-m": lambda: conformer(256, 16),
    "conformer-l": lambda: conformer(512, 17),
    "emformer-rnnt": lambda: library("torchaudio").models.emformer_rnnt_base(num_symbols=4097),
    "wav2vec2-base": lambda: library("torchaudio").models.wav2vec2_base(aux_num_out=29),
    "wav2vec2-large": lambda: library("torchaudio").models.wav2vec2_large(aux_num_out=29),
    "hubert-xlarge": lambda: library("torchaudio").models.hubert_xlarge(aux_num_out=29),
    "whisper-small": lambda: whisper(768, 12, 12),
    "whisper-large": lambda: whisper(1280, 32, 20),
}


def library(name):
    """Imports a library; ImportError says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"needs {name}: pip install '.[asr]', in a clone of fastclip", name=name) from None
    except OSError as error:  # it holds libraries that this torch can't load
        fix = f"{sys.executable} -m tests.support.torchaudio_on_cpu"
        raise ImportError(f"needs {name}, which does not import ({error}); try {fix}", name=name) from error


def build(model):
    """Shapes of a model's trainable parameters in their order, from its library, without memory for them."""
    with torch.device("meta"):
        built = MODELS[model]()
    return [tuple(p.shape) for p in built.parameters() if p.requires_grad]


def write():
    """Writes shapes.json, one model a line, with the versions of the libraries it is made from. Models that no library
    has stay as they are: each has its source."""
    lines = ",\n".join(f"  {json.dumps(model)}: {json.dumps(build(model))}" for model in MODELS)
    made_with = {name: importlib.metadata.version(name) for name in ("torchaudio", "transformers")}
    file = json.loads(models.PATH.read_text()) if models.PATH.exists() else {}
    kept = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of_it)}" for name, of_it in file.get("published", {}).items())
    published = f',\n "published": {{\n{kept}\n }}' if kept else ""
    models.PATH.write_text(f'{{\n "made_with": {json.dumps(made_with)},\n "models": {{\n{lines}\n }}{published}\n}}\n')


def compare(model, recorded):
    """Returns a message on a model, and whether it is recorded as its library builds it."""
    try:
        same = build(model) == recorded
    except ImportError as error:
        return f"not compared: {error}", False
    return f"{'as in' if same else 'DIFFERS from'} {models.PATH.name}", same


def main(arguments=None):
    """Returns the exit code: 1 where a model is not recorded as its library builds it, or can't be built."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks shapes", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--write", action="store_true", help=f"write {models.PATH.name} again")
    if parser.parse_args(arguments).write:
        try:
            write()
        except ImportError as error:
            print(f"Nothing was written: a model {error}", file=sys.stderr)
            return 1
    recorded, all_same = models.recorded(), True
    for model in MODELS:
        what, same = compare(model, recorded.get(model))
        all_same &= same
        print(f"{model}: {what}")
    return int(not all_same)
