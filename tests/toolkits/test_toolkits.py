"""Real toolkits: unmodified under `python -m fastclip.run`, with the bits of the run without it; and with fastclip's
integrations."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

import fastclip
from tests.support.project import ROOT

from .data import write_corpus

HERE = Path(__file__).parent


def espnet(corpus, out):
    data = [
        f"--{split}_data_path_and_name_and_type={corpus / split / file},{kind}"
        for split in ("train", "valid")
        for file, kind in (("wav.scp", "speech,sound"), ("text", "text,text"))
    ]
    shapes = [f"--{split}_shape_file={corpus / split / 'shape'}" for split in ("train", "valid")]
    return ["--config", HERE / "espnet.yaml", "--ngpu", "0", "--output_dir", out, "--use_preprocessor", "true",
            "--token_list", corpus / "tokens.txt", *data, *shapes]  # fmt: skip


def funasr(corpus, out):
    sets = [f"++{split}_data_set_list={corpus / split / 'funasr.jsonl'}" for split in ("train", "valid")]
    return ["--config-path", HERE, "--config-name", "funasr", "++device=cpu", "++disable_update=true",
            f"++tokenizer_conf.token_list={corpus / 'tokens.txt'}", *sets, f"++output_dir={out}",
            f"hydra.run.dir={out / 'hydra'}"]  # fmt: skip


def nemo(corpus, out):
    sets = [f"model.{split}_ds.manifest_filepath={corpus / folder / 'nemo.jsonl'}"
            for split, folder in (("train", "train"), ("validation", "valid"))]  # fmt: skip
    return [*sets, f"trainer.default_root_dir={out}", f"hydra.run.dir={out / 'hydra'}"]


def trainer(kind, _, out):
    return [kind, out]


# By toolkit: its package, its program, that program's arguments, the checkpoint, and the norms in the log.
TOOLKITS = {
    "ESPnet": ("espnet2", "espnet2.bin.asr_train", espnet, "4epoch.pth", r"grad_norm=[\d.]+, clip=[\d.]+"),
    "FunASR": ("funasr", "funasr.bin.train", funasr, "model.pt.ep4", r"loss_avg_rank: [\d.]+"),
    "NeMo": ("nemo", "tests.toolkits.in_nemo", nemo, "model.pt", None),
    "SpeechBrain": ("speechbrain", "tests.toolkits.trainers", partial(trainer, "speechbrain"), "model.pt", None),
    "Lightning": ("pytorch_lightning", "tests.toolkits.trainers", partial(trainer, "lightning"), "model.pt", None),
    "Hugging Face": ("transformers", "tests.toolkits.trainers", partial(trainer, "transformers"), "model.pt",
                     r"\[[\d., ]+\]"),
}  # fmt: skip


class Runs:
    """Trainings by real toolkits. The unmodified ones are run once each."""

    def __init__(self, folder):
        self.folder, self.corpus, self._plain = folder, folder / "corpus", {}
        write_corpus(self.corpus)

    def plain(self, name, *more):
        run = (name, *more)
        if run not in self._plain:
            self._plain[run] = self.train(name, "plain", ["-m", TOOLKITS[name][1]], *more)
        return self._plain[run]

    def patched(self, name, *more):
        return self.train(name, "patched", ["-m", "fastclip.run", "-m", TOOLKITS[name][1]], *more)

    def train(self, name, run, launcher, *more):
        """Returns the model's tensors, and what was said."""
        package, _, arguments, checkpoint, _ = TOOLKITS[name]
        if importlib.util.find_spec(package) is None:
            file = "nemo" if name == "NeMo" else "toolkits"
            pytest.skip(f"{name} is not installed (requirements-{file}.txt)")
        out = Path(tempfile.mkdtemp(prefix=f"{package}-{run}-", dir=self.folder))
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, arguments(self.corpus, out)), *more], cwd=ROOT, capture_output=True,
            text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        saved = torch.load(out / checkpoint, weights_only=False)
        return saved.get("state_dict", saved), done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("toolkits"))


