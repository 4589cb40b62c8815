"""`make edge`: the split of the recordings, LoRA, the bits of the steps, measured and limited memory, a tiny run."""

import copy
import ctypes
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("tqdm", reason="the example needs tqdm")
try:
    import torchaudio.models  # noqa: F401
except (ImportError, OSError):
    pytest.skip("the example needs torchaudio", allow_module_level=True)

from examples.edge import __main__ as edge  # noqa: E402
from examples.edge import adapt, memory, report, voice  # noqa: E402
from examples.edge.steps import BYTES, STEPS  # noqa: E402
from examples.edge.ways import WAYS, LoRA, add_lora, merge_lora, trainable  # noqa: E402
from examples.speech.models import Conformer  # noqa: E402
from tests.support.project import ROOT  # noqa: E402
from tests.support.recordings import tone  # noqa: E402

TINY = {"frames": 40, "batch": 1, "labels": 2, "symbols": 5, "mels": 8, "hidden": 8, "layers": 1, "heads": 2}
SIZES = voice.Sizes(train=16, test=4, adapt=6, new=4)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tones(monkeypatch):
    """Three voices; each digit of each has a pitch of its own."""
    clips = {
        name: [tone(0.2, 200 + 150 * digit + 40 * number, 8000) for digit in range(10)]
        for number, name in enumerate(("en", "it", "it-menardi"))
    }
    monkeypatch.setattr(voice, "digit_clips", lambda cache: ("recorded", clips))
    return clips


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return Conformer(TINY["symbols"], TINY["mels"], TINY["hidden"], TINY["layers"], TINY["heads"])


