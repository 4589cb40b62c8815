"""The benchmark's models have the shapes that their libraries build, and are refused where memory does not do."""

import bisect
import gc
import importlib
import json
import math

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install -r requirements-demo.txt")

from benchmarks import cpu, gpu  # noqa: E402
from benchmarks import shapes as libraries  # noqa: E402
from benchmarks.core import agreement, contenders, devices, gpu_rows, memory, models, rows, timing  # noqa: E402
from benchmarks.core.models import MODELS, DeepSpeech2, count  # noqa: E402
from benchmarks.core.problem import Problem  # noqa: E402

# Tensors; parameters; tensors of up to 1K, 4K, 64K, 256K, 1M, 4M elements, and of more.
PUBLISHED = {
    "dnn": (4, 37_184, (2, 0, 2, 0, 0, 0, 0)),
    "gru-ctc": (20, 300_203, (10, 1, 9, 0, 0, 0, 0)),
    "tiny-600": (600, 86_400, (600, 0, 0, 0, 0, 0, 0)),
    "dense-100m": (6, 100.7e6, (0, 0, 0, 0, 0, 0, 6)),
    "wav2letter": (22, 24.1e6, (9, 2, 1, 0, 8, 1, 1)),
    "deepspeech": (18, 29.6e6, (1, 8, 0, 2, 0, 7, 0)),
    "deepspeech2": (57, 86.6e6, (14, 20, 2, 1, 0, 18, 2)),
    "conformer-s": (480, 7.8e6, (336, 0, 80, 64, 0, 0, 0)),
    "conformer-m": (480, 24.4e6, (336, 0, 48, 96, 0, 0, 0)),
    "conformer-l": (510, 103.0e6, (306, 51, 17, 34, 102, 0, 0)),
    "emformer-rnnt": (352, 76.7e6, (214, 26, 2, 40, 68, 1, 1)),
    "wav2vec2-base": (212, 94.4e6, (118, 12, 2, 0, 55, 24, 1)),
    "wav2vec2-large": (404, 315.5e6, (226, 24, 2, 0, 103, 48, 1)),
    "hubert-xlarge": (800, 962.5e6, (18, 436, 50, 0, 7, 192, 97)),
    "zipformer-m": (743, 65.55e6, (400, 28, 120, 100, 95, 0, 0)),
    "whisper-small": (478, 240.6e6, (258, 24, 0, 1, 145, 49, 1)),
    "whisper-large": (1258, 1541.4e6, (0, 678, 64, 0, 2, 384, 130)),
}
EDGES = [2**10, 2**12, 2**16, 2**18, 2**20, 2**22]


@pytest.mark.parametrize("model", MODELS)
def test_models_have_the_published_sizes(model):
    tensors, params, histogram = PUBLISHED[model]
    sizes = [math.prod(shape) for shape in MODELS[model]]
    assert len(sizes) == tensors
    assert sum(sizes) == count(MODELS[model]) == pytest.approx(params, abs=0.05e6 if params > 1e6 else 0)
    places = [bisect.bisect_left(EDGES, size) for size in sizes]
    assert tuple(places.count(place) for place in range(7)) == histogram


@pytest.mark.parametrize("model", libraries.MODELS)
def test_the_recorded_shapes_are_those_that_the_library_builds(model):
    try:
        built = libraries.build(model)
    except ImportError as error:
        pytest.skip(str(error))
    assert built == MODELS[model]


def test_deepspeech2_runs():
    """What is timed by its shapes is a model that computes something."""
    log_probs = DeepSpeech2(bins=33, hidden=8, layers=2, symbols=5, channels=2)(torch.randn(3, 1, 33, 40))
    assert log_probs.shape == (20, 3, 5)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(20, 3))


def without(monkeypatch, missing):
    """Takes a library away."""
    real = importlib.import_module

    def import_module(name):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(libraries.importlib, "import_module", import_module)


@pytest.mark.parametrize(("missing", "model"), [("torchaudio", "conformer-s"), ("transformers", "whisper-small")])
def test_a_missing_library_is_named_and_nothing_written(missing, model, monkeypatch, tmp_path, capsys):
    without(monkeypatch, missing)
    with pytest.raises(ImportError, match=f"needs {missing}: pip install"):
        libraries.build(model)
    monkeypatch.setattr(libraries, "MODELS", {model: libraries.MODELS[model]})
    path = tmp_path / "shapes.json"
    path.write_text('{"models": {}}')
    monkeypatch.setattr(models, "PATH", path)
    assert libraries.main(["--write"]) == 1
    assert f"needs {missing}" in capsys.readouterr().err
    assert path.read_text() == '{"models": {}}'


def test_a_library_that_does_not_load_is_named(monkeypatch):
    def import_module(name):
        raise OSError("libc10_cuda.so: cannot open")

    monkeypatch.setattr(libraries.importlib, "import_module", import_module)
    with pytest.raises(ImportError, match=r"needs torchaudio, which does not import \(libc10_cuda.*torchaudio_on_cpu"):
        libraries.build("conformer-s")


