"""Real toolkits, unmodified, under `python -m fastclip.run`: 12 steps of SGD with the bits of the run without it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.project import ROOT

from .data import write_corpus

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def train(arguments, launcher=()):
    """Runs `python -m LAUNCHER ARGUMENTS`; returns what it said."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def espnet(corpus, out):
    data = [
        f"--{split}_data_path_and_name_and_type={corpus / split / file},{kind}"
        for split in ("train", "valid")
        for file, kind in (("wav.scp", "speech,sound"), ("text", "text,text"))
    ]
    shapes = [f"--{split}_shape_file={corpus / split / 'shape'}" for split in ("train", "valid")]
    return ["espnet2.bin.asr_train", "--config", HERE / "espnet.yaml", "--ngpu", "0", "--output_dir", out,
            "--use_preprocessor", "true", "--token_list", corpus / "tokens.txt", *data, *shapes]  # fmt: skip


def funasr(corpus, out):
    sets = [f"++{split}_data_set_list={corpus / split / 'funasr.jsonl'}" for split in ("train", "valid")]
    return ["funasr.bin.train", "--config-path", HERE, "--config-name", "funasr", "++device=cpu",
            "++disable_update=true", f"++tokenizer_conf.token_list={corpus / 'tokens.txt'}", *sets,
            f"++output_dir={out}", f"hydra.run.dir={out / 'hydra'}"]  # fmt: skip


def trainer(kind):
    def arguments(_, out):
        out.mkdir()
        return ["tests.toolkits.trainers", kind, out]

    return arguments


# By toolkit: its package, its arguments, its checkpoint, and the norms in its log.
TOOLKITS = {
    "ESPnet": ("espnet2", espnet, "4epoch.pth", r"grad_norm=[\d.]+, clip=[\d.]+"),
    "FunASR": ("funasr", funasr, "model.pt.ep4", r"loss_avg_rank: [\d.]+"),
    "Lightning": ("pytorch_lightning", trainer("lightning"), "model.pt", None),
    "Hugging Face": ("transformers", trainer("transformers"), "model.pt", r"\[[\d., ]+\]"),
}


@pytest.mark.parametrize("name", TOOLKITS)
def test_has_the_bits_of_the_run_without_it(name, corpus, tmp_path):
    package, arguments, checkpoint, logged = TOOLKITS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} is not installed (requirements-toolkits.txt)")
    plain = train(arguments(corpus, tmp_path / "plain"))
    ours = train(arguments(corpus, tmp_path / "ours"), ["-m", "fastclip.run"])
    assert "fastclip: 12 steps, 12 clips deferred to the step\n" in ours and "fastclip: " not in plain
    expected, found = (torch.load(tmp_path / run / checkpoint, weights_only=False) for run in ("plain", "ours"))
    expected, found = (saved.get("state_dict", saved) for saved in (expected, found))
    assert expected.keys() == found.keys() and len(expected) >= 4
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    if logged:
        assert re.findall(logged, plain) == re.findall(logged, ours) != []