def loss_of(model, seed=0):
    features = torch.randn(2, 40, TINY["mels"], generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.ctc_loss(
        model(features), torch.tensor([1, 2, 3, 4]), torch.tensor([10, 10]), torch.tensor([2, 2])
    )


def test_no_recording_is_both_adapted_to_and_left_out(tones, monkeypatch):
    drawn, original = [], voice.digit_string

    def noting(clips, make, **more):
        utterance = original(clips, make, **more)
        drawn.append((clips, utterance))
        return utterance

    monkeypatch.setattr(voice, "digit_string", noting)
    task = voice.make_task("cache", 0, sizes=SIZES)
    assert task.voice == "it-menardi"
    of_others = [u.text for clips, u in drawn if clips == [tones["en"], tones["it"]]]
    of_the_voice = [u.text for clips, u in drawn if clips == [tones["it-menardi"]]]
    assert len(of_others) == SIZES.train + SIZES.test == len(task.train) + len(task.test)
    assert len(of_others) + len(of_the_voice) == len(drawn)
    assert of_the_voice == [text for f in task.folds for kind in (f.adapt, f.same, f.new) for _, _, text in kind]
    for fold in task.folds:
        # Of this voice, a digit is a recording.
        left_out = set(map(str, fold.left_out))
        assert (len(fold.adapt), len(fold.same), len(fold.new)) == (SIZES.adapt, SIZES.new, SIZES.new)
        assert all(left_out.isdisjoint(text) for _, _, text in fold.adapt + fold.same)
        assert all(left_out.issuperset(text) for _, _, text in fold.new)
    assert sorted(digit for fold in task.folds for digit in fold.left_out) == list(range(10))


def test_digits_that_nobody_chose_are_drawn_as_before(tones):
    """The demo's, the article's and the study's strings stay what they are in committed results."""
    from examples.speech.data import digit_string

    texts = [digit_string(list(tones.values()), make).text for make in [voice.random.Random(5)] for _ in range(8)]
    assert texts == ["58", "81", "9", "2", "6", "909", "560", "58"]


def test_a_voice_that_is_not_there_is_named(tones, tmp_path, capsys):
    assert edge.main(["--out", str(tmp_path), "--voice", "nobody"]) == 2
    assert "no voice 'nobody' in the recorded digits, but en, it, it-menardi" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
    ],
)
def test_a_bad_option_is_named(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        edge.main(arguments)
    assert says in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert edge.main(["--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_lora_starts_as_the_layer_and_merges_into_it():
    model = tiny_model().eval()
    features = torch.randn(1, 40, TINY["mels"])
    before, names = model(features), list(model.state_dict())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    add_lora(model)
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(adapters) == 4 * TINY["layers"]  # two feed-forward modules of two linear layers
    assert torch.equal(model(features), before)
    expected = sum(p.numel() for a in adapters for p in (a.down, a.up)) + sum(
        p.numel() for p in model.head.parameters()
    )
    assert sum(p.numel() for p in trainable(model)) == expected

    take = STEPS["fastclip"](model, lr=1.0)
    for _ in range(5):
        take(loss_of(model))
    assert all(a.up.abs().max() > 0 for a in adapters)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name.replace(".linear.", ".")])
    adapted = model(features)
    assert (adapted - before).abs().max() > 1e-3
    merge_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(features), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_have_torch_s_bits_but_for_bfloat16(way):
    start, trained = tiny_model(), {}
    for step in STEPS:
        model = copy.deepcopy(start)
        torch.manual_seed(1)
        WAYS[way](model)
        take = STEPS[step](model, lr=0.1)
        for seed in range(4):
            take(loss_of(model, seed))
        trained[step] = list(model.parameters())
        assert all(p.grad is None for p in trainable(model)), step
    moved = [not torch.equal(p, q) for p, q in zip(trained["torch"], start.parameters(), strict=False)]
    assert any(moved) and (way != "all layers" or all(moved))
    for step in ("torch, hooks", "fastclip"):
        assert all(map(torch.equal, trained["torch"], trained[step])), step
    rounded = trained["fastclip, bfloat16"]
    assert not all(map(torch.equal, trained["torch"], rounded))
    for p, q in zip(trained["torch"], rounded, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)  # of a move of up to 9e-3


def test_the_peak_sees_what_was_allocated_and_freed():
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would be used again
    before, peak = memory.peak_of(lambda: torch.ones(64 * memory.MIB // 4))
    assert peak - before > 60 * memory.MIB
    before, peak = memory.peak_of(lambda: None)
    assert peak - before < 30 * memory.MIB


def test_a_child_trains_or_says_that_its_memory_is_short():
    child = memory.run_child("LoRA", "fastclip, bfloat16", TINY, steps=1)
    assert 0 < child.pop("last_step_seconds") < 60
    assert 0 < child["imports"] <= child["before"] <= child["peak"]
    assert 0 < child["trained"] < child["parameters"] == edge.parameters_of(TINY) + 4 * 8 * (8 + 32)
    large = {**TINY, "hidden": 1024, "layers": 20}
    settings = {"way": "all layers", "step": "torch", "size": large, "steps": 1, "limit": 450 * memory.MIB}
    done = subprocess.run(
        [sys.executable, "-m", "examples.edge.child", json.dumps(settings)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == memory.OUT_OF_MEMORY, done.stderr
    assert done.stdout == "" and done.stderr.startswith("out of memory with 450 MiB: ")
    assert memory.run_child(**settings | {"limit": 64 * memory.MIB}) is None  # less than torch has


def test_a_child_gets_its_variables():
    with pytest.raises(memory.RunError, match="PYTHONMALLOC"):
        memory.run_child("LoRA", "fastclip", TINY, variables={"PYTHONMALLOC": "nobody's"})  # Python refuses it


def test_a_child_that_fails_otherwise_is_no_lack_of_memory():
    with pytest.raises(memory.RunError, match="(?s)all layers, torch: the child ended with 1 and said.*KeyError"):
        memory.run_child("all layers", "torch", {}, limit=1024 * memory.MIB)


@pytest.mark.parametrize("needed", [1, 130, 999, 1000, 2500])
def test_the_smallest_limit_is_found(needed):
    tried = []

    def fits(limit):
        tried.append(limit)
        return limit >= needed

    found = memory.smallest_limit(fits, 100, 1000, resolution=8)
    assert found >= needed and (found - needed < 8 or found - 100 <= 8)
    assert len(tried) <= 12 and len(set(tried)) == len(tried)


def test_a_tiny_run(tones, tmp_path, monkeypatch, capsys):
    asked = []

    def run_child(way, step, size, limit=None, steps=2, variables=None):
        asked.append((way, step, variables))
        needed = memory.MIB * (200 + 10 * list(STEPS)[::-1].index(step) + (2000 if size == edge.LARGE else 0))
        child = {"parameters": 9, "trained": 9, "imports": memory.MIB, "before": 100 * memory.MIB, "peak": needed}
        child["last_step_seconds"] = 1.25
        return None if limit is not None and limit < needed else child

    monkeypatch.setattr(edge, "run_child", run_child)
    monkeypatch.setattr(edge, "LARGE_LIMIT", 2225 * memory.MIB)
    monkeypatch.setattr(edge, "SETTINGS", adapt.Settings(hidden=8, layers=1, epochs=1, adapt_steps=1))
    monkeypatch.setattr(voice, "Sizes", lambda: SIZES)
    assert edge.main(["--out", str(tmp_path), "--seeds", "2", "--seed", "3"]) == 0
    found = json.loads((tmp_path / "edge.json").read_text())
    seeds = found["words"]["seeds"]
    assert list(seeds) == ["3", "4"] and found["settings"]["seeds"] == 2
    for rates in seeds.values():
        assert set(rates) == {"before", *(f"{way}, {step}" for way in WAYS for step in adapt.COMPARED)}
        assert all(len(folds) == voice.FOLDS and set(folds[0]) == set(report.TESTS) for folds in rates.values())
    assert {step for way, step, _ in asked if way == "all layers"} == set(STEPS)
    assert {step for way, step, _ in asked if way != "all layers"} == set(adapt.COMPARED)
    assert asked.count(("all layers", "torch", memory.RETURNED)) == 1
    assert [len(of_step) for of_step in found["memory"]["children"]["all layers"].values()] == [edge.REPEATS] * len(
        STEPS
    )
    limits = list(found["memory"]["smallest_limits"].values())
    assert limits == sorted(limits, reverse=True) and limits[0] > limits[-1]
    trains = found["memory"]["large"]["trains"]
    assert list(trains.values()) == [False, True, True, True]
    said = capsys.readouterr().out
    assert "out of memory" in said and "new voice, the two left out: torch" in said
    assert found["command"] == f"python -m examples.edge --out {tmp_path} --seeds 2 --seed 3"


def test_the_tables_of_the_page_are_those_of_the_recorded_run():
    found = json.loads((ROOT / "docs/study/edge.json").read_text())
    assert found["dirty"] is False
    page = (ROOT / "docs/edge.md").read_text()
    tables = {
        "edge": report.word_rows(found["words"]),
        "edge-memory": report.memory_rows(found["memory"]),
        "edge-ways": report.ways_rows(found["memory"]),
    }
    for name, rows in tables.items():
        assert page.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0] == report.markdown(rows)
    assert report.mib(found["memory"]["returned"]["children"]["torch"]["imports"]) in page
    theirs, ours = adapt.COMPARED
    means = {
        s: [report.mean_rate(found["words"], f"{w}, {s}", t) for w in WAYS for t in report.TESTS]
        for s in adapt.COMPARED
    }
    largest = max(abs(a - b) for a, b in zip(means[theirs], means[ours], strict=True))
    assert f"changes no mean by more than {largest:.1f} points" in page


def test_the_prediction_of_the_page_holds_in_the_recorded_run():
    children = json.loads((ROOT / "docs/study/edge.json").read_text())["memory"]["returned"]["children"]
    grown = {step: report.growth(child) for step, child in children.items()}
    expected = {step: BYTES[step] * child["trained"] for step, child in children.items()}
    assert expected["torch"] < grown["torch"] < 1.1 * expected["torch"]
    activations = [grown[step] - expected[step] for step in STEPS if step != "torch"]
    assert max(activations) - min(activations) < 16 * memory.MIB
