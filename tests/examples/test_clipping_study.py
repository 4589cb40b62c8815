"""The clipping study: a tiny grid over generated tones, what interrupts it, and the page's numbers."""

import csv
import errno
import itertools
import json
import math
import re
import sys
from statistics import median

import pytest
import torch

from tests.support.project import ROOT

for module in ("matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the study needs {module}")

from examples.support import safe_files  # noqa: E402
from studies.clipping import __main__ as clipping_study  # noqa: E402
from studies.clipping import cell as clipping_study_cell  # noqa: E402
from studies.clipping import clips as clips_of_study  # noqa: E402
from studies.clipping import grids  # noqa: E402
from studies.clipping import page as page_of  # noqa: E402
from studies.clipping import results as results_of  # noqa: E402
from studies.clipping import situation as situations_of  # noqa: E402
from studies.clipping import summary as summary_of  # noqa: E402
from studies.clipping.cell import Cell, held_out_voice, load_data, train_cell  # noqa: E402

TINY = ["--quick", "--models", "cnn", "--seeds", "1", "--epochs", "1", "--strings", "32"]
CELLS = 8


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def tones(monkeypatch):
    """Instead of recordings: three voices, two of them of one language, whose digits are tones."""
    seconds = torch.arange(1600) / 8000
    voices = {
        voice: [0.5 * torch.sin(2 * math.pi * (base + 150 * digit) * seconds) for digit in range(10)]
        for voice, base in {"xx": 300, "xx-other": 330, "yy": 360}.items()
    }
    monkeypatch.setattr(clipping_study_cell, "digit_clips", lambda cache: ("recorded", voices))


def study(capsys, out, *more, options=TINY):
    try:
        code = clipping_study.main(["--device", "cpu", *options, "--out", str(out), *more])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def results(out):
    """The rows without what a repetition may change."""
    with open(out / "clipping.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "cpu_seconds"} for row in csv.DictReader(file)]


def interrupted_after(monkeypatch, cells):
    """Counts the cells trained; Ctrl-C comes in the one after `cells`."""
    trained = []

    def train(cell, *rest):
        if len(trained) == cells:
            raise KeyboardInterrupt
        trained.append(cell)
        return train_cell(cell, *rest)

    monkeypatch.setattr(clipping_study, "train_cell", train)
    return trained


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, capsys, monkeypatch):
    first = interrupted_after(monkeypatch, 2)
    code, _, said = study(capsys, tmp_path / "a")
    assert code == 130 and "Stopped" in said and "goes on" in said
    before = results(tmp_path / "a")
    assert len(before) == 2
    second = interrupted_after(monkeypatch, CELLS)
    code, out, _ = study(capsys, tmp_path / "a")
    assert code == 0 and f"{CELLS} cells, 2 of them" in out
    assert len(second) == CELLS - 2 and not set(first) & set(second)
    again = interrupted_after(monkeypatch, 0)
    assert study(capsys, tmp_path / "a")[0] == 0 and again == []

    interrupted_after(monkeypatch, CELLS)
    assert study(capsys, tmp_path / "b")[0] == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert results(tmp_path / "a")[:2] == before
    assert len(json.loads((tmp_path / "a" / "clipping.json").read_text())["starts"]) == 2


def test_on_any_device(tmp_path, capsys, device):
    code, _, said = study(capsys, tmp_path, "--device", device)
    assert code == 0, said
    assert {row["machine"] for row in results(tmp_path)} != {""}