@pytest.mark.thorough  # two trainings of each: make toolkits
@pytest.mark.parametrize("name", TOOLKITS)
def test_has_the_bits_of_the_run_without_it(name, runs):
    """Twelve steps of SGD with the toolkit's own clip."""
    expected, plain = runs.plain(name)
    found, ours = runs.patched(name)
    assert "fastclip: 12 steps, 12 clips deferred to the step\n" in ours and "fastclip: " not in plain
    assert expected.keys() == found.keys() and len(expected) >= 4
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    if logged := TOOLKITS[name][4]:
        assert re.findall(logged, plain) == re.findall(logged, ours) != []


INTEGRATIONS = {
    "ESPnet": (
        "import fastclip.integrations.espnet; from espnet2.bin.asr_train import main; main()",
        ["--optim", "fastclip_sgd", "--optim_conf", "max_norm=1.0", "--grad_clip", "inf"],
    ),
    "FunASR": (
        "import fastclip.integrations.funasr; from funasr.bin.train import main_hydra; main_hydra()",
        ["++optim=fastclip_sgd", "++optim_conf.max_norm=1.0", "++train_conf.grad_clip=0"],
    ),
    "NeMo": (
        "import fastclip.integrations.nemo; from tests.toolkits.in_nemo import main; main()",
        ["model.optim.name=fastclip_sgd", "+model.optim.max_norm=1.0", "trainer.gradient_clip_val=0"],
    ),
}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_a_name_in_its_configuration(name, runs):
    """fastclip's own clip in place of the toolkit's: another norm in the last bit."""
    expected, _ = runs.plain(name)
    program, more = INTEGRATIONS[name]
    found, _ = runs.train(name, "named", ["-c", program], *more)
    assert_close_as_a_whole(found, expected)


def assert_close_as_a_whole(found, expected):
    apart = torch.cat([(found[key] - expected[key]).float().flatten() for key in expected]).norm()
    size = torch.cat([expected[key].float().flatten() for key in expected]).norm()
    assert apart <= 1e-6 * size


def test_nemos_target_under_the_patch(runs):
    """NeMo makes optimizers of torch.optim only; under the patch those take fastclip's settings."""
    own = ["~model.optim.name", "+model.optim._target_=torch.optim.SGD", "+model.optim.max_norm=1.0",
           "trainer.gradient_clip_val=0"]  # fmt: skip
    found, said = runs.patched("NeMo", *own)
    assert "fastclip: 12 steps, no clips\n" in said
    assert_close_as_a_whole(found, runs.plain("NeMo")[0])


def test_nemos_own_clip_in_mixed_precision(runs):
    """Which Lightning would refuse to a fused optimizer, though bfloat16 is not scaled."""
    expected, _ = runs.plain("NeMo", "+trainer.precision=bf16-mixed")
    found, said = runs.patched("NeMo", "+trainer.precision=bf16-mixed")
    assert "fastclip: 12 steps, 12 clips deferred to the step\n" in said
    assert all(torch.equal(found[key], expected[key]) for key in expected)


NOVOGRAD = [{}, {"weight_decay": 1e-3}, {"betas": (0.8, 0.25), "grad_averaging": True, "weight_decay": 0.01}]


@pytest.mark.parametrize("settings", NOVOGRAD, ids=str)
def test_novograd_is_that_of_nemo(settings):
    """200 steps, then checkpoints are exchanged and both go on."""
    theirs_of = pytest.importorskip("nemo.core.optim.novograd", reason="needs NeMo: make toolkits").Novograd
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in [(300, 200), (512,), (3, 4, 5), (1,), ()]]
    theirs = [p.detach().clone().requires_grad_() for p in ours]

    def step(of_ours, of_theirs):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        of_ours.step()
        of_theirs.step()

    optimizer, expected = fastclip.NovoGrad(ours, lr=0.01, **settings), theirs_of(theirs, lr=0.01, **settings)
    for _ in range(200):
        step(optimizer, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    loaded, given = fastclip.NovoGrad(ours), theirs_of(theirs)
    loaded.load_state_dict(copy.deepcopy(expected.state_dict()))
    given.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    for _ in range(3):
        step(loaded, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
