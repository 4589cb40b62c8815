"""`make recipe`: its stopwatch, what it reads from ESPnet's log, and one short run with the real ESPnet."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

for module in ("matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the recipe needs {module}")

from examples.recipe import __main__ as recipe  # noqa: E402
from examples.recipe import report  # noqa: E402
from examples.speech.data import Speech, Utterance  # noqa: E402
from tests.support.project import ROOT  # noqa: E402
from tests.support.recordings import tone  # noqa: E402

LINE = (
    "[vm] 2026-01-01 00:00:00,000 (trainer:394) INFO: {}epoch results: [train] iter_time=0.003, loss_ctc=3.994, "
    "loss=3.994, grad_norm=12.5, clip=97.333, loss_scale=1.000, optim_step_time=0.028, optim0_lr0=0.002, "
    "train_time=0.312, time=23.38 seconds, total_count=150, [valid] loss_ctc=3.081, cer_ctc=0.541, loss_att=nan, "
    "loss=3.081, time=1.62 seconds\n"
)
LOGGED = {"loss": 3.994, "grad_norm": 12.5, "clip": 97.333, "optim_step_time": 0.028, "train_time": 0.312}


def test_stopwatch_notes_each_clip_update_and_step(tmp_path, monkeypatch):
    """In a program that knows nothing of it."""
    (tmp_path / "loop.py").write_text(
        "import sys, torch\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "optimizer = torch.optim.SGD([p], lr=1.0)\n"
        "for _ in range(3):\n"
        "    p.grad = torch.ones(3)\n"
        "    assert torch.nn.utils.clip_grad_norm_([p], 1.0) == torch.ones(3).norm()\n"
        "    optimizer.step()\n"
        "assert sys.argv[1:] == ['--its', 'argument']\n"
    )
    for launcher in ([], ["-m", "fastclip.run"]):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        command = [*launcher, "-m", "examples.recipe.stopwatch", tmp_path / "times.json", "loop", "--its", "argument"]
        said = "".join(recipe.run(command, tmp_path / "log", 1))
        seconds = json.loads((tmp_path / "times.json").read_text())
        assert [len(seconds[name]) for name in ("clip", "update", "step")] == [3, 3, 2]
        assert all(0 < value < 60 for values in seconds.values() for value in values)
        assert ("fastclip: 3 steps, 3 clips deferred to the step" in said) == bool(launcher)


def write_run(folder, wrong_words):
    (folder / "decoded" / "1best_recog").mkdir(parents=True)
    words = ["1 2", "3 4"]
    got = [words[0], " ".join(["9"] * wrong_words + ["4"] * (2 - wrong_words))]
    (folder / "decoded" / "1best_recog" / "text").write_text(f"a {got[0]}\nb {got[1]}\n")
    (folder / "times.json").write_text(json.dumps({"clip": [0.001] * 3, "update": [0.003] * 3, "step": [0.02] * 3}))
    small = LINE.format(2).replace("cer_ctc=0.541", "cer_ctc=8.333e-04")  # as ESPnet writes it
    (folder / "train.log").write_text("noise\n" + LINE.format(1) + "more noise\n" + small)


def test_report_reads_error_rate_times_and_the_log_of_each_epoch(tmp_path):
    test = tmp_path / "test"
    test.mkdir()
    (test / "text").write_text("a 1 2\nb 3 4\n")
    for wrong_words, name in enumerate(("torch", "fastclip.run"), 1):
        write_run(tmp_path / name, wrong_words)
    results = {name: report.result_of(tmp_path / name, test) for name in ("torch", "fastclip.run")}
    assert [result["wer_percent"] for result in results.values()] == [25.0, 50.0]
    assert results["torch"]["share_percent"] == pytest.approx(20.0) and results["torch"]["steps"] == 3
    assert results["torch"]["epochs"] == [{**LOGGED, "cer_ctc": rate} for rate in (0.541, 8.333e-4)]
    lines = report.tables(results).splitlines()
    assert lines[0].split() == ["torch", "fastclip.run"]
    assert lines[1].split() == ["word", "error", "rate", "25.0", "%", "50.0", "%"]
    assert ["2", "grad_norm", "12.5", "12.5"] in [line.split() for line in lines]


def test_a_program_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    with pytest.raises(recipe.RunError, match="(?s)log is .*log, and ends with\n.*ValueError: no such thing"):
        list(recipe.run(["-c", "raise ValueError('no such thing')"], tmp_path / "log", 1))


def test_a_signal_to_end_stops_what_was_started(tmp_path):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    script = (
        "import sys; from examples.recipe import __main__ as recipe\n"
        f"lines = recipe.run(['-c', {program!r}], 'log', 1)\n"
        "recipe.run_all = lambda options: [print(line, flush=True) for line in lines]\n"
        "sys.exit(recipe.main([]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ours = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    theirs = int(ours.stdout.readline())
    ours.terminate()
    assert ours.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(theirs, 0)


def test_a_folder_that_espnet_cannot_have_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe.parse_arguments(["--out", str(tmp_path / "a,b")])
    assert "can't have a comma" in capsys.readouterr().err


def test_without_espnet_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert recipe.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said == "error: ESPnet is not installed: pip install --no-deps -r requirements-toolkits.txt\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_short_run_of_the_real_espnet(tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("espnet2") is None:
        pytest.skip("ESPnet is not installed (requirements-toolkits.txt)")
    strings = [Utterance(tone(0.8, 300 + 100 * i, 8000), str(i)) for i in range(10)]
    speech = Speech("recorded", "tones", 8000, list("0123456789"), strings, strings[:2])
    monkeypatch.setattr(recipe, "digit_strings", lambda cache, seed: speech)
    monkeypatch.setattr(recipe, "RUNS", {"fastclip.run": recipe.RUNS["fastclip.run"]})
    assert recipe.main(["--out", str(tmp_path), "--epochs", "2", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "word error rate" in said and "2 grad_norm" in said
    assert "fastclip: 2 steps, 2 clips deferred to the step\n" in said
    found = json.loads((tmp_path / "recipe.json").read_text())
    assert found["results"]["fastclip.run"]["steps"] == 2 == len(found["results"]["fastclip.run"]["epochs"])
    assert found["settings"] == {"epochs": 2, "seed": 0, "threads": 1}


def test_the_table_of_the_docs_is_that_of_the_recorded_run():
    found = json.loads((ROOT / "docs/study/recipe.json").read_text())
    assert not found["dirty"] and found["results"].keys() == recipe.RUNS.keys()
    table = (ROOT / "docs/patch.md").read_text().split("<!-- recipe -->\n")[1].split("\n<!--")[0].splitlines()
    expected = report.rows(found["results"])
    for line in [table[0], *table[2:]]:
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells == expected.pop(title)
    assert not expected
    first = [result["epochs"][0] for result in found["results"].values()]
    assert all(epoch[name] == first[0][name] for epoch in first for name in ("loss", "grad_norm", "clip", "cer_ctc"))