def test_rows_table_and_pictures(tmp_path, capsys, monkeypatch):
    """A learning rate of 1e30 diverges with any clip but a limit on the change."""
    monkeypatch.setattr(grids, "QUICK_LEARNING_RATES", (1e-2, 1e30))
    code, out, said = study(capsys, tmp_path)
    assert code == 0, said
    rows = results(tmp_path)
    assert len(rows) == CELLS and f"{CELLS} cells, 3 diverged" in out
    for row in rows:
        diverged = row["lr"] == "1e+30" and row["kind"] != "change"
        assert row["diverged"] == str(int(diverged))
        assert (int(row["steps"]) < 2) == diverged
        if diverged:
            assert (row["wer"], row["wer_new_voice"]) == ("100", "100")
        else:
            assert float(row["final_loss"]) > 0 and float(row["wer_new_voice"]) >= 0
    for clip in ("no clip", "value 0.01", "norm 1", "change 0.03"):
        assert re.search(rf"^cnn +{clip} +0.01 ", out, re.MULTILINE)
    for name in ("rates.png", "heatmap_cnn.png", "curves_cnn.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    about = json.loads((tmp_path / "clipping.json").read_text())
    assert about["settings"]["epochs"] == 1 and [start["versions"]["torch"] for start in about["starts"]] == [
        torch.__version__
    ]
    assert "2 voices" in about["settings"]["data"] and about["settings"]["test_new_voice"] > 0


SHARES = [("none", None, 0), ("value", 1e9, 0), ("value", 0, 1), ("norm", 1e9, 0), ("norm", 1e-6, 1)]
SHARES += [("change", 1e9, 0), ("change", 1e-6, 1), ("quantile", 0.5, 0), ("norm 10, skip", 8, 1)]
SHARES += [("micro-batch norm", 1e9, 0), ("micro-batch norm", 1e-6, 1)]


@pytest.mark.parametrize("kind, threshold, share", SHARES)
def test_share_that_was_clipped(kind, threshold, share):
    data = load_data(None, None, seed=0, strings=32)
    row = train_cell(Cell("cnn", kind, threshold, 1e-3, 0), data, epochs=1)
    assert row["clipped"] == pytest.approx(share, abs=0.1)  # clamp to 0: an element that is 0 is not outside
    assert row["norm_p90"] >= row["norm_median"] > 0


def test_situations_are_a_table_of_their_own(tmp_path, capsys, monkeypatch):
    names = ("as it is", "loss × 100", "no momentum", "width 256", "AdamW")
    monkeypatch.setattr(grids, "SITUATIONS", {name: situations_of.SITUATIONS[name] for name in names})
    monkeypatch.setattr(grids, "SITUATION_CLIPS", {"none": (None,), "change": (0.03,), "quantile": (0.5,)})
    monkeypatch.setattr(grids, "ADAMW_CLIPS", {})
    options = [option for option in TINY if option != "--quick"]
    code, out, said = study(capsys, tmp_path, "--situations", options=options)
    assert code == 0, said
    rows = results_of.read_rows(tmp_path / "situations.csv", results_of.OF_SITUATIONS)
    assert len(rows) == (4 * 3 + 2) * 2
    assert {row["kind"] for row in rows if row["situation"] == "AdamW"} == {"none", "quantile"}
    size = {row["situation"]: row["parameters"] for row in rows}
    assert size["width 256"] > 10 * size["as it is"] == 10 * size["no momentum"]
    norms = {row["situation"]: row["norm_median"] for row in rows if (row["kind"], row["lr"]) == ("change", 0.01)}
    assert norms["loss × 100"] > 10 * norms["as it is"]
    assert "| quantile 0.5, lr 0.01 | " in out and "| – |" in out
    again = interrupted_after(monkeypatch, 0)
    assert study(capsys, tmp_path, "--situations", options=options)[0] == 0 and again == []


@pytest.mark.parametrize("model", clipping_study_cell.MODELS)
def test_micro_batches_under_a_loose_clip_add_up_to_the_batch(model):
    """The losses are those of a training without a clip, but for rounding: for a few steps."""
    if model == "conformer":
        pytest.importorskip("torchaudio", reason="the Conformer is torchaudio's")
    data = load_data(None, None, seed=0, strings=64)
    clips = ("none", None), ("micro-batch norm", 1e9), ("micro-batch norm", 1e-6)
    plain, loose, tight = (train_cell(Cell(model, *clip, 1e-3, 0), data, epochs=1) for clip in clips)
    # Each part is padded to its own longest string, which a model hears at the end.
    assert loose["losses"] == pytest.approx(plain["losses"], rel=0.1)
    assert loose["norm_median"] > 1000 * tight["norm_median"]
    assert tight["norm_p90"] <= clips_of_study.MICRO_BATCHES * 1e-6 * 1.001


@pytest.mark.parametrize("corpus", situations_of.CORPORA)
def test_bad_strings_are_the_same_in_all_cells_of_a_seed(corpus):
    situation = situations_of.Situation(corpus=corpus)
    examples = [(torch.randn(10, 4), torch.tensor([i]), str(i)) for i in range(100)]
    first, again, other = (situations_of.spoilt_corpus(examples, situation, seed) for seed in (0, 0, 1))

    def changed(made):
        same = (own is new or (torch.equal(own[0], new[0]) and torch.equal(own[1], new[1]))
                for own, new in zip(examples, made, strict=True))  # fmt: skip
        return [i for i, equal in enumerate(same) if not equal]

    assert len(changed(first)) == 100 * situations_of.CORPORA[corpus][1]
    assert changed(first) == changed(again) != changed(other)
    for i in changed(first):
        assert torch.equal(first[i][0], again[i][0]) and torch.equal(first[i][1], again[i][1])
        assert (first[i][2] == examples[i][2]) == (corpus == "corrupt")
    assert sorted(text for *_, text in first) == sorted(text for *_, text in examples)
    assert situations_of.spoilt_corpus(examples, situations_of.Situation(), 0) is examples


@pytest.mark.parametrize("name", [name for name, of in situations_of.SITUATIONS.items() if of.bad])
def test_bad_batches_are_the_same_in_all_cells_of_a_seed(name):
    situation = situations_of.SITUATIONS[name]
    examples = [(torch.randn(10 + i, 4), torch.tensor([1, 2]), "12") for i in range(12)]
    first, again, other = (situations_of.BadBatches(situation, seed) for seed in (0, 0, 1))
    assert first.steps == again.steps and min(first.steps) >= situations_of.BEFORE
    assert len([step for step in first.steps if step < 400]) == pytest.approx(20 if "2 %" not in name else 8, abs=8)
    assert (first.steps == other.steps) == (situation.bad == "burst")
    made, made_again = first.spoil(examples), again.spoil(examples)
    for (frames, target, _), (frames_again, *_), (own, own_target, _) in zip(made, made_again, examples, strict=True):
        assert torch.equal(frames, frames_again)
        assert frames.abs().mean() > 10 * own.abs().mean() or len(target) == 8 * len(own_target)


def test_all_cells_of_a_seed_start_alike():
    data = load_data(None, None, seed=3, strings=16)
    rows = [train_cell(Cell("gru", *clip, 1e-2, 3), data, epochs=1) for clip in (("none", None), ("norm", 1e-3))]
    assert rows[0]["losses"][0] == rows[1]["losses"][0]
    assert rows[0]["wer"] == train_cell(Cell("gru", "none", None, 1e-2, 3), data, epochs=1)["wer"]


def test_divergence():
    diverges = clipping_study_cell.diverges
    assert diverges([50.0, math.nan], 1.0, 50)
    assert diverges([50.0, 40.0], math.inf, 50)
    assert not diverges(50 * [99.0], 1.0, 50)  # it may still come right
    assert diverges(101 * [76.0], 1.0, 50)
    assert not diverges([10.0] + 100 * [74.0], 1.0, 50)  # whatever the first batch was


def test_held_out_voice_has_a_companion_in_its_language():
    voices = ["en", "it", "ru", "it-menardi"]
    assert [held_out_voice(voices, seed) for seed in range(3)] == ["it", "it-menardi", "it"]
    assert held_out_voice(["en-us+f2", "en+m1"], 0) == "en-us+f2"
    assert held_out_voice(["en", "ru"], 0) is None


def test_other_settings_need_another_folder(tmp_path, capsys):
    assert study(capsys, tmp_path)[0] == 0
    (tmp_path / "clipping.csv").unlink()
    code, _, said = study(capsys, tmp_path, "--epochs", "2")
    assert code == 2 and "epochs 1, now 2" in said and "--out" in said
    (tmp_path / "clipping.json").write_text("[]")
    code, _, said = study(capsys, tmp_path)
    assert code == 2 and "clipping.json: not the settings" in said


def header():
    return ",".join(results_of.COLUMNS) + "\n"


BROKEN = {
    "another file": ("a,b\n1,2\n", ["clipping.csv", "first line", "move it away"]),
    "no text": (b"\xff\xfe", ["clipping.csv", "not a CSV"]),
    "empty": ("", ["clipping.csv", "first line"]),
    "half a row": (header() + "cnn,none,,0.1\n", ["clipping.csv, line 2", "4 columns instead of 20"]),
    "no number": (header() + "cnn,none,,fast" + 16 * ",1" + "\n", ["clipping.csv, line 2", "'fast'"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_csv_is_named_and_left_alone(tmp_path, capsys, case):
    content, expected = BROKEN[case]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "clipping.csv").write_bytes(content)
    code, _, said = study(capsys, tmp_path)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in expected)
    assert (tmp_path / "clipping.csv").read_bytes() == content


def test_no_space_left_keeps_what_was_done(tmp_path, capsys, monkeypatch):
    interrupted_after(monkeypatch, 2)
    study(capsys, tmp_path)
    before = (tmp_path / "clipping.csv").read_bytes()

    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 1:  # the settings still found room
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safe_files.os, "fsync", full)
    interrupted_after(monkeypatch, CELLS)
    code, _, said = study(capsys, tmp_path)
    assert code == 2 and "No space left on device" in said and "clipping.csv" in said and "Traceback" not in said
    assert (tmp_path / "clipping.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_a_conformer_needs_torchaudio(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.models", None)
    code, _, said = study(capsys, tmp_path, options=[*TINY[:1], "--models", "conformer", *TINY[3:]])
    assert code == 2 and "torchaudio" in said and "requirements.txt" in said and said.count("error") == 1


def test_two_studies_do_not_share_a_folder(tmp_path, capsys):
    with clipping_study.alone_in(tmp_path):
        code, _, said = study(capsys, tmp_path)
    assert code == 2 and "another study is writing there" in said


def test_bad_data_and_options(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for more, expected in [
        (["--data", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        (["--data", str(tmp_path / "empty")], "the folder is empty"),
        (["--out", str(tmp_path / "file")], "file: "),
        (["--models", "rnn"], "--models"),
        (["--seeds", "0"], "--seeds"),
        (["--epochs", "x"], "--epochs"),
        (["--report", str(tmp_path / "page.md")], "clipping.csv: no rows"),
    ]:
        code, _, said = study(capsys, tmp_path / "out", *more)
        assert code == 2 and expected in said and "Traceback" not in said


PAGE, RESULTS = ROOT / "docs" / "clipping.md", ROOT / "docs" / "study"
SITUATIONS_PAGE, MICRO_BATCHES_PAGE = ROOT / "docs" / "situations.md", ROOT / "docs" / "accumulation.md"


def test_the_page_says_what_the_results_say():
    page, rows = PAGE.read_text(), results_of.read_rows(RESULTS / "clipping.csv")
    assert set(re.findall(r"<!-- study:(\S+) -->", page)) == set(page_of.blocks(rows))
    assert page_of.updated(page, rows) == page


def test_the_reports_error_rates_are_those_of_the_file():
    """Read without the study's own code."""
    with open(RESULTS / "clipping.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    checked = 0
    for model in {row["model"] for row in rows}:
        table = PAGE.read_text().split(f"<!-- study:wer-{model} -->\n")[1].split("\n<!--")[0].splitlines()
        rates = [head.strip().removeprefix("lr ") for head in table[0].split("|")[2:-1]]
        for line in table[2:]:
            clip, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            kind, _, threshold = clip.replace("no clip", "none ").rpartition(" ")
            for lr, cell in zip(rates, cells, strict=True):
                same = [r for r in rows if (r["model"], r["kind"], r["lr"]) == (model, kind, lr)
                        and r["threshold"] == threshold]  # fmt: skip
                failed = sum(r["diverged"] == "1" for r in same)
                wanted = f"{median(float(r['wer']) for r in same):.0f}" + (f" ×{failed}" if failed else "")
                assert cell == wanted
                checked += len(same)
    assert checked == len(rows)


def test_error_rates_in_the_pages_text_are_those_of_the_file():
    """Such as 14 % (gru, norm 1, lr 0.1)."""
    groups = summary_of.groups_of(results_of.read_rows(RESULTS / "clipping.csv"))
    said = re.findall(
        r"(\d+) % \((\w+), (no clip|(?:value|norm|change|quantile|ema) [\d.]+), lr ([\d.]+)\)",
        " ".join(PAGE.read_text().split()),
    )
    assert len(said) > 20
    for rate, model, clip, lr in said:
        kind, _, threshold = clip.replace("no clip", "none").partition(" ")
        group = groups[model, kind, float(threshold) if threshold else None, float(lr)]
        assert rate == f"{group.median('wer'):.0f}", (model, clip, lr)


def test_the_tables_of_the_situations_are_those_of_the_file():
    """Read without the study's own code."""
    with open(RESULTS / "situations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text, checked = SITUATIONS_PAGE.read_text() + MICRO_BATCHES_PAGE.read_text(), set()
    for kind, model in itertools.product(("bad", "transfer", "adamw", "micro"), {row["model"] for row in rows}):
        table = text.split(f"<!-- study:{kind}-{model} -->\n")[1].split("\n<!--")[0].splitlines()
        situations = [head.strip() for head in table[0].split("|")[2:-1]]
        for line in table[2:]:
            clip, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            name, _, lr = clip.rpartition(", lr ")
            for situation, cell in zip(situations, cells, strict=True):
                same = [
                    r for r in rows
                    if (r["situation"], r["model"], r["lr"]) == (situation, model, lr)
                    and f"{r['kind']} {r['threshold']}".strip() == name.replace("no clip", "none")
                ]  # fmt: skip
                failed = sum(r["diverged"] == "1" for r in same)
                wanted = f"{median(float(r['wer']) for r in same):.0f}" if same else "–"
                assert cell == wanted + (f" ×{failed}" if failed else ""), (situation, model, clip)
                checked.update((situation, model, r["kind"], r["threshold"], lr, r["seed"]) for r in same)
    assert len(checked) == len(rows)
    about = json.loads((RESULTS / "situations.json").read_text())
    assert {row["commit"] for row in rows} == {start["commit"] for start in about["starts"] if not start["dirty"]}


def test_the_results_say_where_they_come_from():
    rows = results_of.read_rows(RESULTS / "clipping.csv")
    about = json.loads((RESULTS / "clipping.json").read_text())
    assert {row["commit"] for row in rows} == {start["commit"] for start in about["starts"] if not start["dirty"]}
    assert {row["torch"] for row in rows} == {start["versions"]["torch"] for start in about["starts"]}
    for model in {row["model"] for row in rows}:
        assert re.search(rf"\b{model}\b", PAGE.read_text())
    pictures = {path.name for path in RESULTS.glob("*.png")}
    assert pictures == set(re.findall(r"study/(\w+\.png)", PAGE.read_text())) >= {"rates.png", "heatmap_gru.png"}
    assert all(0 < (RESULTS / name).stat().st_size < 150_000 for name in pictures)


def test_a_block_without_results_is_an_error():
    with pytest.raises(clipping_study.SpeechDataError, match="study:wer-other"):
        page_of.updated("<!-- study:wer-other -->\n<!-- /study:wer-other -->", [])