def test_the_command_writes_the_file_and_finds_what_differs(monkeypatch, tmp_path, capsys):
    built = {"conformer-s": lambda: torch.nn.Linear(3, 2), "whisper-small": lambda: torch.nn.Linear(2, 1)}
    monkeypatch.setattr(libraries, "MODELS", built)
    monkeypatch.setattr(models, "PATH", tmp_path / "shapes.json")
    monkeypatch.setattr(libraries.importlib.metadata, "version", lambda name: "1.2")
    assert libraries.main(["--write"]) == 0
    assert models.recorded() == {"conformer-s": [(2, 3), (2,)], "whisper-small": [(1, 2), (1,)]}
    assert json.loads(models.PATH.read_text())["made_with"] == {"torchaudio": "1.2", "transformers": "1.2"}
    capsys.readouterr()
    monkeypatch.setitem(built, "conformer-s", lambda: torch.nn.Linear(4, 2))
    assert libraries.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "conformer-s: DIFFERS from shapes.json",
        "whisper-small: as in shapes.json",
    ]


@pytest.fixture
def live_bytes():
    """A function that counts the bytes of all tensors made since, each memory once."""

    def count_bytes():
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    gc.collect()
    gc.freeze()  # what is there already is not looked at
    yield count_bytes
    gc.unfreeze()


@pytest.mark.parametrize(
    ("dtype", "which"), [(torch.float32, "sgd"), (torch.bfloat16, "sgd"), (torch.float32, "amsgrad")]
)
def test_the_memory_needed_is_what_a_run_takes(dtype, which, live_bytes, monkeypatch):
    rule = contenders.RULES[which][-1]
    monkeypatch.setattr(rows, "LARGE", 1)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-9)
    # torch's fused SGD without momentum leaves bfloat16 parameters as they are in its CPU kernel's vectors (2.13).
    monkeypatch.setitem(contenders.CONTENDERS, "fused", contenders.foreach)
    seen = []

    def watched(function):
        def wrapper(*args):
            seen.append(live_bytes())
            return function(*args)

        return wrapper

    monkeypatch.setattr(contenders.Contender, "results", watched(contenders.Contender.results))
    monkeypatch.setattr(agreement, "compare", watched(agreement.compare))
    monkeypatch.setattr(timing, "rounds", watched(timing.rounds))
    problem = Problem("dnn", MODELS["dnn"], dtype=dtype)
    rows.agreement_row(problem, "norm", rule)
    if dtype is torch.float32:
        cpu.timed_rows(problem, "norm", rule, [1], 1)
    device = devices.Cpu()
    device.copy_elements = 1
    gpu_rows.measure(problem, "norm", rule, device, 1)
    need = memory.needed(["dnn"], dtype.itemsize, len(rule.states))
    assert 0.99 * need < max(seen) < 1.01 * need


def test_memory_needed_by_hand():
    assert memory.kept("dense-100m") == 40 * 100_663_296
    assert memory.at_work("dense-100m") == 28 * 100_663_296
    two = ["dnn", "dense-100m"]
    assert memory.needed(two) == memory.kept("dnn") + memory.kept("dense-100m") + memory.at_work("dense-100m")
    assert memory.shortage(two, None) is None
    assert memory.shortage(two, memory.needed(two)) is None
    told = "dnn, dense-100m: 6.4 GiB of memory needed, 6.3 GiB available"
    assert memory.shortage(two, memory.needed(two) - 2**26) == told


def test_what_is_measured_by_default_is_known_and_fits_8_gib():
    assert {*cpu.DEFAULT, *cpu.QUICK, *gpu.QUICK, *dict(gpu.DEFAULT)} <= MODELS.keys()
    assert memory.needed(cpu.DEFAULT) < 8 * 2**30


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "memory.max")
    free = memory.available()
    if free is None:
        pytest.skip("this system does not tell its free memory")
    assert free > 2**20
    memory.LIMIT.write_text(f"{2**20}\n")
    assert memory.available() == 2**20
    memory.LIMIT.write_text("max\n")
    assert memory.available() > 2**20


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "available", lambda: 2**34)
    monkeypatch.setattr(cpu, "Problem", lambda *_: pytest.fail("allocated"))
    assert cpu.main(["--model", "dnn", "whisper-large", "--out", str(tmp_path)]) == 2
    told = "dnn, whisper-large: 97.6 GiB of memory needed, 16.0 GiB available"
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_a_gpu_stops_no_other_model(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    arguments = ["--device", "cpu", "--rounds", "2", "--model", "dnn", "whisper-small", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["model"] for row in found["cases"]} == {"dnn"}
    error = "whisper-small: 15.2 GiB of memory needed, 1.0 GiB available"
    assert found["failed"] == [{"case": "whisper-small float32", "error": error}]
